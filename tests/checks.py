"""Assertions: what a correct answer is, where rounding lets several answers be correct."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import Match, reference

# How far the score of a choice may lie below the maximum, for patches of norm 1.
TAU = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-6,
    torch.bfloat16: 1e-6,
}
# How far below it may lie if the features may be rounded for the choice.
ROUNDING = {"fp16": 2**-10, "bf16": 2**-7, "tf32": 2**-9}
# What an error may always be, relative to the largest element: PyTorch's own can be zero by chance,
# and in float64 it is by construction. 16-bit results are summed in float32 and rounded once.
SPARE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


def scores_at(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    index: Tensor,  # [N, Ho, Wo]
    *,
    kernel_size: int = 3,
    padding: int = 1,
    normalize: str = "both",
    eps: float = 1e-12,
    add_eps: bool = False,
) -> Tensor:  # [N, Ho, Wo]
    """The score of every query patch with the key patch at its index: a search that has chosen."""
    q = F.unfold(query, kernel_size, padding=padding)
    k = F.unfold(key, kernel_size, padding=padding)
    if normalize == "both":
        q = q / _denominator(q, eps, add_eps)
    if normalize != "none":
        k = k / _denominator(k, eps, add_eps)
    return (q * _at(k, index)).sum(1).view(index.shape)


def assert_same_choice(
    match: Match,
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None = None,  # [N or 1, HKo, WKo]
    *,
    kernel_size: int = 3,
    padding: int | None = None,
    normalize: str = "both",
    eps: float = 1e-12,
    add_eps: bool = False,
    precision: str | None = None,
) -> None:
    """`match` holds a best key of every query, judged in float64, and that key's score.

    The score returned may differ from that of the key chosen, and that from the maximum, by `TAU`
    of the norms that are not divided out; a `precision` of 16 bits may cost `ROUNDING` of them on
    top, in the choice alone.
    """
    padding = kernel_size // 2 if padding is None else padding
    patch = {"kernel_size": kernel_size, "padding": padding}
    q, k = query.detach().double(), key.detach().double()
    options = {**patch, "normalize": normalize, "eps": eps, "add_eps": add_eps}
    best, _ = reference.search(q, k, key_mask, **options)
    index = match.index.to(q.device)

    assert index.dtype == torch.int64 and index.shape == best.shape
    _, _, hk, wk = k.shape
    keys = (hk + 2 * padding - kernel_size + 1) * (wk + 2 * padding - kernel_size + 1)
    assert ((index >= 0) & (index < keys)).all()
    if key_mask is not None:
        legal = key_mask.flatten(1).expand(len(index), -1)
        assert legal.gather(1, index.flatten(1)).all(), "a masked key was chosen"

    assert match.score.dtype == (query.dtype if query.dtype == torch.float64 else torch.float32)
    score = match.score.detach().to(q.device).double()
    chosen = scores_at(q, k, index, **options)
    scale = _patch_scale(q, k, normalize, patch)
    off, lost = (score - chosen).abs() / scale, (best - chosen) / scale
    assert off.le(TAU[query.dtype]).all(), f"score is off by {off.max():.3g}"
    allowed = TAU[query.dtype] + ROUNDING.get(precision, 0)
    assert lost.le(allowed).all(), f"a better key was missed by {lost.max():.3g}"


def assert_no_worse(
    actual: Tensor,
    expected: Tensor,  # float64
    baseline: Tensor,  # PyTorch's result in the dtype under test
) -> None:
    """The error is at most twice that of `baseline`, plus `SPARE` of the largest element."""
    assert actual.shape == expected.shape and expected.dtype == torch.float64
    assert actual.dtype == baseline.dtype
    actual, expected, baseline = (x.detach().cpu() for x in (actual, expected, baseline))
    error = (actual.double() - expected).abs()
    allowed = 2 * (baseline.double() - expected).abs().max()
    allowed = allowed + SPARE[baseline.dtype] * expected.abs().max()
    assert error.le(allowed).all(), f"error {error.max():.3g} where {allowed:.3g} is allowed"


def adjoint(
    grad: Tensor, index: Tensor, weight: Tensor | None, value_size: list[int], **options: Any
) -> Tensor:
    """Transpose of the oracle's `gather_fold` in its value, by autograd."""
    value = torch.zeros(value_size, dtype=grad.dtype, device=grad.device, requires_grad=True)
    out = reference.gather_fold(value, index, weight, **options)
    return torch.autograd.grad(out, value, grad)[0]


def dot(value: Tensor, grad: Tensor, index: Tensor, **options: Any) -> Tensor:
    """Transpose of the oracle's `gather_fold` in its weight, by autograd."""
    weight = torch.ones(index.shape, dtype=value.dtype, device=value.device, requires_grad=True)
    out = reference.gather_fold(value.detach(), index, weight, **options)
    return torch.autograd.grad(out, weight, grad)[0]


def _denominator(patches: Tensor, eps: float, add_eps: bool) -> Tensor:  # [N or 1, 1, L]
    norm = patches.norm(dim=1, keepdim=True)
    return norm + eps if add_eps else norm.clamp(min=eps)


def _at(patches: Tensor, index: Tensor) -> Tensor:  # [N or 1, D, Nk], [N, Ho, Wo] -> [N, D, Nq]
    patches = patches.expand(index.shape[0], -1, -1)
    return patches.gather(2, index.flatten(1)[:, None].expand(-1, patches.shape[1], -1))


def _patch_scale(q: Tensor, k: Tensor, normalize: str, patch: dict[str, int]) -> Tensor:
    """What multiplies the cosine in a score, for the longest key: [N, Ho, Wo] or [1]."""
    if normalize == "both":
        return q.new_ones(1)
    scale = F.unfold(q, **patch).norm(dim=1)
    if normalize == "none":
        scale = scale * F.unfold(k, **patch).norm(dim=1).amax(1, keepdim=True)
    grid = [n + 2 * patch["padding"] - patch["kernel_size"] + 1 for n in q.shape[2:]]
    return scale.view(len(q), *grid).clamp(min=1e-300)
