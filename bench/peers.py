"""The ways of searching that `search.py` compares: the backends of this package and their peers.

Every candidate starts from the two feature maps and ends with score and index as tensors, so what a
peer needs before it can search (unfolding, normalising, an index) is part of its time and memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from harness import Run
from torch import Tensor

from ttsr_fast import backends, functional, reference

Found = tuple[Tensor, Tensor]  # score [1, H, W], index [1, H, W]
BLOCK_BYTES = 64 << 20  # of scores held at a time by the chunked product
PATCH = 9


@dataclass(frozen=True)
class Candidate:
    """One way of searching.

    Attributes:
        label: for tables.
        search: from `[1, C, H, W]` and `[1, C, HK, WK]` to score and index.
        why_not: why it cannot run here, None if it can.
        bytes_needed: an estimate from `(queries, keys, channels)`; what does not fit is not tried.
        products: inner products of channels it computes per pair, 1 over pixels or 9 over patches.
        backend: of this package, None for a peer.
        precision: as in `ttsr_fast.search`.
    """

    label: str
    search: Callable[[Tensor, Tensor], Found]
    why_not: Callable[[], str | None]
    bytes_needed: Callable[[int, int, int], int]
    products: int = PATCH
    backend: str | None = None
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """What its matrix product multiplies."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    @property
    def tolerance(self) -> float:
        """How far the chosen key may score below the maximum.

        Rounding turns each patch of a pair by at most eps / 2, and both the chosen and the best
        pair may be misjudged by that.
        """
        return 1e-6 if self.dtype == torch.float32 else 2 * torch.finfo(self.dtype).eps


def _ours(backend: str, precision: str) -> Candidate:
    return Candidate(
        label=f"{backend} {precision}",
        search=lambda q, k: functional.search(q, k, backend=backend, precision=precision),
        why_not=lambda: backends.why_not(backend, torch.device("cpu")),
        bytes_needed=lambda n_q, n_k, c: 12 * c * (n_q + n_k) + (256 << 20),
        products=1,
        backend=backend,
        precision=precision,
    )


def _patches_bytes(n: int, c: int) -> int:
    """An unfolded map in float32."""
    return 4 * PATCH * c * n


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
        value, where = (keys @ block).max(dim=0)
        score[0, y : y + rows] = value.view(-1, width)
        index[0, y : y + rows] = where.view(-1, width)
    return score, index


def _rows(x: Tensor) -> Tensor:  # [1, C, H, W] -> [H*W, C*9]
    return F.normalize(F.unfold(x, 3, padding=1)[0], dim=0).T.contiguous()


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
    score, index = (queries | keys).max_argmax(dim=1, backend="CPU")
    grid = (1, *query.shape[2:])
    return score.view(grid), index.view(grid)


def _needs(module: str, package: str) -> Callable[[], str | None]:
    return lambda: None if find_spec(module) else f"{package} is not installed"


ORACLE = "unfold"
OURS = {
    "cpp-fp32": _ours("cpp", "fp32"),
    "cpp-bf16": _ours("cpp", "bf16"),
    "torch-fp32": _ours("torch", "fp32"),
}
PEERS = {
    ORACLE: Candidate(
        "unfold + bmm",
        reference.search,
        lambda: None,
        lambda n_q, n_k, c: _patches_bytes(n_q + n_k, c) + 4 * n_q * n_k,
    ),
    "chunked": Candidate(
        "in chunks",
        _chunked,
        lambda: None,
        lambda n_q, n_k, c: 2 * _patches_bytes(n_k, c) + BLOCK_BYTES,
    ),
    "faiss": Candidate(
        "FAISS flat",
        _faiss,
        _needs("faiss", "faiss-cpu"),
        lambda n_q, n_k, c: 3 * _patches_bytes(n_q + n_k, c),
    ),
    "keops": Candidate(
        "KeOps",
        _keops,
        _needs("pykeops", "pykeops"),
        lambda n_q, n_k, c: 3 * _patches_bytes(n_q + n_k, c),
    ),
}
ALL = {**OURS, **PEERS}


def maps(query: tuple[int, int], key: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """Normally distributed feature maps, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, channels, *size, generator=generator) for size in (query, key))
    return q, k


def job(
    name: str, query: tuple[int, int], key: tuple[int, int], channels: int
) -> tuple[Run, Callable[[], Run]]:
    """A candidate's run on tiny maps and a function that prepares the measured one."""
    search = ALL[name].search

    def prepare(query: tuple[int, int], key: tuple[int, int]) -> Run:
        q, k = maps(query, key, channels)
        return lambda: search(q, k)

    return prepare((4, 4), (4, 4)), lambda: prepare(query, key)
