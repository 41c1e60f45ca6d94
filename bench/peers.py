"""The ways of searching that `search.py` compares: the backends of this package and their peers.

Every candidate starts from the two feature maps and ends with score and index as tensors, so what a
peer needs before it can search (unfolding, normalising, an index) is part of its time and memory.

flash-kmeans is left out: its assignment takes vectors of a power of two of numbers, held in shared
memory whole, and a patch has 2304.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from devices import CPU
from harness import OPERANDS, Declined, Run, matmul_precision, products_of
from sizes import Size
from torch import Tensor

from ttsr_fast import functional, reference
from ttsr_fast.operators import backends, library
from ttsr_fast.operators.patch import Patch, Score

Found = tuple[Tensor, Tensor]  # score [N, H, W], index [N, H, W]
BLOCK_BYTES = 64 << 20  # of scores held at a time by the chunked product
PATCH = 9
# Operands and number of products of them that a precision of this package takes.
PRECISIONS = {
    "fp32": ("float32", 1),
    "fp16x3": ("float16", 3),
    "tf32": ("tf32", 1),
    "fp16": ("float16", 1),
    "bf16": ("bfloat16", 1),
}
# Inner products of channels per pair; patches share those of their pixels, or those of three rows.
ALGORITHMS = {"slab": 1, "rolled": 3, "direct": PATCH}
EXACT = 1e-6
# By how much rounding to these turns a vector: half a unit in the last place, or, where hardware
# cuts digits off, a whole one.
ROUNDING = {"tf32": 2**-10, "float16": 2**-11, "bfloat16": 2**-8}


@dataclass(frozen=True)
class Candidate:
    """One way of searching.

    Attributes:
        label: for tables.
        search: from `[N, C, H, W]` and `[N, C, HK, WK]` to score and index.
        why_not: why it cannot run on a device, None if it can.
        bytes_needed: an estimate from size and channels; what does not fit is not tried.
        devices: on which kinds it is measured unless others are asked for by name.
        products: inner products of channels it computes per pair, 1 over pixels or 9 over patches;
            of the Triton backend only once it has chosen (`resolved`).
        operands: what its matrix product multiplies.
        tolerance: how far the chosen key may score below the maximum.
        score_tolerance: how far a score may lie from that of the key chosen.
        backend: of this package, None for a peer.
        algorithm: of that backend, None where it chooses.
        precision: as in `ttsr_fast.search`.
        graph: whether it is replayed from a CUDA graph.
    """

    label: str
    search: Callable[[Tensor, Tensor], Found]
    why_not: Callable[[torch.device], str | None]
    bytes_needed: Callable[[Size, int], int]
    devices: tuple[str, ...] = ("cpu", "cuda")
    products: int = PATCH
    operands: str = "float32"
    tolerance: float = EXACT
    score_tolerance: float = EXACT
    backend: str | None = None
    algorithm: str | None = None
    precision: str = "fp32"
    graph: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What its operands are stored in."""
        return OPERANDS[self.operands]


# --- this package ---


def choice_tolerance(precision: str) -> float:
    """How far below the maximum the choice of a precision of this package may score.

    Rounding turns each patch of a pair, and both the chosen and the best pair may be misjudged by
    that. fp16x3 keeps what rounding takes away.
    """
    operands, parts = PRECISIONS[precision]
    return 4 * ROUNDING[operands] if operands in ROUNDING and parts == 1 else EXACT


def _ours(backend: str, precision: str, devices: tuple[str, ...]) -> Candidate:
    operands, parts = PRECISIONS[precision]
    return Candidate(
        label=f"{backend} {precision}",
        search=lambda q, k: functional.search(q, k, backend=backend, precision=precision),
        why_not=lambda device: backends.why_not(backend, device),
        bytes_needed=_linear_bytes,
        devices=devices,
        products=parts,
        operands=operands,
        tolerance=choice_tolerance(precision),
        backend=backend,
        precision=precision,
    )


def _linear_bytes(size: Size, channels: int) -> int:
    return 12 * channels * size.batch * (size.queries + size.keys) + (256 << 20)


def algorithm_search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, C, HK, WK]
    algorithm: str,
    precision: str,
    tile: object = None,
) -> Found:
    """One algorithm of the Triton backend by name, with 3x3 patches as everything here."""
    from ttsr_fast.kernels import search as kernel_search

    if query.is_cuda:
        library.load_cuda_library()
    reason = kernel_search.why_not(algorithm, query.dtype, 3, precision)
    if reason is not None:
        raise Declined(reason)
    n, _, h, w = query.shape
    score = query.new_empty(n, h, w, dtype=torch.float32)
    index = torch.empty_like(score, dtype=torch.int64)
    plan = kernel_search.Plan(precision, algorithm, tile)
    launches = kernel_search.stages(query, key, None, (score, index), Patch(3, 1), Score(), plan)
    for launch in launches.values():
        launch()
    return score, index


def resolved(
    candidate: Candidate,
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, C, HK, WK]
) -> Candidate:
    """The candidate with the algorithm that the Triton backend chooses for these maps."""
    if candidate.backend != "triton" or candidate.algorithm is not None:
        return candidate
    from ttsr_fast.kernels import search as kernel_search

    algorithm = kernel_search.choose(query, key, Patch(3, 1), candidate.precision)
    products = ALGORITHMS[algorithm] * PRECISIONS[candidate.precision][1]
    return replace(candidate, algorithm=algorithm, products=products)


def _algorithm(algorithm: str, precision: str) -> Candidate:
    ours = _ours("triton", precision, ("cuda",))
    return replace(
        ours,
        label=f"{algorithm} {precision}",
        search=lambda q, k: algorithm_search(q, k, algorithm, precision),
        products=ALGORITHMS[algorithm] * PRECISIONS[precision][1],
        algorithm=algorithm,
    )


def _graph(candidate: Candidate) -> Candidate:
    return replace(candidate, label=f"{candidate.label}, graph", graph=True)


# --- peers ---


def _patches_bytes(n: int, c: int) -> int:
    """An unfolded map in float32."""
    return 4 * PATCH * c * n


def _each_image(search: Callable[[Tensor, Tensor], Found]) -> Callable[[Tensor, Tensor], Found]:
    """A search of single images, for batches."""

    def run(query: Tensor, key: Tensor) -> Found:
        images = zip(query.split(1), key.split(1), strict=True)
        found = [search(q, k) for q, k in images]
        if len(found) == 1:
            return found[0]
        scores, indices = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(indices)

    return run


def _unfold(operands: str) -> Callable[[Tensor, Tensor], Found]:
    """The oracle in products of those operands."""

    def run(query: Tensor, key: Tensor) -> Found:
        with products_of(operands):
            score, index = reference.search(
                query.to(OPERANDS[operands]), key.to(OPERANDS[operands])
            )
        return score.float(), index

    return run


def _unfold_bytes(size: Size, channels: int) -> int:
    patches = _patches_bytes(size.batch * (size.queries + size.keys), channels)
    return patches + 4 * size.pairs


@cache
def _compiled_reference() -> Callable[[Tensor, Tensor], Found]:
    return torch.compile(reference.search)


def _compiled(query: Tensor, key: Tensor) -> Found:
    with matmul_precision("highest"):
        return _compiled_reference()(query, key)


def _chunked(query: Tensor, key: Tensor) -> Found:
    """Unfolded keys times blocks of unfolded query rows."""
    keys = F.normalize(F.unfold(key, 3, padding=1), dim=1)[0].T  # [Nk, C*9]
    height, width = query.shape[2:]
    rows = max(1, BLOCK_BYTES // (4 * width * len(keys)))
    padded = F.pad(query, [1] * 4)
    score = query.new_empty(1, height, width)
    index = torch.empty_like(score, dtype=torch.int64)
    for y in range(0, height, rows):
        block = F.normalize(F.unfold(padded[:, :, y : y + rows + 2], 3), dim=1)[0]
        with matmul_precision("highest"):
            value, where = (keys @ block).max(dim=0)
        score[0, y : y + rows] = value.view(-1, width)
        index[0, y : y + rows] = where.view(-1, width)
    return score, index


def _rows(x: Tensor) -> Tensor:  # [1, C, H, W] -> [H*W, C*9]
    return F.normalize(F.unfold(x, 3, padding=1)[0], dim=0).T.contiguous()


def _rows_bytes(size: Size, channels: int) -> int:
    return 3 * _patches_bytes(size.queries + size.keys, channels)


def _faiss(query: Tensor, key: Tensor) -> Found:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    keys = faiss.IndexFlatIP(PATCH * key.shape[1])
    keys.add(_rows(key).numpy())
    score, index = keys.search(_rows(query).numpy(), 1)
    grid = (1, *query.shape[2:])
    return torch.from_numpy(score).view(grid), torch.from_numpy(index).view(grid)


def _keops(query: Tensor, key: Tensor) -> Found:
    os.environ.update(KEOPS_VERBOSE="0", PYKEOPS_VERBOSE="0")  # read when it is imported
    from pykeops.torch import LazyTensor

    queries, keys = LazyTensor(_rows(query)[:, None, :]), LazyTensor(_rows(key)[None, :, :])
    backend = "CPU" if query.device.type == "cpu" else "GPU"
    score, index = (queries | keys).max_argmax(dim=1, backend=backend)
    grid = (1, *query.shape[2:])
    return score.view(grid), index.view(grid)


def _flashlib(query: Tensor, key: Tensor) -> Found:
    """The nearest of unit vectors, whose squared distance is 2 - 2 times their cosine."""
    from flashlib import flash_knn

    queries, keys = (_rows(x).half() for x in (query, key))
    distance, index = flash_knn(queries, keys, 1)
    grid = (1, *query.shape[2:])
    return 1 - distance.float().view(grid) / 2, index.long().view(grid)


def _needs(module: str, package: str) -> Callable[[torch.device], str | None]:
    return lambda device: None if find_spec(module) else f"{package} is not installed"


def _always(device: torch.device) -> None:
    return None


# The gate of a peer that computes in less: every rounding on the way to its score, of features,
# norms, quotients and the score itself, seven at most, is allowed for.
_IN_TF32 = {"operands": "tf32", "score_tolerance": 2 * ROUNDING["tf32"]}
_IN_FP16 = {"operands": "float16", "score_tolerance": 8 * ROUNDING["float16"]}
_IN_TF32["tolerance"], _IN_FP16["tolerance"] = (
    2 * options["score_tolerance"] for options in (_IN_TF32, _IN_FP16)
)

ORACLE = "unfold"
OURS = {
    "cpp-fp32": _ours("cpp", "fp32", ("cpu",)),
    "cpp-bf16": _ours("cpp", "bf16", ("cpu",)),
    **{f"triton-{precision}": _ours("triton", precision, ("cuda",)) for precision in PRECISIONS},
    **{
        f"{algorithm}-{precision}": _algorithm(algorithm, precision)
        for algorithm in ALGORITHMS
        for precision in ("fp16", "fp16x3")
    },
    "torch-fp32": _ours("torch", "fp32", ("cpu", "cuda")),
}
OURS |= {
    f"{name}-graph": _graph(OURS[name]) for name in ("triton-fp32", "triton-fp16x3", "triton-fp16")
}
PEERS = {
    ORACLE: Candidate("unfold + bmm", _unfold("float32"), _always, _unfold_bytes),
    "unfold-tf32": Candidate(
        "unfold + bmm, TF32",
        _unfold("tf32"),
        _always,
        _unfold_bytes,
        devices=("cuda",),
        **_IN_TF32,
    ),
    "unfold-fp16": Candidate(
        "unfold + bmm, fp16",
        _unfold("float16"),
        _always,
        lambda size, channels: _unfold_bytes(size, channels) // 2,
        devices=("cuda",),
        **_IN_FP16,
    ),
    "chunked": Candidate(
        "in chunks",
        _each_image(_chunked),
        _always,
        lambda size, channels: 2 * _patches_bytes(size.keys, channels) + BLOCK_BYTES,
    ),
    "compile": Candidate("torch.compile", _compiled, _always, _unfold_bytes, devices=("cuda",)),
    "faiss": Candidate(
        "FAISS flat",
        _each_image(_faiss),
        lambda device: (
            _needs("faiss", "faiss-cpu")(device) if device.type == "cpu" else "it is for the CPU"
        ),
        _rows_bytes,
        devices=("cpu",),
    ),
    "keops": Candidate("KeOps", _each_image(_keops), _needs("pykeops", "pykeops"), _rows_bytes),
    "flashlib": Candidate(
        "flashlib, fp16",
        _each_image(_flashlib),
        _needs("flashlib", "flashlib"),
        _rows_bytes,
        devices=("cuda",),
        **_IN_FP16,
    ),
}
ALL = {**OURS, **PEERS}


def names_for(candidates: dict[str, Candidate], device: torch.device) -> list[str]:
    """Those that are measured on a device unless others are asked for."""
    return [name for name, c in candidates.items() if device.type in c.devices]


def maps(size: Size, channels: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Normally distributed feature maps, the same in every process and on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    q, k = (
        torch.randn(size.batch, channels, *grid, generator=generator, device="cpu").to(device)
        for grid in (size.query, size.key)
    )
    return q, k


def job(name: str, size: Size, channels: int) -> tuple[Run, Callable[[], Run]]:
    """A candidate's run on tiny maps and a function that prepares the measured one."""
    search = ALL[name].search

    def prepare(size: Size) -> Run:
        q, k = maps(size, channels)
        return lambda: search(q, k)

    return prepare(Size((4, 4), (4, 4))), lambda: prepare(size)
