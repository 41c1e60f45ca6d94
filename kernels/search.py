"""The search on a GPU: packs the maps, chooses an algorithm and runs it.

Three exact algorithms share everything but the middle. `slab` and `rolled` form each inner product
of pixels once or three times instead of nine times; `direct` takes any size of patch.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ttsr_fast.kernels import tiles
from ttsr_fast.kernels.box_max import slab_search
from ttsr_fast.kernels.direct_search import direct_search
from ttsr_fast.kernels.finish import finish
from ttsr_fast.kernels.operands import operands
from ttsr_fast.kernels.pack import pack
from ttsr_fast.kernels.patch_norm import patch_norm
from ttsr_fast.kernels.rolled_search import rolled_search
from ttsr_fast.kernels.tiles import Tile

ALGORITHMS = ("slab", "rolled", "direct")
DIRECT_PAIRS = 1 << 25  # of one product of 16 bits: up to which one launch is worth nine of it


def search(
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
    tile: Tile | None = None,
) -> None:
    """Launches only: nothing here waits for the device, so it can be captured in a CUDA graph.

    Raises:
        RuntimeError: the algorithm asked for by name cannot do this; the reason is in the message.
    """
    how = operands(query.dtype, precision)
    if algorithm is None:
        algorithm = choose(query, key, kernel_size, precision)
    reason = why_not(algorithm, query.dtype, kernel_size, precision)
    if reason is not None:
        raise RuntimeError(f"algorithm {algorithm!r} cannot do this search: {reason}")
    if tile is None:
        tile = tiles.tile(algorithm, how.name)
    key_options = (kernel_size, normalize != "none", eps, add_eps)
    key_mask = None if key_mask is None else key_mask.contiguous()
    with device_of(query):
        best = torch.empty_like(index)
        masks = 1 if key_mask is None else len(key_mask)
        lost = best.new_empty(max(len(key), masks), dtype=torch.int32)
        q, k = pack(query, key, best, lost, padding, how)
        if algorithm == "direct":
            direct_search(q, k, key_mask, best, lost, *key_options, how, tile)
        else:
            scale = patch_norm(k, key_mask, lost, *key_options, how.scaled)
            if algorithm == "rolled":
                rolled_search(q, k, scale, best, padding, how, tile)
            else:
                slab_search(q, k, scale, best, how, tile)
        finish(q, k, key_mask, best, lost, score, index, kernel_size, normalize, eps, add_eps, how)


def choose(query: Tensor, key: Tensor, kernel_size: int, precision: str) -> str:
    """The algorithm that is predicted to be the fastest of those that can; see bench/NOTES.md."""
    pairs = query.shape[0] * query[0, 0].numel() * key[0, 0].numel()
    how = operands(query.dtype, precision)
    one_product = how.multiplied == 1 and how.dtype != torch.float32
    order = ["rolled", "slab"] if one_product else ["slab", "rolled"]
    direct_pairs = DIRECT_PAIRS if one_product else DIRECT_PAIRS // 16
    order.insert(0 if pairs <= direct_pairs else 2, "direct")
    limits = (query.dtype, kernel_size, precision)
    return next(name for name in order if why_not(name, *limits) is None)


def why_not(algorithm: str, dtype: torch.dtype, kernel_size: int, precision: str) -> str | None:
    """Why an algorithm cannot do a search, None if it can.

    Raises:
        ValueError: there is no algorithm of that name.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {algorithm!r}")
    if algorithm != "direct" and kernel_size != 3:
        return f"it is for patches of 3x3, not of {kernel_size}x{kernel_size}"
    rounded = operands(dtype, precision).dtype != torch.float32
    if algorithm == "slab" and rounded and torch.version.hip:
        return "PyTorch has no product of 16-bit numbers with a float32 result on ROCm"
    tf32 = precision == "tf32" and dtype == torch.float32
    if tf32 and torch.version.hip and tiles.target() != "gfx942":
        return "of ROCm's targets only gfx942 has TF32"
    return None


def device_of(x: Tensor) -> AbstractContextManager[None]:
    """Launches go to the device of `x` and its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
