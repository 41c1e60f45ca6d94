"""The GPU of this machine, of any vendor and with any torch."""

import torch


def gpu() -> str | None:
    """Device type for `torch.get_device_module`; None without a usable GPU."""
    if hasattr(torch, "accelerator"):  # from torch 2.6 on
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return found.type if found else None
    kinds = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((kind for kind, module in kinds.items() if module.is_available()), None)
