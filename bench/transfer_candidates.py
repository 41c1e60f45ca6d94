"""The candidates of the transfer: backends of this package, and baselines.

Every candidate takes maps and index as the search leaves them; its time and memory include all
preparation, such as a grid of coordinates or blocks laid out as rows. Several levels are one call
per level, except where `torch.compile` sees all of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from registry import Candidate, Run
from torch import Tensor

from ttsr_fast import gather_fold, reference

Maps = tuple[Tensor, ...]
Fold = Callable[[Tensor, Tensor, int], Tensor]  # value, index, stride -> output
Levels = Callable[[Maps, Tensor, tuple[int, ...]], Maps]  # the same for several levels
# gradient, index, stride, grid of keys -> gradient of the value
Adjoint = Callable[[Tensor, Tensor, int, tuple[int, int]], Tensor]
OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
OPERATIONS = ("gather_fold", "adjoint")


def _candidate(
    label: str, levels: Levels | None, adjoint: Adjoint | None = None, **options: Any
) -> Candidate:
    """A candidate of `gather_fold`, and of its adjoint: by autograd unless that is given."""

    def prepare(
        operation: str, values: Maps, grads: Maps, index: Tensor, strides: tuple[int, ...]
    ) -> Run:
        if operation == "gather_fold":
            return partial(levels, values, index, strides)
        if adjoint is not None:
            grids = [
                tuple(n // s for n in v.shape[2:]) for v, s in zip(values, strides, strict=True)
            ]
            places = list(zip(grads, strides, grids, strict=True))
            return lambda: tuple(adjoint(grad, index, s, grid) for grad, s, grid in places)
        leaves = tuple(value.detach().requires_grad_() for value in values)
        outs = levels(leaves, index, strides)
        return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)

    return Candidate(label, prepare, operator="gather_fold", **options)


def _each(fold: Fold) -> Levels:
    def levels(values: Maps, index: Tensor, strides: tuple[int, ...]) -> Maps:
        return tuple(fold(v, index, s) for v, s in zip(values, strides, strict=True))

    return levels


def _ours(label: str, backend: str, **options: Any) -> Candidate:
    def fold(value: Tensor, index: Tensor, stride: int) -> Tensor:
        return gather_fold(value, index, stride=stride, backend=backend)

    return _candidate(label, _each(fold), backend=backend, **options)


# --- baselines ---


def _unfold(value: Tensor, index: Tensor, stride: int) -> Tensor:
    return reference.gather_fold(value, index, stride=stride)


@cache
def _compiler() -> Levels:
    # One version for every case; without `fullgraph`, any beyond the limit would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_each(_unfold), fullgraph=True, dynamic=False)


def _compiled(values: Maps, index: Tensor, strides: tuple[int, ...]) -> Maps:
    return _compiler()(values, index, strides)


def _grid_sample(
    value: Tensor,  # [N, C, s*HK, s*WK]
    index: Tensor,  # [N, H, W]
    stride: int,
) -> Tensor:  # [N, C, s*H, s*W]
    """Nine samples of the nearest pixel, added; in float32, where coordinates are whole pixels."""
    height, width = value.shape[2:]
    columns = width // stride
    place = torch.stack([index % columns, index // columns])  # [2, N, H, W], x before y
    outside = -(height + width)
    place = F.pad(place, [1] * 4, value=outside)  # where no query is, beyond the zeros
    y, x = (torch.arange(stride * n, device=index.device) % stride for n in index.shape[1:])
    within = torch.stack(torch.broadcast_tensors(x, y[:, None]))[:, None]  # [2, 1, s*H, s*W]
    size = torch.tensor([width, height], device=index.device).view(2, 1, 1, 1)
    total = None
    for dy, dx in OFFSETS:
        block = place[:, :, 1 - dy :, 1 - dx :][:, :, : index.shape[1], : index.shape[2]]
        block = block + torch.tensor([dx, dy], device=index.device).view(2, 1, 1, 1)
        pixel = within + stride * block.repeat_interleave(stride, 2).repeat_interleave(stride, 3)
        grid = ((2 * pixel + 1) / size - 1).permute(1, 2, 3, 0)
        taken = F.grid_sample(value.float(), grid, mode="nearest", align_corners=False)
        total = taken if total is None else total + taken
    return (total / 9).to(value.dtype)


def _index_add(
    grad: Tensor,  # [N, C, s*H, s*W]
    index: Tensor,  # [N, H, W]
    stride: int,
    keys: tuple[int, int],
) -> Tensor:  # [N, C, s*HK, s*WK]
    """Blocks as rows, each added nine times at the row of its source block."""
    n, h, w = index.shape
    height, width = (size + 2 for size in keys)
    pulled = F.pad(F.pixel_unshuffle(grad / 9, stride).permute(0, 2, 3, 1), [0, 0, 1, 1, 1, 1])
    rows = grad.new_zeros(n * height * width, pulled.shape[3])  # with a margin, dropped below
    image = torch.arange(n, device=index.device)[:, None, None] * height
    corner = (image + index // keys[1]) * width + index % keys[1]
    for dy, dx in OFFSETS:
        taken = pulled[:, 1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]
        at = corner + (1 + dy) * width + 1 + dx
        rows.index_add_(0, at.flatten(), taken.reshape(-1, rows.shape[1]))
    blocks = rows.view(n, height, width, -1)[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
    return F.pixel_shuffle(blocks, stride)


REFERENCE = "reference"
CANDIDATES = {
    "cpp": _ours("cpp", "cpp"),
    "cpp-graph": _ours(
        "cpp, graph", "cpp", operations=("gather_fold",), graph=True, devices=("cuda",)
    ),
    "torch": _ours("torch", "torch"),
    REFERENCE: _candidate("unfold, gather, fold", _each(_unfold), baseline=True),
    "compile": _candidate("torch.compile", _compiled, compiled=True, baseline=True),
    "grid_sample": _candidate("grid_sample", _each(_grid_sample), baseline=True),
    "index_add": _candidate("index_add", None, _index_add, operations=("adjoint",), baseline=True),
}
