"""Small cases of every kernel of the transfer, and a kernel that reads the L2 cache.

Every case is held to the oracle in float64.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transfer
import triton
import triton.language as tl
from gate import check_close
from harness import Contender
from model_runs import make_features, module_run
from sizes import Size

from ttsr_fast import gather_fold, reference
from ttsr_fast.operators import backends

SIZE = Size((9, 11), (6, 5), 2)


def jobs(device: torch.device, few: bool) -> Iterator[tuple[str, Any]]:
    """All of them by name, or those in one type."""
    backends.can_run("cpp", device, "gather_fold", raise_error=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 1 if few else None]:
        for case, contenders in transfer.cases({"all three": ["cpp"]}, SIZE, dtype, device):
            words = (case[name] for name in ("operation", "layout", "index"))
            name = " ".join([*words, str(dtype).removeprefix("torch.")])
            yield name, partial(check_case, contenders["cpp"])
    yield "gradient of weights", partial(check_weights, device)
    for operation in ("SearchTransfer", "with gradients"):
        yield f"SearchTransfer {operation}", partial(check_module, device, operation)


def check_case(contender: Contender) -> list[dict[str, Any]]:
    contender.check(contender.run())
    return []


def check_weights(device: torch.device) -> list[dict[str, Any]]:
    """`gather_dot`, on values with blocks that are not whole."""
    generator = torch.Generator("cpu").manual_seed(0)
    value = torch.randn(2, 40, 13, 11, generator=generator, device="cpu").to(device)
    weight = torch.randn(2, *SIZE.query, generator=generator, device="cpu").to(device)
    index = transfer.make_index("random", SIZE, device)
    found = []
    for fold, dtype, options in (
        (gather_fold, torch.float32, {"backend": "cpp"}),
        (reference.gather_fold, torch.float64, {}),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (value, weight)]
        out = fold(leaves[0], index, stride=2, weight=leaves[1], **options)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    check_close(["result", "gradient", "gradient of weights"], *found, 1e-5)
    return []


def check_module(device: torch.device, operation: str) -> list[dict[str, Any]]:
    """`SearchTransfer`, where one launch serves all three levels."""
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
