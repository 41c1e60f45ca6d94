"""The GPU of this machine, whoever made it and whichever torch this is."""

import torch


def gpu() -> str | None:
    """Its kind, for `torch.get_device_module`; None where torch can use none."""
    if hasattr(torch, "accelerator"):  # from torch 2.6 on
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return found.type if found else None
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((kind for kind, module in kinds.items() if module.is_available()), None)
