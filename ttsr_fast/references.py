"""Search and transfer among several references, each of its own size, without stitching them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsr_fast.functional import Match, gather_fold, search
from ttsr_fast.operators.patch import Patch

_BAND = 2**16  # key positions that are brought over to another device at a time


class ReferenceMatch(NamedTuple):
    """The best key patch of every query patch in several references.

    Attributes:
        score: `[N, H, W]`, as in `Match`.
        index: `[N, H, W]`, int64: row-major position in the key grid of the reference it is in.
        reference: `[N, H, W]`, int64: the number of that reference in the list.
    """

    score: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name, not missed here
    reference: Tensor


def search_references(
    query: Tensor,  # [N, C, H, W]
    keys: Sequence[Tensor],  # [N or 1, C, HK, WK] each
    *,
    key_masks: Sequence[Tensor | None] | None = None,  # [N or 1, HK, WK] bool each
    band: int | None = None,
    **options: Any,
) -> ReferenceMatch:
    """`search` for the best patch of all `keys`: one maximum over all of them.

    Nothing is padded to a common size, and no patch reaches from one reference into another.

    Args:
        query: `[N, C, H, W]`, as for `search`.
        keys: the references, `[N, C, HK, WK]` or `[1, C, HK, WK]` each, of any sizes. They may be
            on another device than `query`: they go there band by band, and are searched there.
        key_masks: for each of `keys` a mask as `search` takes it, or None. One that bars a whole
            reference is no error, so long as another reference is left.
        band: rows of a key grid that are searched at a time; None takes references that are on the
            device of `query` whole, and others in bands of 2**16 positions. Bands change neither
            scores nor choices in float32 on the CPU; where features are rounded by their largest,
            as float16 is on a GPU, they may move near-ties.
        options: as for `search`.

    Returns:
        `ReferenceMatch(score, index, reference)` on the query grid. Equal scores go to the first
        reference, and there to the lowest index. NaN as in `search`: one in a reference spoils all.

    Differentiable as `search` is, in query and keys. Cost: one `search` in each of `keys`.

    Raises:
        ValueError: no keys, as many masks as no keys, a mask that leaves none; and all that
            `search` raises, with the number of the reference.
    """
    if not keys:
        raise ValueError("keys must hold at least one reference, got none")
    if band is not None and band < 1:
        raise ValueError(f"band must be at least 1 row, got {band}")
    masks = [None] * len(keys) if key_masks is None else list(key_masks)
    if len(masks) != len(keys):
        raise ValueError(f"key_masks must hold one for each of {len(keys)} keys, got {len(masks)}")
    best: ReferenceMatch | None = None
    for number, (key, mask) in enumerate(zip(keys, masks, strict=True)):
        try:
            best = _search_one(query, key, mask, band, options, number, best)
        except (TypeError, ValueError) as error:
            raise type(error)(f"keys[{number}]: {error}") from error
    assert best is not None
    if best.score.device.type == "cpu" and bool((best.score == -torch.inf).any()):
        raise ValueError("key_masks must leave at least one key position True in every image")
    return best


def _search_one(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    band: int | None,
    options: dict[str, Any],
    number: int,
    best: ReferenceMatch | None,
) -> ReferenceMatch:
    """The better of `best` and the matches in one reference."""
    patch = _patch(options)
    if not isinstance(key, Tensor) or key.dim() != 4 or min(patch.grid(*key.shape[2:])) < 1:
        search(query, key, **options)  # an error that says what is wrong with it
    rows, columns = patch.grid(*key.shape[2:])
    if mask is not None and list(mask.shape[1:]) != [rows, columns]:
        raise ValueError(
            f"its mask must be [1 or {key.shape[0]}, {rows}, {columns}], got {list(mask.shape)}"
        )
    step = band or (rows if key.device == query.device else max(1, _BAND // columns))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        top, bottom = rows_needed(first, last, key.shape[2], patch)
        part = key[:, :, top:bottom].to(query.device, non_blocking=True)
        here = None if mask is None else mask.to(query.device, non_blocking=True)
        found = search_band(query, part, first, last, key.shape[2], key_mask=here, **options)
        if best is None:
            best = ReferenceMatch(*found, torch.full_like(found.index, number))
            continue
        better = is_better(found.score, best.score)
        best = ReferenceMatch(
            torch.where(better, found.score, best.score),
            torch.where(better, found.index, best.index),
            best.reference.masked_fill(better, number),
        )
    assert best is not None
    return best


def gather_fold_references(
    values: Sequence[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, H, W] int64
    reference: Tensor,  # [N, H, W] int64
    *,
    weight: Tensor | None = None,  # [N, H, W]
    **options: Any,
) -> Tensor:  # [N, C, stride*H, stride*W]
    """`gather_fold` of patches that come from several references.

    Args:
        values: one for each reference, `[N, C, HV, WV]` or `[1, C, HV, WV]`, of any sizes, without
            NaN and infinities: a patch that was not chosen is multiplied by 0.
        index: as `search_references` returns it.
        reference: as `search_references` returns it.
        weight: `[N, H, W]`, a factor for every patch, as for `gather_fold`.
        options: as for `gather_fold`.

    Returns:
        As `gather_fold`. Differentiable in values and weight. Cost: a `gather_fold` for each
        reference that was chosen, of which on the CPU only those are computed.

    Raises:
        ValueError: no values, or a number in `reference` that none of them has; and all that
            `gather_fold` raises.
    """
    if not values:
        raise ValueError("values must hold at least one reference, got none")
    if not isinstance(reference, Tensor) or reference.shape != index.shape:
        got = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(f"reference must have the shape {list(index.shape)} of index, got {got}")
    if len(values) == 1:
        return gather_fold(values[0], index, weight=weight, **options)
    on_cpu = reference.device.type == "cpu"
    used = range(len(values))
    if on_cpu and reference.numel():
        numbers = reference.unique().tolist()
        if numbers[0] < 0 or numbers[-1] >= len(values):
            raise ValueError(
                f"reference must lie in [0, {len(values)}), got {numbers[0]} to {numbers[-1]}"
            )
        used = numbers
    total = None
    for number in used:
        here = reference == number
        factor = here.to(values[number].dtype) if weight is None else torch.where(here, weight, 0)
        chosen = torch.where(here, index, 0)
        part = gather_fold(values[number], chosen, weight=factor, **options)
        total = part if total is None else total + part
    assert total is not None
    return total


# --- a key in bands of rows ---
#
# A band is what the patches at some rows of the key grid read: those rows, and as many more above
# and below as a patch reaches. Patches that would reach beyond are masked, so that every patch is
# seen whole, and by one band.


def rows_needed(first: int, last: int, height: int, patch: Patch) -> tuple[int, int]:
    """Rows of the key map, end exclusive, that the patches at grid rows [first, last) read.

    Args:
        first, last: rows of the key grid.
        height: rows of the whole key map.
        patch: of the search.
    """
    top = first - patch.padding
    return max(0, top), min(height, top + last - first - 1 + patch.kernel_size)


def _patch(options: dict[str, Any]) -> Patch:
    return Patch.of(options.get("kernel_size", 3), options.get("padding"))


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
        backend "cpp" is bit-equal to a search in the whole key; with "torch" the last bit
        depends on the shape of a product. A band that the mask bars wholly scores -inf.
    """
    patch = _patch(options)
    top, _ = rows_needed(first, last, height, patch)
    rows, columns = patch.grid(*band.shape[2:])
    mask = torch.zeros(1, rows, columns, dtype=torch.bool, device=band.device)
    mask[:, first - top : last - top] = True
    if key_mask is None:
        whole = last - first == rows
        score, index = search(query, band, key_mask=None if whole else mask, **options)
        return Match(score, index + top * columns)
    mask = mask & key_mask[:, top : top + rows]
    excluded = ~mask.flatten(1).any(1)[:, None, None]
    score, index = search(query, band, key_mask=mask | excluded, **options)
    return Match(torch.where(excluded, -torch.inf, score), index + top * columns)


def is_better(score: Tensor, best: Tensor) -> Tensor:
    """Where a later match wins: NaN over numbers, as in `search`, and equals stay."""
    return (score > best) | (score.isnan() & ~best.isnan())
