"""Bicubic upscaling of channels-last maps on the CPU, as matrix products."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 2  # pixels on either side that a result reads
_BLOCK = 16  # pixels of a product: with more, most factors are zero


def bicubic_by_products(
    x: Tensor,  # [N, C, H, W]
    factor: int,
) -> Tensor:  # [N, C, factor*H, factor*W]
    """`F.interpolate` by an integer factor in mode "bicubic", channels last.

    PyTorch's kernel is for any factor and takes five to ten times as long.
    """
    n, channels, height, width = x.shape
    columns = x.permute(0, 3, 2, 1).reshape(n, width, height * channels)
    wide = _upscale(columns, factor).view(n, factor * width, height, channels)
    rows = wide.transpose(1, 2).reshape(n, height, factor * width * channels)
    out = _upscale(rows, factor).view(n, factor * height, factor * width, channels)
    return out.permute(0, 3, 1, 2)


def _upscale(
    x: Tensor,  # [N, L, M]
    factor: int,
) -> Tensor:  # [N, factor*L, M]
    """Bicubic upscaling along the second axis.

    All products have one shape, so that windows of a map are rounded like the whole map: the last
    one computes some results again.
    """
    n, length, inner = x.shape
    out = x.new_empty(n, factor * length, inner)
    count, size = min(_BLOCK, length), min(_BLOCK + 2 * _REACH, length)
    for start in range(0, length, count):
        first = min(start, length - count)
        top = min(max(0, first - _REACH), length - size)
        weights = _weights(first - top, count, size, factor, x.dtype).expand(n, -1, -1)
        part = out[:, factor * first : factor * (first + count)]
        torch.bmm(weights, x[:, top : top + size], out=part)
    return out


@lru_cache(maxsize=64)
def _weights(first: int, count: int, size: int, factor: int, dtype: torch.dtype) -> Tensor:
    """Matrix from `size` pixels to the upscaled `count` from `first` on.

    Rows sum to 1 after rounding, too: else flat areas would change.
    """
    unit = torch.eye(size, dtype=torch.float64, device="cpu")[None, None]
    exact = F.interpolate(unit, size=[factor * size, size], mode="bicubic")[0, 0]
    rounded = exact[factor * first : factor * (first + count)].to(dtype).double()
    smallest = torch.where(rounded == 0, torch.inf, rounded.abs()).argmin(1, keepdim=True)
    rounded.scatter_add_(1, smallest, 1 - rounded.sum(1, keepdim=True))
    return rounded.to(dtype)
