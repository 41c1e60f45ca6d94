"""The transfer at several levels, its adjoint, and the gradient of the search, which needs both.

Maps come and go as lists, one for every level; a backend may do all levels in one launch. A `patch`
is (kernel_size, padding).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.operators import backends, pytorch
from ttsr_fast.operators.choosers import Choosers

Patch = tuple[int, int]


def gather_fold(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    strides: list[int],
    patch: Patch,
    divisor: str,
    backend: str | None,
) -> list[Tensor]:  # [N, C, stride*H, stride*W] each
    run = backends.choose("gather_fold", values[0], backend)
    outs = outputs(values, index, strides, patch)
    if index.numel():
        run(values, index, weight, outs, strides, *patch, divisor)
    return outs


def outputs(values: list[Tensor], index: Tensor, strides: list[int], patch: Patch) -> list[Tensor]:
    """What `gather_fold` fills."""
    n, h, w = index.shape
    height, width = (size + patch[0] - 1 - 2 * patch[1] for size in (h, w))
    return [
        like(value, [n, value.shape[1], height * stride, width * stride])
        for value, stride in zip(values, strides, strict=True)
    ]


def adjoint(
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    choosers: Choosers,
    weight: Tensor | None,  # [N, Ho, Wo]
    sizes: list[list[int]],  # [N or 1, C, HV, WV] each
    strides: list[int],
    patch: Patch,
    divisor: str,
    backend: str | None,
) -> list[Tensor]:  # of these sizes
    run = backends.choose("gather_fold_adjoint", grads[0], backend)
    outs = [like(grad, size) for grad, size in zip(grads, sizes, strict=True)]
    if choosers.index.numel() == 0:
        return [out.zero_() for out in outs]
    run(grads, choosers, weight, outs, strides, *patch, divisor)
    return outs


def search_gradient(
    grad_score: Tensor,  # [N, Ho, Wo]
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    score: Tensor,  # [N, Ho, Wo]
    choosers: Choosers,
    patch: Patch,
    normalize: str,
    eps: float,
    add_eps: bool,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # shapes of query and key; empty where not needed
    """Gradient through the two chosen patches and their norms.

    With i = index[j], g the gradient of score[j] and n what a patch is divided by: the product of
    the patches has gradient g / (n_i n_j) in each factor, and a norm that n varies with pulls on
    every pixel x of its patch by -g score x / (n norm), summed over the patches that hold x.
    """
    patches = choosers.index.shape
    if not (patches == score.shape == grad_score.shape and _fit(query, key, patches, *patch)):
        shapes = [list(x.shape) for x in (grad_score, query, key, score, choosers.index)]
        raise ValueError(f"shapes of grad_score, query, key, score and index do not fit: {shapes}")
    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if not any(needed):
        return grad_query, grad_key
    index, weight, query_pull, key_pull = choosers.index, grad_score, None, None
    varies_above = 0.0 if add_eps else eps
    if normalize in ("both", "key"):
        norm = pytorch.patch_norm(key, *patch)
        grid = list(norm.shape)
        (chosen,) = gather_fold([norm], index, None, [1], (1, 0), "none", backend)
        divisor = pytorch.denominator(chosen, eps, add_eps)
        weight = weight / divisor[:, 0]
        pull = (grad_score * score).unsqueeze(1) / (divisor * chosen)
        key_pull = torch.where(chosen > varies_above, pull, 0)
    if normalize == "both":
        norm = pytorch.patch_norm(query, *patch)[:, 0]
        divisor = pytorch.denominator(norm, eps, add_eps)
        weight = weight / divisor
        pull = grad_score * score / (divisor * norm)
        query_pull = torch.where(norm > varies_above, pull, 0).unsqueeze(1)

    if needed[0]:
        (grad_query,) = gather_fold([key], index, weight, [1], patch, "none", backend)
        if query_pull is not None:
            grad_query -= _spread(query, query_pull, *patch)
    if needed[1]:
        size = list(key.shape)
        (grad_key,) = adjoint([query], choosers, weight, [size], [1], patch, "none", backend)
        if key_pull is not None:
            (pull,) = adjoint([key_pull], choosers, None, [grid], [1], (1, 0), "none", backend)
            grad_key -= _spread(key, pull, *patch)
    return grad_query, grad_key


def search_gradient_outputs(
    query: Tensor, key: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    """What `search_gradient` returns."""
    return (
        like(key, list(query.shape)) if needed[0] else query.new_empty(0),
        like(query, list(key.shape)) if needed[1] else key.new_empty(0),
    )


def _fit(query: Tensor, key: Tensor, grid: torch.Size, kernel_size: int, padding: int) -> bool:
    """Whether the patches of the query are that grid, and those of the key may be its matches."""
    if query.dim() != 4 or key.dim() != 4 or key.shape[0] not in (1, query.shape[0]):
        return False
    shrink = kernel_size - 1 - 2 * padding
    patches = (query.shape[0], *(size - shrink for size in query.shape[2:]))
    return grid == patches and query.shape[1] == key.shape[1]


def _spread(x: Tensor, pull: Tensor, kernel_size: int, padding: int) -> Tensor:
    """x times the sum of `pull` over the patches that hold each pixel."""
    padded = F.pad(pull, [kernel_size - 1 - padding] * 4)
    total = F.avg_pool2d(padded, kernel_size, stride=1, divisor_override=1)
    return x * total.to(x.dtype)


def like(x: Tensor, size: list[int]) -> Tensor:
    """An empty map of that size, otherwise as `x`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
