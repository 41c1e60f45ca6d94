"""The search on a GPU: packs the maps, chooses an algorithm and runs it.

Three exact algorithms share everything but the middle. `slab` and `rolled` form each inner product
of pixels once or three times instead of nine times; `direct` takes any size of patch.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial

import torch
from torch import Tensor

from ttsr_fast.kernels import rolled, slab, tile_configs
from ttsr_fast.kernels.direct import direct_search
from ttsr_fast.kernels.key_scale import allocate_scale, key_scale
from ttsr_fast.kernels.layout import Layout
from ttsr_fast.kernels.pack import allocate, pack
from ttsr_fast.kernels.precision import Precision, precision_for
from ttsr_fast.kernels.rescore import rescore
from ttsr_fast.kernels.tile_configs import TileConfig

ALGORITHMS = ("slab", "rolled", "direct")
Size = torch.Size | tuple[int, ...]

# What `choose` compares. Predicted, until a GPU has measured them (bench/NOTES.md): picoseconds per
# pair that goes through the products, by the units that multiply, for one product of 256 channels.
PICOSECONDS = {
    "direct": {"tensor": 7.0, "tf32": 14.0, "float32": 92.0},
    "rolled": {"tensor": 3.5, "tf32": 6.0, "float32": 31.0},
    "slab": {"tensor": 0.8, "tf32": 1.8, "float32": 10.0},
}
BOX_PICOSECONDS = 1.2  # per pair that the walks of the slab read
LAUNCHES = {"direct": 3, "rolled": 4, "slab": 4}
LAUNCH_SECONDS = 5e-6  # of the CPU
BLOCK_SECONDS = {True: 13e-6, False: 60e-6}  # per block of the slab: by the CUDA library, in Python


def search(
    query: Tensor, *arguments, algorithm: str | None = None, tile: TileConfig | None = None
) -> None:
    """Run all `stages`, which take the same arguments.

    Launches only: nothing here synchronises with the device, so it can be captured in a CUDA graph.
    """
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        for stage in stages(query, *arguments, algorithm=algorithm, tile=tile).values():
            stage()


def stages(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    score: Tensor,  # [N, Ho, Wo], filled
    index: Tensor,  # [N, Ho, Wo], filled
    kernel_size: int,
    padding: int,
    normalize: str,
    eps: float,
    add_eps: bool,
    precision: str,
    *,
    algorithm: str | None = None,
    tile: TileConfig | None = None,
) -> dict[str, Callable[[], None]]:
    """The launches of a search by name, in the order in which they have to run.

    They go to the current device, which has to be the one of the maps, and its current stream. Each
    may be repeated once those before it have run, and gives the same result again.

    Raises:
        RuntimeError: the algorithm asked for by name cannot do this; the reason is in the message.
        ValueError: shapes or types with which the kernels would reach outside of the tensors.
    """
    _check(query, key, key_mask, score, index, kernel_size, padding)
    how = precision_for(query.dtype, precision)
    if algorithm is None:
        algorithm = choose(query, key, kernel_size, padding, precision)
    reason = why_not(algorithm, query.dtype, kernel_size, precision)
    if reason is not None:
        raise RuntimeError(f"algorithm {algorithm!r} cannot do this search: {reason}")
    if tile is None:
        tile = tile_configs.select(algorithm, how.name)
    key_options = (kernel_size, normalize != "none", eps, add_eps)
    key_mask = None if key_mask is None else key_mask.contiguous()
    grids = (query.shape[2:], key.shape[2:])
    q, k = (
        allocate(x, layout, how)
        for x, layout in zip(
            (query, key), layouts(*grids, algorithm, tile, kernel_size, padding), strict=True
        )
    )
    argmax = torch.empty_like(index)
    masks = 1 if key_mask is None else len(key_mask)
    first_nonfinite_key = argmax.new_empty(max(len(key), masks), dtype=torch.int32)
    launches: dict[str, Callable[[], None]] = {
        "pack": partial(pack, query, key, q, k, argmax, first_nonfinite_key, padding, how)
    }
    if algorithm == "direct":
        launches["direct"] = partial(
            direct_search, q, k, key_mask, argmax, first_nonfinite_key, *key_options, how, tile
        )
    else:
        scale = allocate_scale(
            k, len(first_nonfinite_key), slab.SLOTS if algorithm == "slab" else tile.block_k
        )
        launches["key_scale"] = partial(
            key_scale, k, key_mask, scale, first_nonfinite_key, *key_options, how.scaled
        )
        launches[algorithm] = (
            partial(slab.slab_search, q, k, scale, argmax, how, tile)
            if algorithm == "slab"
            else partial(rolled.rolled_search, q, k, scale, argmax, padding, how, tile)
        )
    options = (kernel_size, normalize, eps, add_eps, how)
    launches["rescore"] = partial(
        rescore, q, k, key_mask, argmax, first_nonfinite_key, score, index, *options
    )
    return launches


def _check(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    score: Tensor,
    index: Tensor,
    kernel_size: int,
    padding: int,
) -> None:
    shrink = kernel_size - 1 - 2 * padding
    right = (
        query.dim() == key.dim() == 4
        and kernel_size in (1, 3, 5, 7)
        and 0 <= padding <= kernel_size // 2
        and query.dtype == key.dtype
        and query.shape[1] == key.shape[1] > 0
        and key.shape[0] in (1, query.shape[0])
        and min(*query.shape[2:], *key.shape[2:]) > shrink
        and (index.dtype, score.dtype) == (torch.int64, torch.float32)
        and index.is_contiguous()
        and score.is_contiguous()
    )
    if right:
        grid, keys = (tuple(size - shrink for size in x.shape[2:]) for x in (query, key))
        right = score.shape == index.shape == (query.shape[0], *grid)
        if key_mask is not None:
            right = right and key_mask.dtype == torch.bool and key_mask.shape[1:] == keys
            right = right and key_mask.shape[0] in (1, query.shape[0])
    tensors = [x for x in (query, key, key_mask, score, index) if x is not None]
    if not right or len({x.device for x in tensors}) > 1:
        found = [f"{list(x.shape)} {x.dtype} on {x.device}" for x in tensors]
        raise ValueError(
            f"query, key, key_mask, score and index do not fit each other with kernel_size "
            f"{kernel_size} and padding {padding}: {'; '.join(found)}"
        )


def layouts(
    query: Size, key: Size, algorithm: str, tile: TileConfig, kernel_size: int, padding: int
) -> tuple[Layout, Layout]:
    """How the packed maps of two images of these heights and widths lie in memory."""
    halo = kernel_size - 1
    grids = [tuple(n + 2 * padding - halo for n in size) for size in (query, key)]
    if algorithm == "slab":
        return slab.layouts(*grids)
    if algorithm == "rolled":
        return rolled.layouts(*grids, padding, tile)
    return Layout(*grids[0], halo), Layout(*grids[1], halo)


def padded_pairs(
    query: Size, key: Size, algorithm: str, tile: TileConfig, kernel_size: int = 3, padding: int = 1
) -> int:
    """Pairs of pixels that are multiplied, or of patches by `direct`, fillings of tiles included.

    Args:
        query: size of the query map, [N, C, H, W].
        key: size of the key map.
        algorithm: one of `ALGORITHMS`.
        tile: of the algorithm.
        kernel_size: of a patch.
        padding: around both maps.
    """
    q, k = layouts(query[2:], key[2:], algorithm, tile, kernel_size, padding)
    if algorithm == "slab":
        return slab.Blocks(q, k, query[0]).multiplied_pairs
    if algorithm == "rolled":
        return query[0] * rolled.multiplied_pairs(q, k, padding, tile)
    sizes = ((q, tile.block_q), (k, tile.block_k))
    rows = [-(-x.height * x.line // block) * block for x, block in sizes]
    return query[0] * rows[0] * rows[1]


def choose(query: Tensor, key: Tensor, kernel_size: int, padding: int, precision: str) -> str:
    """The algorithm with the least predicted time among those that can do this search."""
    how = precision_for(query.dtype, precision)
    able = [x for x in ALGORITHMS if why_not(x, query.dtype, kernel_size, precision) is None]
    if len(able) == 1:
        return able[0]
    sizes = (tuple(query.shape), tuple(key.shape))
    compiled = slab.has_cuda_kernel(query)
    times = {
        x: predicted_seconds(x, *sizes, padding, how, tile_configs.select(x, how.name), compiled)
        for x in able
    }
    return min(times, key=times.__getitem__)


@lru_cache(maxsize=1024)
def predicted_seconds(
    algorithm: str,
    query: Size,
    key: Size,
    padding: int,
    how: Precision,
    tile: TileConfig,
    compiled: bool,  # whether the slab runs in the CUDA library
) -> float:
    """Time of a search by patches of 3x3: its launches, and the pairs that it multiplies."""
    unit = how.name if how.name in ("tf32", "float32") else "tensor"
    picoseconds = PICOSECONDS[algorithm][unit] * how.multiplied * max(query[1], 64) / 256
    pairs = padded_pairs(query, key, algorithm, tile, 3, padding)
    seconds = LAUNCHES[algorithm] * LAUNCH_SECONDS
    if algorithm != "slab":
        return seconds + pairs * picoseconds * 1e-12
    blocks = slab.Blocks(*layouts(query[2:], key[2:], algorithm, tile, 3, padding), query[0])
    gpu = (pairs * picoseconds + blocks.read_pairs * BOX_PICOSECONDS) * 1e-12
    return seconds + max(gpu, blocks.count * BLOCK_SECONDS[compiled])


def why_not(algorithm: str, dtype: torch.dtype, kernel_size: int, precision: str) -> str | None:
    """Why an algorithm cannot do a search, None if it can.

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
