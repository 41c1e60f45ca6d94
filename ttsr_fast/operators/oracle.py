"""Backend `"reference"`: the oracle in higher precision, and its transposes by autograd."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ttsr_fast import reference
from ttsr_fast.operators.index import InverseIndex, check_index
from ttsr_fast.operators.patch import Patch, Score, Transfer, sum_dtype


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # [N, Ho, Wo] twice, filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    """In float64; an infinity counts as NaN, with any normalisation."""
    q, k = (torch.where(x.isfinite(), x.double(), torch.nan) for x in (query, key))
    found = reference.search(q, k, key_mask, **patch._asdict(), **scoring._asdict())
    for out, result in zip(match, found, strict=True):
        out.copy_(result)


def gather_fold(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N, C, stride*H, stride*W] each, filled
    transfer: Transfer,
) -> None:
    for level, fold in enumerate(_levels(transfer)):
        value, out = values[level], outs[level]
        rows, columns = transfer.key_grid(value.shape, level)
        check_index(index, rows * columns)
        out.copy_(fold(value.to(sum_dtype(value.dtype)), index, weight))


def gather_fold_adjoint(
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    inverse: InverseIndex,
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N or 1, C, HV, WV] each, filled
    transfer: Transfer,
) -> None:
    for grad, out, fold in zip(grads, outs, _levels(transfer), strict=True):
        with _autograd():
            value = out.new_zeros(out.shape, dtype=sum_dtype(out.dtype)).requires_grad_()
            result = fold(value, inverse.index, weight)
            (transposed,) = torch.autograd.grad(result, value, grad.to(result.dtype))
        out.copy_(transposed)


def gather_dot(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    index: Tensor,  # [N, Ho, Wo]
    out: Tensor,  # [N, Ho, Wo], filled
    transfer: Transfer,
) -> None:
    out.zero_()
    for value, grad, fold in zip(values, grads, _levels(transfer), strict=True):
        with _autograd():
            weight = torch.ones_like(out).requires_grad_()
            result = fold(value.to(out.dtype), index, weight)
            (transposed,) = torch.autograd.grad(result, weight, grad.to(out.dtype))
        out += transposed


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """No reason: plain PyTorch runs everywhere."""


def _levels(transfer: Transfer) -> Iterator[Callable[..., Tensor]]:
    """`reference.gather_fold` with the options of each level."""
    strides, patch, divisor = transfer
    for stride in strides:
        options: dict[str, Any] = {"stride": stride, "divisor": divisor, **patch._asdict()}
        yield lambda *tensors, options=options: reference.gather_fold(*tensors, **options)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator, which PyTorch runs below it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield
