"""Proof that a low-precision search chose as an exact one would."""

import torch
from torch import Tensor

from ttsr_fast.functional import Match
from ttsr_fast.operators import backends, pytorch
from ttsr_fast.operators.index import at_index
from ttsr_fast.operators.patch import Patch, Score, Transfer, patch_norm

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SLACK = 2e-6  # errors of float32 in a cosine
_COSINE = Score()


def certified(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    match: Match,
    *,
    precision: str,
    kernel_size: int = 3,
    padding: int | None = None,
    key_mask: Tensor | None = None,  # [N or 1, HK, WK] bool
) -> Tensor:  # [N, H, W] bool
    r"""Queries for which rounded features cannot have changed which key is the most similar.

    `search` with `precision="fp16"` or `"bf16"` chooses by rounded features. If rounding turns a
    patch x by the angle :math:`\theta_x` at most, with
    :math:`\sin \theta_x = \|\tilde{x} - x\| / \|x\|`, the angle between two patches changes by at
    most the sum of theirs. So with b and s the rounded cosines of the chosen key and of the best
    other one, the choice for query j is certain if

    .. math::
        \arccos s - \max_i \theta_i - \theta_j > \arccos b + \theta_{\text{index}_j} + \theta_j.

    `certified(...).float().mean()` is the share of certain queries. A query with two equal best
    keys is not certain, nor is one with score NaN.

    Args:
        query: `[N, C, H, W]`, as given to `search`.
        key: `[N, C, HK, WK]` or `[1, C, HK, WK]`, as given to `search`.
        match: what `search` returned for them, under `normalize="both"` or `"key"` and with the
            default `eps` and `add_eps`.
        precision: `"fp16"` or `"bf16"`: what the features were rounded to.
        kernel_size: as given to `search`.
        padding: as given to `search`.
        key_mask: as given to `search`.

    Returns:
        `[N, H, W]`, bool.

    Cost: a search, which finds the best other key too: by the compiled kernels on the CPU, in plain
    PyTorch on other devices.

    Raises:
        ValueError: `precision` rounds nothing or is unknown, or `match` has another grid.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision must be one of {tuple(_DTYPES)}, got {precision!r}")
    patch = Patch.of(kernel_size, padding)
    grid = [len(query), *patch.grid(*query.shape[2:])]
    if list(match.index.shape) != grid:
        raise ValueError(f"match must have the query grid {grid}, got {list(match.index.shape)}")
    query, key = query.detach().float(), key.detach().float()
    with torch.autocast(query.device.type, enabled=False):
        certain = _certain(query, key, match.index, precision, patch, key_mask)
    return certain & ~match.score.isnan()


def _certain(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    index: Tensor,  # [N, H, W]
    precision: str,
    patch: Patch,
    key_mask: Tensor | None,  # [N or 1, HK, WK]
) -> Tensor:  # [N, H, W]
    rounded_q, rounded_k = (_rounded(x, _DTYPES[precision]) for x in (query, key))
    angle_q = _angle(query, rounded_q, patch)
    angle_k = _angle(key, rounded_k, patch)
    if key_mask is not None:
        angle_k = angle_k.masked_fill(~key_mask, 0)
    angle_best = at_index(angle_k, index)
    best = _cosine_at(rounded_q, rounded_k, index, patch)
    other = torch.empty_like(best)
    score_excluding = backends.choose("score_excluding", query, None)
    score_excluding(index, rounded_q, rounded_k, key_mask, other, patch, _COSINE, precision)
    nearest = torch.acos((best - _SLACK).clamp(-1, 1)) + angle_best + angle_q
    next_one = (
        torch.acos((other + _SLACK).clamp(-1, 1)) - angle_k.amax((1, 2), keepdim=True) - angle_q
    )
    return next_one > nearest  # NaN compares false


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` and back; near the top of float16's range, as the kernels do it."""
    if dtype == torch.bfloat16:
        return x.to(dtype).float()
    largest = x.abs().nan_to_num(0, 0, 0).flatten(1).amax(1).clamp(min=1e-30)[:, None, None, None]
    scale = torch.exp2(14 - largest.log2().floor())
    return (x * scale).to(dtype).float() / scale


def _angle(x: Tensor, rounded: Tensor, patch: Patch) -> Tensor:
    """Angle between every patch and the rounded one, [N, Ho, Wo]; 0 for a patch of zeros."""
    error, norm = (patch_norm(y, patch)[:, 0] for y in (x - rounded, x))
    return torch.where(norm > 0, torch.asin((error / norm).clamp(max=1)), 0)


def _cosine_at(query: Tensor, key: Tensor, index: Tensor, patch: Patch) -> Tensor:  # [N, Ho, Wo]
    norms = [patch_norm(x, patch)[:, 0] for x in (query, key)]
    product = torch.empty_like(norms[0])
    pytorch.gather_dot([key], [query], index, product, Transfer([1], patch, "none"))
    return product / _COSINE.denominator(norms[0]) / _COSINE.denominator(at_index(norms[1], index))
