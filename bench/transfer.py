"""Time and memory of the transfer at TTSR's three levels, against baselines.

    python bench/transfer.py                   queries 88x125, keys 92x125
    python bench/transfer.py --sizes 9*40x40   nine images, as in training

`gather_fold` and its adjoint (the gradient of the value) at each level and at
all three together, with contiguous and channels-last maps and with random,
coherent and all-to-one indices. Baselines other than unfold, gather and fold run
at all three together, unless `--candidates` names them. A candidate starts from
maps and index as the search leaves them. Exits with status 1 if a result was
wrong, which is not timed.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any

import runner
import torch
import torch.nn.functional as F
from gate import WrongResult, check_close
from machine import CPU
from registry import Candidate, Case, Declined, Rows, Run, Size, copy_run
from report import INDICES, size_title
from torch import Tensor

from ttsr_fast import gather_fold, reference

KIND, SUBJECTS = "transfer", ("cpp",)
SETTINGS = {
    "cpu": ("88x125:92x125", 0.15, 60.0),
    "quick cpu": ("22x31:23x31", 0.05, 60.0),
    "cuda": ("9*40x40 88x125:92x125", 0.15, 60.0),
    "quick cuda": ("9*40x40", 0.05, 60.0),
}
Maps = tuple[Tensor, ...]
Levels = Callable[[Maps, Tensor, tuple[int, ...]], Maps]  # values, index, strides -> outputs
# gradient, index, stride, grid of keys -> gradient of the value
Adjoint = Callable[[Tensor, Tensor, int, tuple[int, int]], Tensor]
LEVELS = {"lv1": (4, 64), "lv2": (2, 128), "lv3": (1, 256)}  # stride, channels
TOGETHER = "all three"
GROUPS = {**{level: (level,) for level in LEVELS}, TOGETHER: tuple(LEVELS)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
TOLERANCE = {"gather_fold": 1e-6, "adjoint": 1e-5}
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


def _each(fold: Callable[..., Tensor], **options: Any) -> Levels:
    def levels(values: Maps, index: Tensor, strides: tuple[int, ...]) -> Maps:
        pairs = zip(values, strides, strict=True)
        return tuple(fold(value, index, stride=stride, **options) for value, stride in pairs)

    return levels


def _ours(label: str, backend: str, **options: Any) -> Candidate:
    return _candidate(label, _each(gather_fold, backend=backend), backend=backend, **options)


# --- baselines ---


@cache
def _compiler() -> Levels:
    # One version for every case; without `fullgraph`, any beyond the limit would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_each(reference.gather_fold), fullgraph=True, dynamic=False)


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
    REFERENCE: _candidate("unfold, gather, fold", _each(reference.gather_fold), baseline=True),
    "compile": _candidate("torch.compile", _compiled, compiled=True, baseline=True),
    "grid_sample": _candidate("grid_sample", _each(_grid_sample), baseline=True),
    "index_add": _candidate("index_add", None, _index_add, operations=("adjoint",), baseline=True),
}


# --- inputs, made on the CPU and the same on every device ---


def make_index(kind: str, size: Size, device: torch.device = CPU) -> Tensor:  # [N, H, W]
    """Key positions: independent, along a smooth flow, or all the same."""
    grid, (height, width) = (size.batch, *size.query), size.key
    with CPU:
        if kind == "random":
            generator = torch.Generator().manual_seed(2)
            return torch.randint(height * width, grid, generator=generator).to(device)
        if kind == "all to one":
            return torch.full(grid, height // 2 * width + width // 2).to(device)
        y, x = (torch.linspace(0, 1, n) for n in size.query)
        phase = torch.arange(size.batch)[:, None, None] / size.batch
        wave = 0.03 * torch.sin(2 * math.pi * (y[:, None] + 2 * x + phase))
        row = ((y[:, None] + wave).clamp(0, 1) * (height - 1)).round().long()
        column = ((x - wave).clamp(0, 1) * (width - 1)).round().long()
        return (row * width + column).to(device)


@lru_cache(maxsize=1)
def make_maps(
    group: str, layout: str, size: Size, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[Maps, Maps]:
    """Values and gradients of the outputs of every level, normally distributed."""
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level in GROUPS[group]:
        stride, channels = LEVELS[level]
        generator = torch.Generator("cpu").manual_seed(0)
        for found, (h, w) in zip(maps, (size.key, size.query), strict=True):
            shape = (size.batch, channels, stride * h, stride * w)
            x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
            found.append(x.contiguous(memory_format=LAYOUTS[layout]))
    return tuple(maps[0]), tuple(maps[1])


def inputs(
    operation: str,
    group: str,
    layout: str,
    kind: str,
    size: Size,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> tuple[Any, ...]:
    """Arguments of `Candidate.prepare`."""
    strides = tuple(LEVELS[level][0] for level in GROUPS[group])
    maps = make_maps(group, layout, size, dtype, device)
    return operation, *maps, make_index(kind, size, device), strides


# --- cases ---


@lru_cache(maxsize=1)
def truths(
    group: str, kind: str, size: Size, dtype: torch.dtype, device: torch.device
) -> dict[str, list[Tensor]]:
    """Results of both operations in float64."""
    _, values, grads, index, strides = inputs("", group, "NCHW", kind, size, dtype, device)
    levels = list(zip(values, grads, strides, strict=True))
    return {
        "gather_fold": [reference.gather_fold(v.double(), index, stride=s) for v, _, s in levels],
        "adjoint": [_adjoint(v.double(), g.double(), index, s) for v, g, s in levels],
    }


def _adjoint(value: Tensor, grad: Tensor, index: Tensor, stride: int) -> Tensor:
    value.requires_grad_()
    return torch.autograd.grad(reference.gather_fold(value, index, stride=stride), value, grad)[0]


def least_bytes(
    operation: str, key: tuple[int, int], values: Maps, grads: Maps, index: Tensor
) -> int:
    """Least traffic: the index, every output, and of every input the blocks under some patch."""
    chosen = torch.zeros(len(index), key[0] * key[1], device=index.device)
    covered = F.max_pool2d(chosen.scatter_(1, index.flatten(1), 1).view(-1, 1, *key), 3, 1, 1)
    share = 1.0 if operation == "adjoint" else covered.mean().item()
    maps = (round(share * v.nbytes) + g.nbytes for v, g in zip(values, grads, strict=True))
    return index.nbytes + sum(maps)


def check(
    operation: str, dtype: torch.dtype, truth: list[Tensor], candidate: Candidate, result: Maps
) -> dict[str, float]:
    """The gate; baselines that add in 16 bits may decline it."""
    tolerance = max(TOLERANCE[operation], 2 * torch.finfo(dtype).eps)
    try:
        return check_close([f"result {n}" for n in range(len(truth))], result, truth, tolerance)
    except WrongResult as error:
        if not candidate.baseline or dtype == torch.float32:
            raise
        raise Declined(f"in {dtype} its {error}") from error


def cases(args: argparse.Namespace) -> Iterator[Case]:
    copy = copy_run(args.device)
    dtype = DTYPES[args.dtype]
    for size in args.sizes:
        for group, kind in product(args.levels, INDICES):
            for layout, operation in product(LAYOUTS, OPERATIONS):
                yield case((operation, group, layout, kind, size, dtype), args, copy)


def case(place: tuple[Any, ...], args: argparse.Namespace, copy: Any) -> Case:
    operation, group, layout, kind, size, dtype = place
    truth = truths(group, kind, size, dtype, args.device)[operation]
    _, *given, _ = inputs(*place, args.device)
    least = least_bytes(operation, size.key, *given)
    everywhere = args.named or group == TOGETHER
    names = (
        name
        for name in args.candidates
        if operation in (CANDIDATES[name].operations or OPERATIONS)
        and (everywhere or name == REFERENCE or not CANDIDATES[name].baseline)
    )

    def finish(rows: Rows, rates: dict[str, float]) -> dict[str, Any]:
        for row in rows.values():
            row["bytes_per_s"] = least / row["median_s"]
            row["copy_share"] = row["bytes_per_s"] / rates["copy"]
        return {"least_bytes": least, "copy_bytes_per_s": rates["copy"]}

    return Case(
        title=f"{size_title(size.facts)}, {operation} {group} {layout} {kind}",
        operation=operation,
        size=size,
        place=place,
        check=partial(check, operation, dtype, truth),
        names=tuple(names),
        facts={
            "dtype": str(dtype).removeprefix("torch."),
            "level": group,
            "layout": layout,
            "index": kind,
        },
        weighed=kind == INDICES[0],
        rooflines={"copy": copy},
        finish=finish,
    )


def options(parser: argparse.ArgumentParser) -> None:
    text = f"{', '.join(map(repr, GROUPS))}; default: all; with --quick the last"
    parser.add_argument("--levels", nargs="+", choices=GROUPS, metavar="LEVEL", help=text)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def resolve(args: argparse.Namespace) -> None:
    args.levels = args.levels or ([TOGETHER] if args.quick else list(GROUPS))
    if args.quick and not args.named:
        args.candidates = [name for name in args.candidates if not CANDIDATES[name].compiled]


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
