"""Rooflines: runs that bound what a kernel can reach, timed in the same rounds."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from machine import CPU
from registry import Run

MIB = 1 << 20
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
    size = (128 if device.type == "cpu" else 1024) * MIB
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size
