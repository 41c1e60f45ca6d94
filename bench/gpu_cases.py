"""Small cases of every kernel of the transfer, held to the oracle in float64."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import model
import model_candidates
import torch
import transfer
from gate import check_close
from registry import Size

from ttsr_fast import gather_fold, reference
from ttsr_fast.operators import backends

SIZE = Size((9, 11), (6, 5), 2)
Jobs = Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]


def jobs(device: torch.device, few: bool) -> Jobs:
    """All of them by name, or the ones in one type."""
    backends.can_run("cpp", device, "gather_fold", raise_error=True)
    kinds = product(transfer.DTYPES, transfer.INDICES, transfer.LAYOUTS, transfer.OPERATIONS)
    for dtype, index, layout, operation in kinds:
        if dtype == "float32" or not few:
            place = (operation, transfer.TOGETHER, layout, index, SIZE, transfer.DTYPES[dtype])
            name = " ".join((operation, layout, index, dtype))
            yield name, partial(check_transfer, place, device)
    yield "gradient of weights", partial(check_weights, device)
    for operation in model_candidates.MODULE:
        yield f"SearchTransfer {operation}", partial(check_module, device, operation)


def check_transfer(place: tuple[Any, ...], device: torch.device) -> list[dict[str, Any]]:
    candidate = transfer.CANDIDATES["cpp"]
    case = transfer.case(place, Namespace(device=device, candidates=["cpp"], named=True), None)
    case.check(candidate, candidate.prepare(*transfer.inputs(*place, device))())
    return []


def check_weights(device: torch.device) -> list[dict[str, Any]]:
    """`gather_dot`, on values with partial blocks."""
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
    """`SearchTransfer`, with one launch for all three levels."""
    place = (operation, Size((5, 6), (6, 5), 2), device)
    name = "cpp" if device.type == "cpu" else "default"
    model.module_check(*place)(model_candidates.CANDIDATES[name].prepare(*place)())
    return []
