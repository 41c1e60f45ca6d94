"""The candidates of the search: from feature maps to score and index, all preparation included."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import CPU
from registry import OPERANDS, Candidate, Size, matmul_precision, noise, products_of
from torch import Tensor

from ttsr_fast import functional, reference
from ttsr_fast.operators.patch import Patch

Match = tuple[Tensor, Tensor]  # score [N, H, W], index [N, H, W]
Search = Callable[[Tensor, Tensor], Match]
BLOCK_BYTES = 64 << 20  # of scores held at a time by the chunked product
PATCH, PIXELS = Patch(3, 1), 9
# Operands, and the number of their products, of a precision of this package.
PRECISIONS = {
    "fp32": ("float32", 1),
    "fp16x3": ("float16", 3),
    "tf32": ("tf32", 1),
    "fp16": ("float16", 1),
    "bf16": ("bfloat16", 1),
}
# Inner products of channels per pair; patches share those of their pixels, or those of three rows.
ALGORITHMS = {"slab": 1, "rolled": 3, "direct": PIXELS}
# Relative error of rounding: half a unit in the last place, or a whole one where digits
# are truncated.
ROUNDING = {"tf32": 2**-10, "float16": 2**-11, "bfloat16": 2**-8}


def _candidate(label: str, search: Search, **options: Any) -> Candidate:
    return Candidate(label, lambda query, key: partial(search, query, key), **options)


# --- this package ---


def choice_tolerance(precision: str) -> float:
    """Largest loss of a choice below the maximum: two pairs of rounded patches are compared."""
    operands, parts = PRECISIONS[precision]
    exact = operands not in ROUNDING or parts > 1
    return Candidate.tolerance if exact else 4 * ROUNDING[operands]


def _ours(backend: str, precision: str, *devices: str, graph: bool = False) -> Candidate:
    operands, parts = PRECISIONS[precision]
    return _candidate(
        f"{backend} {precision}{', graph' * graph}",
        partial(functional.search, backend=backend, precision=precision),
        devices=devices,
        products=parts,
        operands=operands,
        tolerance=choice_tolerance(precision),
        backend=backend,
        precision=precision,
        graph=graph,
    )


def resolved(
    candidate: Candidate,
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, C, HK, WK]
) -> Candidate:
    """The candidate with what its backend chooses for these maps, on this processor."""
    if candidate.backend == "cpp":
        bfloat16 = candidate.precision == "bf16"
        products = torch.ops.ttsr_fast.cpp_bfloat16_products(query, key, bfloat16)
        operands = "bfloat16" if products else "float32"
        return replace(candidate, operands=operands, products=products or 1)
    if candidate.backend != "triton":
        return candidate
    from ttsr_fast.kernels import search as kernel_search

    algorithm = kernel_search.choose(query, key, PATCH, candidate.precision)
    products = ALGORITHMS[algorithm] * PRECISIONS[candidate.precision][1]
    return replace(candidate, algorithm=algorithm, products=products)


# --- baselines ---


def _copies_bytes(queries: int, keys: int, size: Size, operation: str) -> int:
    """Copies of the unfolded maps of an image in float32."""
    return 4 * PIXELS * size.channels * (queries * size.queries + keys * size.keys)


def _each_image(search: Search) -> Search:
    """A search of single images, for batches."""

    def run(query: Tensor, key: Tensor) -> Match:
        images = zip(query.split(1), key.split(1), strict=True)
        scores, indices = zip(*(search(q, k) for q, k in images), strict=True)
        return torch.cat(scores), torch.cat(indices)

    return run


def _unfold(query: Tensor, key: Tensor, operands: str) -> Match:
    """The oracle in products of these operands."""
    with products_of(operands):
        score, index = reference.search(*(x.to(OPERANDS[operands]) for x in (query, key)))
    return score.float(), index


def unfold_bytes(size: Size, operation: str) -> int:
    """All scores and all unfolded features."""
    return size.batch * _copies_bytes(1, 1, size, operation) + 4 * size.pairs


@cache
def _compiled_reference() -> Search:
    return torch.compile(reference.search)


def _compiled(query: Tensor, key: Tensor) -> Match:
    with matmul_precision("highest"):
        return _compiled_reference()(query, key)


def _chunked(query: Tensor, key: Tensor) -> Match:
    """Unfold, bmm and maximum of a block of small images, or of query rows of one image."""
    batch, channels, height, width = query.shape
    image = Size((height, width), (key.shape[2], key.shape[3]), channels=channels)
    images = max(1, BLOCK_BYTES // unfold_bytes(image, "search"))
    rows = max(1, BLOCK_BYTES // (4 * width * image.keys))
    score = query.new_empty(batch, height, width)
    index = torch.empty_like(score, dtype=torch.int64)
    for n in range(0, batch, images):
        some = slice(n, n + images)
        keys = F.normalize(F.unfold(key[some], 3, padding=1), dim=1).mT  # [n, Nk, C*9]
        padded = F.pad(query[some], [1] * 4)
        for y in range(0, height, rows):
            block = F.normalize(F.unfold(padded[:, :, y : y + rows + 2], 3), dim=1)
            with matmul_precision("highest"):
                value, where = (keys @ block).max(dim=1)
            score[some, y : y + rows] = value.unflatten(1, (-1, width))
            index[some, y : y + rows] = where.unflatten(1, (-1, width))
    return score, index


def _rows(x: Tensor) -> Tensor:  # [1, C, H, W] -> [H*W, C*9]
    return F.normalize(F.unfold(x, 3, padding=1)[0], dim=0).T.contiguous()


def _by_rows(search: Callable[[Tensor, Tensor], Match]) -> Search:
    """A library's search of rows, for feature maps."""

    def run(query: Tensor, key: Tensor) -> Match:
        score, index = search(_rows(query), _rows(key))
        grid = (1, *query.shape[2:])
        return score.view(grid), index.view(grid)

    return _each_image(run)


def _faiss(queries: Tensor, keys: Tensor) -> Match:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.numpy())
    score, found = index.search(queries.numpy(), 1)
    return torch.from_numpy(score), torch.from_numpy(found)


def _keops(queries: Tensor, keys: Tensor) -> Match:
    os.environ.update(KEOPS_VERBOSE="0", PYKEOPS_VERBOSE="0")  # read at import
    from pykeops.torch import LazyTensor

    backend = "CPU" if queries.device.type == "cpu" else "GPU"
    product = LazyTensor(queries[:, None, :]) | LazyTensor(keys[None, :, :])
    return product.max_argmax(dim=1, backend=backend)


def _baseline(label: str, search: Search, bytes_needed: Any, **options: Any) -> Candidate:
    return _candidate(label, search, baseline=True, bytes_needed=bytes_needed, **options)


def _rounded(operands: str, roundings: int) -> dict[str, Any]:
    """Options of a baseline on a GPU that allows for that many roundings on the way to a score."""
    tolerance = roundings * ROUNDING[operands]
    options = {"tolerance": 2 * tolerance, "score_tolerance": tolerance}
    return {"devices": ("cuda",), "operands": operands, **options}


IN_TF32 = _rounded("tf32", 2)
IN_FP16 = _rounded("float16", 8)  # of features, norms, quotients and the score: seven at most
ROWS = partial(_copies_bytes, 3, 3)
CANDIDATES = {
    "cpp-fp32": _ours("cpp", "fp32", "cpu"),
    "cpp-bf16": _ours("cpp", "bf16", "cpu"),
    **{f"triton-{precision}": _ours("triton", precision, "cuda") for precision in PRECISIONS},
    "torch-fp32": _ours("torch", "fp32", "cpu", "cuda"),
    **{
        f"triton-{precision}-graph": _ours("triton", precision, "cuda", graph=True)
        for precision in ("fp32", "fp16x3", "fp16")
    },
    "unfold": _baseline("unfold + bmm", partial(_unfold, operands="float32"), unfold_bytes),
    "unfold-tf32": _baseline(
        "unfold + bmm, TF32", partial(_unfold, operands="tf32"), unfold_bytes, **IN_TF32
    ),
    "unfold-fp16": _baseline(
        "unfold + bmm, fp16", partial(_unfold, operands="float16"), unfold_bytes, **IN_FP16
    ),
    "chunked": _baseline("in chunks", _chunked, partial(_copies_bytes, 0, 2)),
    "compile": _baseline(
        "torch.compile", _compiled, unfold_bytes, compiled=True, devices=("cuda",)
    ),
    "faiss": _baseline("FAISS flat", _by_rows(_faiss), ROWS, package="faiss", devices=("cpu",)),
    "keops": _baseline("KeOps", _by_rows(_keops), ROWS, package="pykeops"),
}


def maps(size: Size, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Normally distributed feature maps, the same in every process and on every device."""
    normal = noise(device)
    q, k = (normal(size.batch, size.channels, *grid) for grid in (size.query, size.key))
    return q, k
