"""`search` and `gather_fold` in a reference with its rows divided among processes.

Every process of a torch.distributed group owns some rows of the key grid and holds the rows of the
maps that their patches read, so that a reference may be larger than any one memory. The query,
the index and the results are whole in every process:

    import torch.distributed as dist
    from ttsr_fast.distributed import gather_fold_sharded, search_sharded, shard_rows

    dist.init_process_group("gloo")  # "nccl" on GPUs
    rows = shard_rows(height)
    match = search_sharded(query, key[:, :, rows.top : rows.bottom], height)
    top, bottom = rows.of_value(value_height, stride=4)
    texture = gather_fold_sharded(value[:, :, top:bottom], match.index, value_height, stride=4)
    dist.destroy_process_group()

in a program that is started by `torchrun --nproc-per-node 2 program.py`. No process needs the whole
`key` or `value`: each can read, or compute, its own rows alone. On GPUs each first makes its own
one current (`torch.cuda.set_device`).

Every process of the group has to make the same calls. An error in one process, or arguments that
differ, raise in all, and the group can be used again. If a process has ended or does not answer,
the others raise, and the group is unusable. They wait for `timeout` seconds plus the time that
their own share took, since a slow process looks like a silent one.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.distributed.ranks import TIMEOUT, Ranks, rank_and_size
from ttsr_fast.functional import (
    Match,
    check_map,
    check_mask,
    check_patch,
    gather_fold,
    search,
    type_of,
)
from ttsr_fast.operators.patch import Patch
from ttsr_fast.references import rows_needed, search_band

POSITIONS = 1 << 32  # an index takes the lower half of an int64

_CHUNK = 1 << 22  # of what is summed up at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shard(NamedTuple):
    """The rows of one process, ends exclusive; all zero for a process without rows.

    Attributes:
        first: row of the key grid from which on patches are matched here.
        last: row of it that is the first of the next process.
        top: row of the key map from which on it has to be held here, as those patches read it.
        bottom: row of it from which on it need not be.
    """

    first: int
    last: int
    top: int
    bottom: int

    def of_value(self, value_height: int, stride: int = 1) -> tuple[int, int]:
        """Rows of a value map that have to be held here, end exclusive.

        Up to `stride - 1` rows beyond the key map's belong to whoever holds its last row.
        """
        last = self.bottom == value_height // stride
        return self.top * stride, value_height if last else self.bottom * stride


def shard_rows(
    height: int,
    *,
    kernel_size: int = 3,
    padding: int | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> Shard:
    """The rows of this process: contiguous, ascending with its rank, balanced to one row.

    Where there are more processes than rows of the key grid, some get none; they make the same
    calls with maps of no rows.

    Args:
        height: rows of the whole key map.
        kernel_size: as for `search`.
        padding: as for `search`.
        group: of processes, by default all.

    Raises:
        ValueError: the key is smaller than a patch, or an option does not fit.
        RuntimeError: there is no group, or this process is not in it.
    """
    rank, size = rank_and_size(group)
    patch = check_patch(kernel_size, padding)
    if not isinstance(height, int) or height <= patch.shrink:
        raise ValueError(
            f"height must be an integer and hold one patch of {kernel_size} rows with padding "
            f"{patch.padding}, got {height!r}"
        )
    rows, _ = patch.grid(height, height)
    first, last = rank * rows // size, (rank + 1) * rows // size
    if first == last:
        return Shard(0, 0, 0, 0)
    return Shard(first, last, *rows_needed(first, last, height, patch))


def search_sharded(
    query: Tensor,  # [N, C, H, W]
    key_rows: Tensor,  # [N or 1, C, bottom - top, WK]
    height: int,
    *,
    key_mask: Tensor | None = None,  # [N or 1, HKo, WKo] bool
    group: "dist.ProcessGroup | None" = None,
    timeout: float = TIMEOUT,
    **options: Any,
) -> Match:
    """`search` in a key map with its rows divided among the processes of a group.

    Each process searches the patches at its rows. A float32 score, as an integer of the same
    order, and the complement of its index make one int64, so that one all-reduce of the maximum
    finds the best score and the lowest index that has it. In float64 it takes two: of the scores,
    then of the indices that have the best.

    Args:
        query: as for `search`, the same in every process bit for bit: broadcast it if each process
            computes its own.
        key_rows: rows `[top, bottom)` of the key map, as `shard_rows(height)` says.
        height: rows of the whole key map; its grid has fewer than 2**32 positions.
        key_mask: as for `search`, of the whole key grid, the same in every process.
        group: of processes, by default all. A group of one will do.
        timeout: seconds to wait for processes that do not answer, and the time that the search took
            here on top. Raise it where one is slower than another by more than that.
        options: as for `search`, the same in every process.

    Returns:
        As `search` in the whole key, in every process: NaN, and equal scores to the lowest index.
        With `backend="cpp"` bit-equal in float32 and float64, but that a score of -0.0 comes as
        0.0; with "torch" the last bit of a product depends on its shape, and so on the share. Where
        features are rounded for the choice, the choices of the processes are compared by the scores
        that are returned.

    Not differentiable. Cost: each process searches its rows of the key grid and up to `2 * padding`
    more, which are masked; 8 bytes for every query position are reduced, 16 in float64, after
    some hundred bytes for the checks. Every process synchronises its device.

    Raises:
        TypeError, ValueError, RuntimeError: as `search`.
        ValueError: `key_rows` holds other rows, or the processes do not agree.
        RuntimeError: there is no group; another process failed, has ended or does not answer; an
            argument requires a gradient.
    """
    ranks = Ranks("search_sharded", group, timeout)
    kernel_size, padding = options.get("kernel_size", 3), options.get("padding")
    shard_of = partial(shard_rows, height, kernel_size=kernel_size, padding=padding, group=group)

    def check() -> dict[str, str]:
        _check_no_gradient(query=query, key_rows=key_rows)
        shard = shard_of()
        check_map("query", query)
        _check_rows("key_rows", key_rows, shard.top, shard.bottom)
        grid = Patch.of(kernel_size, padding).grid(height, key_rows.shape[3])
        if grid[0] * grid[1] >= POSITIONS:
            raise ValueError(
                f"height {height} and key_rows {list(key_rows.shape)} make a key grid of "
                f"{grid[0] * grid[1]} positions; it must have fewer than 2**32"
            )
        if key_mask is not None:
            check_mask(key_mask, key_rows, grid)
            if not bool(key_mask.flatten(1).any(1).all()):
                raise ValueError(
                    "key_mask must leave at least one key position True in every image"
                )
        return {
            "height": str(height),
            "query": _described(query),
            "key_rows": _described_but_rows(key_rows),
            "key_mask": _described(key_mask),
            "options": str(sorted(options.items())),
        }

    ranks.check_all_equal(check)
    search_here = partial(_search_rows, query, key_rows, shard_of(), height, key_mask, options)
    return _merge(ranks, ranks.run_on_all(search_here))


def gather_fold_sharded(
    value_rows: Tensor,  # [N or 1, C, bottom - top, WV]
    index: Tensor,  # [N, H, W] int64
    value_height: int,
    *,
    stride: int = 1,
    kernel_size: int = 3,
    padding: int | None = None,
    weight: Tensor | None = None,  # [N, H, W]
    divisor: str = "area",
    backend: str | None = None,
    group: "dist.ProcessGroup | None" = None,
    timeout: float = TIMEOUT,
) -> Tensor:  # [N, C, stride*H, stride*W]
    """`gather_fold` from a value map with its rows divided among the processes of a group.

    Each process sums the patches at its key positions; one all-reduce adds these sums.

    Args:
        value_rows: rows `[top, bottom)` of the value map, as
            `shard_rows(value_height // stride).of_value(value_height, stride)` says.
        index: as for `gather_fold`, the same in every process.
        value_height: rows of the whole value map.
        stride: as for `gather_fold`, the same in every process, as are all that follow.
        kernel_size: as for `gather_fold`.
        padding: as for `gather_fold`.
        weight: as for `gather_fold`, finite.
        divisor: as for `gather_fold`.
        backend: as for `gather_fold`.
        group: of processes, by default all. A group of one will do.
        timeout: seconds to wait for processes that do not answer, and the time that the sums took
            here on top.

    Returns:
        As `gather_fold` from the whole value, in every process, contiguous. On the CPU it is
        bit-equal where all the patches that meet at a block come from one process. Elsewhere the
        sum is associated otherwise: off by 1e-6 of the sum of magnitudes at most, for 3x3 patches
        in float32. 16-bit values are added in float32 and rounded once.

    Not differentiable. Cost: each process computes and reduces a whole result, in float32 at least,
    and copies its `value_rows`. Every process synchronises its device.

    Raises:
        TypeError, ValueError, RuntimeError: as `gather_fold`.
        ValueError: `value_rows` holds other rows, or the processes do not agree.
        RuntimeError: there is no group; another process failed, has ended or does not answer; an
            argument requires a gradient.
    """
    ranks = Ranks("gather_fold_sharded", group, timeout)
    options: dict[str, Any] = {"stride": stride, "kernel_size": kernel_size, "padding": padding}
    options |= {"divisor": divisor, "backend": backend}

    def shard_of() -> Shard:
        height = value_height // stride
        return shard_rows(height, kernel_size=kernel_size, padding=padding, group=group)

    def check() -> dict[str, str]:
        _check_no_gradient(value_rows=value_rows, weight=weight)
        for name, number in (("stride", stride), ("value_height", value_height)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        shard = shard_of()
        _check_rows("value_rows", value_rows, *shard.of_value(value_height, stride))
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            raise TypeError(f"index must be an int64 tensor, got {type_of(index)}")
        if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
            raise TypeError(f"weight must be a floating-point tensor, got {type_of(weight)}")
        columns = value_rows.shape[3] // stride
        grid = Patch.of(kernel_size, padding).grid(value_height // stride, columns)
        if grid[1] < 1:
            raise ValueError(
                f"value_rows must be as wide as one patch at stride {stride}, kernel_size "
                f"{kernel_size} and padding {padding}, got {list(value_rows.shape)}"
            )
        low, high = index.aminmax() if index.numel() else (0, 0)
        if low < 0 or high >= grid[0] * grid[1]:
            raise ValueError(
                f"index must lie in [0, {grid[0] * grid[1]}) for the {grid[0]} x {grid[1]} key "
                f"grid of the whole value at stride {stride}, got {int(low)} to {int(high)}"
            )
        return {
            "value_height": str(value_height),
            "value_rows": _described_but_rows(value_rows),
            "index": _described(index),
            "weight": _described(weight),
            "options": str(options),
        }

    ranks.check_all_equal(check)
    fold_here = partial(_fold_rows, value_rows, index, weight, shard_of(), options)
    total = ranks.run_on_all(fold_here)
    return ranks.reduce(total, "SUM").to(value_rows.dtype)


# --- the share of one process ---


def _search_rows(
    query: Tensor,  # [N, C, H, W]
    key_rows: Tensor,  # [N or 1, C, bottom - top, WK]
    shard: Shard,
    height: int,
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    options: dict[str, Any],
) -> Match:
    """The best match among the patches of this process; -inf where there is none."""
    if shard.first < shard.last:
        rows = (shard.first, shard.last, height)
        return search_band(query, key_rows, *rows, key_mask=key_mask, **options)
    # An empty batch is checked as any other, and costs nothing.
    key = key_rows.new_empty(0, key_rows.shape[1], height, key_rows.shape[3])
    score, index = search(query[:0], key, **options)
    shape = (len(query), *score.shape[1:])
    return Match(score.new_full(shape, -torch.inf), index.new_zeros(shape))


def _fold_rows(
    value_rows: Tensor,  # [N or 1, C, bottom - top, WV]
    index: Tensor,  # [N, H, W]
    weight: Tensor | None,  # [N, H, W]
    shard: Shard,
    options: dict[str, Any],
) -> Tensor:  # [N, C, stride*H, stride*W]
    """The sum of the patches of this process.

    Zeros below the rows given are the patches of all other queries: weights of zero would make NaN
    of an infinite value.
    """
    stride, patch = options["stride"], Patch.of(options["kernel_size"], options["padding"])
    rows = F.pad(value_rows, [0, 0, 0, (patch.kernel_size + 1) * stride])
    height, width = patch.grid(*(n // stride for n in rows.shape[2:]))
    row = index // width
    here = (row >= shard.first) & (row < shard.last)
    local = torch.where(here, index - shard.top * width, (height - 1) * width)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return gather_fold(rows, local, weight=weight, **options).contiguous()


def _merge(ranks: Ranks, found: Match) -> Match:
    """The best of what the processes found."""
    ordered = _ordered(found.score)
    if ordered.dtype == torch.int32:
        both = (ordered.long() << 32) + (POSITIONS - 1 - found.index)
        ranks.reduce(both, "MAX")
        score = _scores((both >> 32).int(), found.score.dtype)
        return Match(score, POSITIONS - 1 - both % POSITIONS)
    best = ranks.reduce(ordered.clone(), "MAX")
    index = found.index.masked_fill(ordered != best, POSITIONS)
    return Match(_scores(best, found.score.dtype), ranks.reduce(index, "MIN"))


def _ordered(score: Tensor) -> Tensor:
    """Integers as wide that are ordered as the scores are: NaN above all, and one zero."""
    bits = score.masked_fill(score == 0, 0.0).view(_BITS[score.element_size()])
    largest = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ largest, bits).masked_fill(score.isnan(), largest)


def _scores(ordered: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`; the largest integer is a NaN as it stands."""
    largest = torch.iinfo(ordered.dtype).max
    return torch.where(ordered < 0, ordered ^ largest, ordered).view(dtype)


# --- checks ---


def _check_no_gradient(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"{name} requires a gradient, and there is none through a search over processes: "
                f"detach it, or search under torch.no_grad()"
            )


def _check_rows(name: str, x: Tensor, top: int, bottom: int) -> None:
    """Check that a map holds the rows [top, bottom) of the whole one; there may be none."""
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == 0):
        check_map(name, x)
    if x.shape[2] != bottom - top:
        raise ValueError(
            f"{name} must hold the rows {top} to {bottom} (end exclusive) of the whole map in this "
            f"process, got {list(x.shape)}"
        )


def _described(x: Tensor | None) -> str:
    """Dtype, shape and a checksum of every bit and its place, but for the order of channels."""
    if x is None:
        return "None"
    bits = x.detach().view(_BITS[x.element_size()])
    if bits.dim() == 4:
        bits = bits.sum(1, dtype=bits.dtype)  # wraps around, as all of this
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for n, part in enumerate(bits.flatten().split(_CHUNK)):
        total = total + (part * torch.arange(1, len(part) + 1, device=x.device)).sum() * (n + 1)
    return f"{x.dtype} {list(x.shape)} with checksum {int(total)}"


def _described_but_rows(x: Tensor) -> str:
    return f"{x.dtype} {[*x.shape[:2], '...', x.shape[3]]}"
