"""Small cases of every kernel of the transfer, and a kernel that reads the L2 cache.

Every case is held to the oracle in float64 on the CPU.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from devices import CPU
from gate import check_close
from model_runs import make_features, module_run
from sizes import Size
from torch import Tensor

from ttsr_fast import backends, gather_fold, reference

STRIDES, DTYPES = (1, 2, 4), (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
QUERIES, KEYS = (2, 9, 11), (6, 5)


def jobs(device: torch.device, few: bool) -> Iterator[tuple[str, Any]]:
    """All of them by name, or a few that have every kernel."""
    for options in folds(few):
        words = (f"{name}={value}" for name, value in options.items())
        name = " ".join(["gather_fold", *words]).replace("torch.", "")
        yield name, partial(check_fold, device, **options)
    for operation in ("SearchTransfer", "with gradients"):
        yield f"SearchTransfer {operation}", partial(check_module, device, operation)


def folds(few: bool) -> Iterator[dict[str, Any]]:
    """Channels that fill vectors or do not, and whatever else takes another path."""
    for stride, dtype, layout in itertools.product(STRIDES, DTYPES, LAYOUTS):
        options = {"stride": stride, "dtype": dtype, "layout": layout}
        if few and DTYPES.index(dtype) != STRIDES.index(stride):
            continue
        yield {**options, "channels": 72}
        yield {**options, "weighted": True}
    for stride, size in itertools.product(() if few else STRIDES, (1, 5, 7)):
        yield {"stride": stride, "kernel_size": size, "weighted": True}
    for dtype, layout, shared in itertools.product(() if few else DTYPES, LAYOUTS, (False, True)):
        options = {"stride": 2, "dtype": dtype, "layout": layout, "channels": 40, "weighted": True}
        yield {**options, "shared": shared, "to_one": True}


def check_fold(
    device: torch.device,
    stride: int,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    channels: int = 13,
    weighted: bool = False,
    kernel_size: int = 3,
    shared: bool = False,  # one value for the whole batch
    to_one: bool = False,  # all queries choose the same key
) -> list[dict[str, Any]]:
    """`gather_fold` with its gradients; that of the weights is `gather_dot`."""
    backends.can_run("cpp", device, "gather_fold", raise_error=True)
    generator = torch.Generator("cpu").manual_seed(0)
    normal = partial(torch.randn, generator=generator, device="cpu")
    n, h, w = QUERIES
    # The last blocks of the value are not whole.
    height, width = (stride * size + stride // 2 for size in KEYS)
    value = normal(1 if shared else n, channels, height, width).to(dtype, memory_format=layout)
    grad = normal(n, channels, stride * h, stride * w).to(dtype)
    index = torch.randint(KEYS[0] * KEYS[1], QUERIES, generator=generator, device="cpu")
    index = torch.full_like(index, 7) if to_one else index
    weight = normal(QUERIES) if weighted else None

    def results(at: torch.device, other: torch.dtype | None, **more: object) -> list[Tensor]:
        v = value.to(at, other or dtype).requires_grad_()
        leaves = [v] if weight is None else [v, weight.to(at, other).requires_grad_()]
        options = {"stride": stride, "kernel_size": kernel_size, "weight": [*leaves, None][1]}
        function = reference.gather_fold if other else gather_fold
        out = function(v, index.to(at), **options, **more)
        grads = torch.autograd.grad(out, leaves, grad.to(at, out.dtype))
        return [x.detach().cpu() for x in (out, *grads)]

    found = results(device, None, backend="cpp")
    truth = results(CPU, torch.float64, padding=kernel_size // 2)
    names = ["result", "gradient", "gradient of the weight"][: len(truth)]
    check_close(names, found, truth, max(1e-5, 2 * torch.finfo(dtype).eps))
    return []


def check_module(device: torch.device, operation: str) -> list[dict[str, Any]]:
    """`SearchTransfer`, where one launch serves all three levels."""
    backends.can_run("cpp", device, "gather_fold", raise_error=True)
    inputs = make_features(Size((5, 6), (6, 5), 2))
    name = "cpp" if device.type == "cpu" else "default"
    found = module_run(name, operation, *([x.to(device) for x in xs] for xs in inputs))()
    truth = module_run("reference", operation, *([x.double() for x in xs] for xs in inputs))()
    names = [f"result {n}" for n in range(len(truth))]
    check_close(names, [x.detach().cpu() for x in found], truth, 1e-5)
    return []


@triton.jit
def read_kernel(p_x, p_sum, BLOCKS, REPEATS, BLOCK: tl.constexpr):
    """Reads all blocks REPEATS times, past the first-level cache."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_b in range(tl.program_id(0), BLOCKS * REPEATS, tl.num_programs(0)):
        p_block = p_x + i_b % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(p_block, cache_modifier=".cg")
    tl.store(p_sum + tl.program_id(0), tl.sum(b_sum))
