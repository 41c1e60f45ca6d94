"""A key map searched in bands of rows, one after another or on several machines.

A band is what the patches at some rows of the key grid read: those rows, and as many more above
and below as a patch reaches. Patches that would reach beyond are masked, so that every patch is
seen whole, and by one band.
"""

from typing import Any

import torch
from torch import Tensor

from ttsr_fast.functional import Match, search


def rows_needed(
    first: int, last: int, height: int, kernel_size: int = 3, padding: int | None = None
) -> tuple[int, int]:
    """Rows of the key map, end exclusive, that the patches at grid rows [first, last) read.

    Args:
        first, last: rows of the key grid.
        height: rows of the whole key map.
        kernel_size, padding: as for `search`.
    """
    pad = kernel_size // 2 if padding is None else padding
    return max(0, first - pad), min(height, last - 1 - pad + kernel_size)


def search_band(
    query: Tensor,  # [N, C, H, W]
    band: Tensor,  # [N or 1, C, bottom - top, WK]
    first: int,
    last: int,
    height: int,
    *,
    key_mask: Tensor | None = None,  # [N or 1, HKo, WKo] bool
    **options: Any,
) -> Match:
    """`search` among the patches at rows [first, last) of the key grid.

    Args:
        query: as for `search`.
        band: the rows `rows_needed(first, last, height)` of the key map.
        first, last: rows of the key grid.
        height: rows of the whole key map.
        key_mask: as for `search`, of the whole key grid.
        options: as for `search`.

    Returns:
        As `search`, with positions in the whole key grid. In float32 and float64 every score of the
        backend "cpp" is bit-equal to that of a search in the whole key; of "torch" the last bit
        depends on the shape of a product. A band that the mask bars wholly scores -inf.
    """
    kernel_size, padding = options.get("kernel_size", 3), options.get("padding")
    pad = kernel_size // 2 if padding is None else padding
    top, _ = rows_needed(first, last, height, kernel_size, padding)
    rows, columns = (n + 2 * pad - kernel_size + 1 for n in band.shape[2:])
    mask = torch.zeros(1, rows, columns, dtype=torch.bool, device=band.device)
    mask[:, first - top : last - top] = True
    if key_mask is None:
        whole = last - first == rows
        score, index = search(query, band, key_mask=None if whole else mask, **options)
        return Match(score, index + top * columns)
    mask = mask & key_mask[:, top : top + rows]
    barred = ~mask.flatten(1).any(1)[:, None, None]
    score, index = search(query, band, key_mask=mask | barred, **options)
    return Match(torch.where(barred, -torch.inf, score), index + top * columns)


def is_better(score: Tensor, best: Tensor) -> Tensor:
    """Where a later match wins: NaN over numbers, as in `search`, and equals stay."""
    return (score > best) | (score.isnan() & ~best.isnan())
