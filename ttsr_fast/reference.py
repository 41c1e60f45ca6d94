"""The oracle: `search`, `gather_fold` and `SearchTransfer` in plain PyTorch.

Every other implementation in this package is held to these three functions, evaluated in higher
precision, and every gradient to their gradients by autograd. They unfold, normalise, multiply and
fold exactly as equations 2 to 5 of the TTSR paper (arXiv 2006.04139) read, which needs a matrix of
`Hk*Wk x H*W` scores and `kernel_size**2` copies of the value: clarity here, speed and memory
elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None = None,  # [N or 1, HKo, WKo] bool
    *,
    kernel_size: int = 3,
    padding: int = 1,
    normalize: str = "both",
    eps: float = 1e-12,
    add_eps: bool = False,
) -> tuple[Tensor, Tensor]:  # [N, Ho, Wo], [N, Ho, Wo]
    """Score and row-major position of the best key patch for every query patch."""
    query_grid = [size + 2 * padding - kernel_size + 1 for size in query.shape[-2:]]
    q = F.unfold(query, kernel_size, padding=padding)  # [N, C*k*k, Nq]
    k = F.unfold(key, kernel_size, padding=padding)  # [N or 1, C*k*k, Nk]
    if normalize == "both":
        q = _divided_by_norm(q, eps, add_eps)
    if normalize in ("both", "key"):
        k = _divided_by_norm(k, eps, add_eps)
    relevance = k.transpose(1, 2) @ q  # [N, Nk, Nq]
    if key_mask is not None:
        relevance = relevance.masked_fill(~key_mask.flatten(1)[:, :, None], float("-inf"))
    score, index = relevance.max(dim=1)
    return score.unflatten(1, query_grid), index.unflatten(1, query_grid)


def _divided_by_norm(x: Tensor, eps: float, add_eps: bool) -> Tensor:  # [N, C*k*k, L]
    if add_eps:
        return x / (x.norm(dim=1, keepdim=True) + eps)
    return F.normalize(x, dim=1, eps=eps)


def gather_fold(
    value: Tensor,  # [N or 1, C, HV, WV]
    index: Tensor,  # [N, Ho, Wo] int64
    weight: Tensor | None = None,  # [N, Ho, Wo]
    *,
    stride: int = 1,
    kernel_size: int = 3,
    padding: int = 1,
    divisor: str = "area",
) -> Tensor:  # [N, C, stride*H, stride*W]
    """Overlap-add of the value patches at `index`, laid out on the query grid."""
    size, pad = kernel_size * stride, padding * stride
    grid = [n + kernel_size - 1 - 2 * padding for n in index.shape[-2:]]
    patches = F.unfold(value, size, stride=stride, padding=pad)  # [N or 1, C*size*size, Nk]
    patches = patches.expand(index.shape[0], -1, -1)
    flat = index.flatten(1)[:, None, :].expand(-1, patches.shape[1], -1)
    chosen = patches.gather(2, flat)  # [N, C*size*size, Nq]
    if weight is not None:
        chosen = chosen * weight.flatten(1)[:, None, :].to(chosen.dtype)

    def fold(x: Tensor) -> Tensor:
        return F.fold(x, (grid[0] * stride, grid[1] * stride), size, stride=stride, padding=pad)

    out = fold(chosen)
    if divisor == "area":
        return out / kernel_size**2
    if divisor == "overlap":
        return out / fold(torch.ones_like(chosen[:1, : size * size])).clamp(min=1)
    return out


def search_transfer(
    lrsr_lv3: Tensor,  # [N, C3, H, W]
    refsr_lv3: Tensor,  # [N, C3, HK, WK]
    ref_lv1: Tensor,  # [N, C1, ~4*HK, ~4*WK]
    ref_lv2: Tensor,  # [N, C2, ~2*HK, ~2*WK]
    ref_lv3: Tensor,  # [N, C3, HK, WK]
    *,
    key_mask: Tensor | None = None,  # [N or 1, HK, WK] bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TTSR's relevance embedding and hard attention: S, T_lv3, T_lv2, T_lv1."""
    score, index = search(lrsr_lv3, refsr_lv3, key_mask)
    return (
        score.unsqueeze(1),
        gather_fold(ref_lv3, index, stride=1),
        gather_fold(ref_lv2, index, stride=2),
        gather_fold(ref_lv1, index, stride=4),
    )
