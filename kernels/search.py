"""Search on a GPU: packs the maps, chooses an algorithm and launches its kernels.

Three exact algorithms differ in the middle alone. `slab` forms each inner product of pixels once,
`rolled` three times, `direct` nine times, and `direct` takes patches of any size.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ttsr_fast.kernels import rolled, slab, tile_configs
from ttsr_fast.kernels.argmax import Argmax
from ttsr_fast.kernels.direct import direct_search
from ttsr_fast.kernels.key_scale import Score, allocate_scale, key_scale
from ttsr_fast.kernels.layout import Layout, Patch
from ttsr_fast.kernels.pack import allocate, pack
from ttsr_fast.kernels.precision import Precision, precision_for
from ttsr_fast.kernels.rescore import rescore
from ttsr_fast.kernels.tile_configs import TileConfig

ALGORITHMS = ("slab", "rolled", "direct")
Size = torch.Size | tuple[int, ...]

# Constants of `choose`, predicted, not yet measured (bench/NOTES.md): picoseconds per multiplied
# pair, by arithmetic unit, for one product of 256 channels.
PICOSECONDS = {
    "direct": {"tensor": 7.0, "tf32": 14.0, "float32": 92.0},
    "rolled": {"tensor": 3.5, "tf32": 6.0, "float32": 31.0},
    "slab": {"tensor": 0.8, "tf32": 1.8, "float32": 10.0},
}
BOX_PICOSECONDS = 1.2  # per pair that the second kernel of the slab reads
LAUNCHES = {"direct": 3, "rolled": 4, "slab": 4}
LAUNCH_SECONDS = 5e-6  # on the CPU
BLOCK_SECONDS = {True: 13e-6, False: 60e-6}  # per block of the slab: CUDA library, Python


class Plan(NamedTuple):
    """Precision by name, and an algorithm and a tile; None leaves the choice to the package."""

    precision: str
    algorithm: str | None = None
    tile: TileConfig | None = None


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # score and index, [N, Ho, Wo], filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    """Run all `stages`.

    Nothing here synchronises with the device, so a CUDA graph can capture the search.
    """
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        plan = Plan(precision)
        for launch in stages(query, key, key_mask, match, patch, scoring, plan).values():
            launch()


def stages(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # score and index, [N, Ho, Wo], filled
    patch: Patch,
    scoring: Score,
    plan: Plan,
) -> dict[str, Callable[[], None]]:
    """Launches of a search by name, in their order.

    They go to the current stream of the current device, which must be the device of the maps. A
    launch may be repeated once the launches before it have run, with the same result.

    Raises:
        RuntimeError: the algorithm of the plan cannot do this search; the message has the reason.
        ValueError: shapes or types with which the kernels would access memory outside of the
            tensors.
    """
    _check(query, key, key_mask, match, patch)
    precision = precision_for(query.dtype, plan.precision)
    algorithm = plan.algorithm or choose(query, key, patch, plan.precision)
    reason = why_not(algorithm, query.dtype, patch.kernel_size, plan.precision)
    if reason is not None:
        raise RuntimeError(f"algorithm {algorithm!r} cannot do this search: {reason}")
    tile = plan.tile or tile_configs.select(algorithm, precision.name)
    q_layout, k_layout = layouts(query.shape, key.shape, patch, algorithm, tile)
    q, k = allocate(query, q_layout, precision), allocate(key, k_layout, precision)
    words, images = torch.empty_like(match[1]), len(key)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        images = max(images, len(key_mask))
    argmax = Argmax(words, words.new_empty(images, dtype=torch.int32))
    launches: dict[str, Callable[[], None]] = {
        "pack": partial(pack, query, key, q, k, argmax, patch.padding)
    }
    if algorithm == "direct":
        launches["direct"] = partial(direct_search, q, k, key_mask, argmax, scoring, tile)
    else:
        scale = allocate_scale(k, images, slab.SLOTS if algorithm == "slab" else tile.block_k)
        launches["key_scale"] = partial(key_scale, k, key_mask, scale, argmax, scoring)
        launches[algorithm] = (
            partial(slab.slab_search, q, k, scale, argmax, tile)
            if algorithm == "slab"
            else partial(rolled.rolled_search, q, k, scale, argmax, patch.padding, tile)
        )
    launches["rescore"] = partial(rescore, q, k, key_mask, argmax, match, scoring)
    return launches


def _check(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    match: tuple[Tensor, Tensor],
    patch: Patch,
) -> None:
    score, index = match
    valid = (
        query.dim() == key.dim() == 4
        and patch.kernel_size in (1, 3, 5, 7)
        and 0 <= patch.padding <= patch.kernel_size // 2
        and query.dtype == key.dtype
        and query.shape[1] == key.shape[1] > 0
        and key.shape[0] in (1, query.shape[0])
        and min(*patch.grid(*query.shape[2:]), *patch.grid(*key.shape[2:])) > 0
        and (index.dtype, score.dtype) == (torch.int64, torch.float32)
        and index.is_contiguous()
        and score.is_contiguous()
        and score.shape == index.shape == (query.shape[0], *patch.grid(*query.shape[2:]))
    )
    if valid and key_mask is not None:
        valid = (
            key_mask.dtype == torch.bool
            and key_mask.shape[1:] == patch.grid(*key.shape[2:])
            and key_mask.shape[0] in (1, query.shape[0])
        )
    tensors = [x for x in (query, key, key_mask, score, index) if x is not None]
    if not valid or len({x.device for x in tensors}) > 1:
        found = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in tensors]
        raise ValueError(
            f"query, key, key_mask, score and index do not fit each other with kernel_size "
            f"{patch.kernel_size} and padding {patch.padding}: {'; '.join(found)}"
        )


def layouts(
    query: Size,  # N, C, H, W
    key: Size,  # N or 1, C, HK, WK
    patch: Patch,
    algorithm: str,
    tile: TileConfig,
) -> tuple[Layout, Layout]:
    """Layouts of both packed maps."""
    queries, keys = patch.grid(*query[2:]), patch.grid(*key[2:])
    if algorithm == "slab":
        return slab.layouts(queries, keys)
    if algorithm == "rolled":
        return rolled.layouts(queries, keys, patch.padding, tile)
    halo = patch.kernel_size - 1
    return Layout(*queries, halo), Layout(*keys, halo)


def padded_pairs(
    query: Size,  # N, C, H, W
    key: Size,  # N or 1, C, HK, WK
    patch: Patch,
    algorithm: str,
    tile: TileConfig,
) -> int:
    """Multiplied pairs of pixels, or of patches for `direct`, padding of tiles included."""
    q, k = layouts(query, key, patch, algorithm, tile)
    if algorithm == "slab":
        return slab.Blocks(q, k, query[0]).multiplied_pairs
    if algorithm == "rolled":
        return query[0] * rolled.multiplied_pairs(q, k, patch.padding, tile)
    sizes = ((q, tile.block_q), (k, tile.block_k))
    rows = [-(-x.height * x.line // block) * block for x, block in sizes]
    return query[0] * rows[0] * rows[1]


def choose(query: Tensor, key: Tensor, patch: Patch, precision: str) -> str:
    """Algorithm with the least predicted time among the algorithms that can do this search."""
    dtype, size = query.dtype, patch.kernel_size
    possible = [x for x in ALGORITHMS if why_not(x, dtype, size, precision) is None]
    if len(possible) == 1:
        return possible[0]
    storage = precision_for(dtype, precision)
    shapes = (tuple(query.shape), tuple(key.shape), patch)
    in_cuda = slab.has_cuda_kernel(query)
    times = {
        x: predicted_seconds(*shapes, x, tile_configs.select(x, storage.name), storage, in_cuda)
        for x in possible
    }
    return min(times, key=times.__getitem__)


@lru_cache(maxsize=1024)
def predicted_seconds(
    query: Size,  # N, C, H, W
    key: Size,  # N or 1, C, HK, WK
    patch: Patch,
    algorithm: str,
    tile: TileConfig,
    precision: Precision,
    in_cuda: bool,  # the CUDA library runs the slab
) -> float:
    """Predicted time of a search with patches of 3x3: its launches and its multiplied pairs."""
    unit = precision.name if precision.name in ("tf32", "float32") else "tensor"
    picoseconds = PICOSECONDS[algorithm][unit] * precision.products * max(query[1], 64) / 256
    pairs = padded_pairs(query, key, patch, algorithm, tile)
    seconds = LAUNCHES[algorithm] * LAUNCH_SECONDS
    if algorithm != "slab":
        return seconds + pairs * picoseconds * 1e-12
    blocks = slab.Blocks(*layouts(query, key, patch, algorithm, tile), query[0])
    gpu = (pairs * picoseconds + blocks.read_pairs * BOX_PICOSECONDS) * 1e-12
    return seconds + max(gpu, blocks.count * BLOCK_SECONDS[in_cuda])


def why_not(algorithm: str, dtype: torch.dtype, kernel_size: int, precision: str) -> str | None:
    """Reason why an algorithm cannot do a search, None if it can.

    Raises:
        ValueError: there is no algorithm of that name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    if algorithm != "direct" and kernel_size != 3:
        return f"it is for patches of 3x3, not of {kernel_size}x{kernel_size}"
    rounded = precision_for(dtype, precision).dtype != torch.float32
    if algorithm == "slab" and rounded and torch.version.hip:
        return "PyTorch has no product of 16-bit numbers with a float32 result on ROCm"
    tf32 = precision == "tf32" and dtype == torch.float32
    if tf32 and torch.version.hip and tile_configs.target() != "gfx942":
        return "of ROCm's targets only gfx942 has TF32"
    return None
