"""Results without NaN and infinity, or an error with the likely reason."""

import torch
from torch import Tensor, nn


def check_finite(
    what: str, *results: Tensor, model: nn.Module | None = None, amp: torch.dtype | None = None
) -> None:
    """Raise if a result or a weight holds NaN or infinity.

    One pass over results and weights. On a GPU it synchronises.

    Args:
        what: subject and verb of the error, such as "the result holds".
        results: floating-point tensors of any shape, on any device.
        model: the network that made them. Its weights are checked too, as a clamp can hide an
            infinite one.
        amp: type of its convolutions, if it is not the model's own.

    Raises:
        ValueError: names the first tensor of `model` that is not finite, or the type that
            overflows.
    """
    weights = {} if model is None else model.state_dict()
    bad = next((x for x in results if not _is_finite(x)), None)
    together = [x.flatten() for x in weights.values()]  # so that a GPU does it in two kernels
    if bad is None and (model is None or _is_finite(torch.cat(together))):
        return
    reason = _reason(weights, amp)
    raise ValueError(reason if bad is None else f"{what} {_kind(bad)}: {reason}")


def _reason(weights: dict[str, Tensor], amp: torch.dtype | None) -> str:
    for name, x in weights.items():
        if not _is_finite(x):
            return f"the weights hold {_kind(x)} in {name}"
    if amp == torch.float16:
        return "float16 overflows; use amp bf16 or none"
    if weights:
        return "the weights are finite but too large, so the network overflows"
    return "its inputs are finite, so the backend is at fault; choose another"


def _is_finite(x: Tensor) -> bool:
    """True if minimum and maximum are finite: NaN spreads to both."""
    if x.dim() == 4 and not x.is_contiguous():
        x = x.movedim(1, -1)  # channels last are reduced forty times as fast in this order
    return bool(torch.stack(x.aminmax()).isfinite().all())


def _kind(x: Tensor) -> str:
    return "NaN" if x.isnan().any() else "infinity"
