"""Sizes, cases, candidates and rooflines: the registry of everything that is measured.

A benchmark is a module, of the name `KIND`, that lists `CANDIDATES`, `cases(args)`, `inputs(*place,
device)`, `SUBJECTS` (measured however long they take), `options(parser)`, `resolve(args)`, which
raises `ValueError`, and `SETTINGS` by type of device, with "quick " before it for --quick: sizes,
seconds for each candidate, and seconds beyond which a candidate is skipped.
"""

import argparse
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from machine import CPU
from torch import Tensor

from ttsr_fast.operators import backends

Grid = tuple[int, int]
Run = Callable[[], Any]
Rows = dict[str, dict[str, Any]]  # by candidate


class Declined(Exception):
    """A candidate cannot do a case; the message gives the reason."""


@dataclass(frozen=True)
class Size:
    """A query grid, a key grid, the number of images of each, and their channels."""

    query: Grid
    key: Grid
    batch: int = 1
    channels: int = 256

    @classmethod
    def parse(cls, text: str, channels: int = 0) -> "Size":
        """`HxW`, `HxW:HKxWK` where the grids differ, and `N*` before it for a batch of N.

        Where `channels`, the default, is given, also `@C` after it for C channels.
        """
        match = re.fullmatch(r"(?:(\d+)\*)?(\d+)x(\d+)(?::(\d+)x(\d+))?(?:@(\d+))?", text)
        numbers = match.groups() if match else ["0"]
        if any(n and int(n) == 0 for n in numbers) or (numbers[-1] and not channels):
            also = ", with @64 after it for 64 channels" if channels else ""
            raise argparse.ArgumentTypeError(
                f"size must read 100x100, 100x100:108x96 or 9*40x40, got {text!r}{also}"
            )
        n, h, w, hk, wk, c = (int(n or 0) for n in numbers)
        grids = (h, w), (hk, wk) if hk else (h, w)
        return cls(*grids, n or 1, c or channels or cls.channels)

    @property
    def queries(self) -> int:
        """Query positions of an image."""
        return self.query[0] * self.query[1]

    @property
    def keys(self) -> int:
        """Key positions of an image."""
        return self.key[0] * self.key[1]

    @property
    def pairs(self) -> int:
        return self.batch * self.queries * self.keys

    @property
    def facts(self) -> dict[str, Any]:
        """Fields of a case in the results."""
        return {"query": self.query, "key": self.key, "batch": self.batch, "pairs": self.pairs}


@dataclass(frozen=True)
class Candidate:
    """One way of computing a result: of this package, or a baseline."""

    label: str
    prepare: Callable[..., Run]  # from the inputs of a case
    baseline: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")  # types where it is measured unless named
    operations: tuple[str, ...] | None = None  # None for all
    backend: str | None = None
    operator: str = "search"  # which the backend has to have
    package: str | None = None  # which has to be installed
    bytes_needed: Callable[[Size, str], int] = lambda size, operation: 0  # an estimate
    compiled: bool = False  # by a compiler at the first run
    graph: bool = False  # replayed from a CUDA graph
    amp: torch.dtype | None = None  # of the model's convolutions
    precision: str | None = None
    algorithm: str | None = None  # of the backend, None for its choice
    products: int = 9  # inner products of channels per pair: 1 over pixels, 9 over patches
    operands: str = "float32"  # factors of its matrix product
    tolerance: float = 1e-6  # of the score of a chosen key, below the maximum
    score_tolerance: float = 1e-6  # of a score, around that of its own key

    def has(self, operation: str) -> bool:
        return self.operations is None or operation in self.operations

    def why_not(self, device: torch.device) -> str | None:
        """The reason why it cannot run on a device, None if it can."""
        if self.graph and device.type != "cuda":
            return "it needs a GPU"
        if self.package is not None and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.backend in (None, "reference"):
            return None
        return backends.why_not(self.backend, device, self.operator)


@dataclass(frozen=True)
class Case:
    """One table row or more: an operation at a size."""

    title: str
    operation: str
    size: Size
    place: tuple[Any, ...]  # picklable arguments of `inputs`
    check: Callable[[Candidate, Any], dict[str, float]]  # raises `gate.WrongResult`
    names: tuple[str, ...]  # of candidates
    facts: dict[str, Any] = field(default_factory=dict)  # for the results
    weighed: bool = True
    rooflines: dict[str, tuple[Run, int]] = field(default_factory=dict)  # with FLOP or bytes
    # From rows, and the rate of every roofline; completes the rows and returns further facts.
    finish: Callable[[Rows, dict[str, float]], dict[str, Any]] = lambda rows, rates: {}
    skip: Callable[[Candidate], str | None] = lambda candidate: None  # a reason


def noise(device: torch.device) -> Callable[..., Tensor]:
    """Normally distributed tensors by shape, made on the CPU and the same on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device="cpu").to(device)


# --- rooflines ---

# Factors of a matrix product, and their type.
OPERANDS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@contextmanager
def matmul_precision(name: str):
    """`torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products_of(operands: str) -> AbstractContextManager[None]:
    """A context where products of float32 multiply `operands`."""
    if OPERANDS[operands] != torch.float32:
        return nullcontext()
    return matmul_precision("high" if operands == "tf32" else "highest")


def gemm_run(
    operands: str, depth: int, device: torch.device, out: torch.dtype | None = None
) -> tuple[Run, int]:
    """A library's product `[size, depth] @ [depth, size]`, and its FLOP.

    The size fills the device: 1024 on a CPU, 8192 on a GPU. Only GPUs have a product of 16-bit
    operands with a result `out` in float32.
    """
    size = 1024 if device.type == "cpu" else 8192
    dtype = OPERANDS[operands]
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((size, depth), (depth, size)))
    result = torch.empty(size, size, dtype=out or dtype, device=device)
    if out is not None:
        return partial(torch.ops.aten.mm.dtype_out, a, b, out, out=result), 2 * size * size * depth

    def run() -> None:
        with products_of(operands):
            torch.mm(a, b, out=result)

    return run, 2 * size * size * depth


def copy_run(device: torch.device = CPU) -> tuple[Run, int]:
    """A copy that does not fit the caches, and the bytes that it reads and writes."""
    size = (128 if device.type == "cpu" else 1024) << 20
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size
