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
from gate import check_close
from machine import CPU
from registry import Candidate, Case, Rows, Run, Size, copy_run, noise
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
# value, gradient of the output, index, stride -> gradient of the value
Adjoint = Callable[[Tensor, Tensor, Tensor, int], Tensor]
LEVELS = {"lv1": (4, 64), "lv2": (2, 128), "lv3": (1, 256)}  # stride, channels
TOGETHER = "all three"
GROUPS = {**{level: (level,) for level in LEVELS}, TOGETHER: tuple(LEVELS)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
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
            levels_of = list(zip(values, grads, strides, strict=True))
            return lambda: tuple(adjoint(v, g, index, s) for v, g, s in levels_of)
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


def _index_add(
    value: Tensor,  # [N, C, s*HK, s*WK]
    grad: Tensor,  # [N, C, s*H, s*W]
    index: Tensor,  # [N, H, W]
    stride: int,
) -> Tensor:  # [N, C, s*HK, s*WK]
    """Blocks as rows, each added nine times at the row of its source block."""
    n, h, w = index.shape
    height, width = (size // stride + 2 for size in value.shape[2:])
    pulled = F.pad(F.pixel_unshuffle(grad / 9, stride).permute(0, 2, 3, 1), [0, 0, 1, 1, 1, 1])
    rows = grad.new_zeros(n * height * width, pulled.shape[3])  # with a margin, dropped below
    image = torch.arange(n, device=index.device)[:, None, None] * height
    corner = (image + index // (width - 2)) * width + index % (width - 2)
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
def make_maps(group: str, layout: str, size: Size, device: torch.device = CPU) -> tuple[Maps, Maps]:
    """Values and gradients of the outputs of every level, normally distributed."""
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level in GROUPS[group]:
        stride, channels = LEVELS[level]
        normal = noise(device)
        for found, (h, w) in zip(maps, (size.key, size.query), strict=True):
            x = normal(size.batch, channels, stride * h, stride * w)
            found.append(x.contiguous(memory_format=LAYOUTS[layout]))
    return tuple(maps[0]), tuple(maps[1])


def inputs(
    operation: str,
    group: str,
    layout: str,
    kind: str,
    size: Size,
    device: torch.device = CPU,
) -> tuple[Any, ...]:
    """Arguments of `Candidate.prepare`."""
    strides = tuple(LEVELS[level][0] for level in GROUPS[group])
    maps = make_maps(group, layout, size, device)
    return operation, *maps, make_index(kind, size, device), strides


# --- cases ---


@lru_cache(maxsize=2)
def truth(operation: str, group: str, kind: str, size: Size, device: torch.device) -> Maps:
    """The result of the oracle in float64."""
    _, values, grads, index, strides = inputs(operation, group, "NCHW", kind, size, device)
    doubles = (tuple(x.double() for x in maps) for maps in (values, grads))
    return CANDIDATES[REFERENCE].prepare(operation, *doubles, index, strides)()


def least_bytes(
    operation: str, key: tuple[int, int], values: Maps, grads: Maps, index: Tensor
) -> int:
    """Least traffic: the index, every output, and of every input the blocks under some patch."""
    chosen = torch.zeros(len(index), key[0] * key[1], device=index.device)
    covered = F.max_pool2d(chosen.scatter_(1, index.flatten(1), 1).view(-1, 1, *key), 3, 1, 1)
    share = 1.0 if operation == "adjoint" else covered.mean().item()
    maps = (round(share * v.nbytes) + g.nbytes for v, g in zip(values, grads, strict=True))
    return index.nbytes + sum(maps)


def gate(place: tuple[Any, ...], device: torch.device = CPU) -> Callable[[Maps], dict[str, float]]:
    """The check of a result at a place, against float64."""
    operation, group, _, kind, size = place
    want = truth(operation, group, kind, size, device)
    return lambda result: check_close(GROUPS[group], result, want, TOLERANCE[operation])


def cases(args: argparse.Namespace) -> Iterator[Case]:
    copy = copy_run(args.device)
    for size in args.sizes:
        for group, kind in product(args.levels, INDICES):
            for layout, operation in product(LAYOUTS, OPERATIONS):
                yield case((operation, group, layout, kind, size), args, copy)


def case(place: tuple[Any, ...], args: argparse.Namespace, copy: Any) -> Case:
    operation, group, layout, kind, size = place
    check = gate(place, args.device)
    _, *given, _ = inputs(*place, args.device)
    least = least_bytes(operation, size.key, *given)
    everywhere = args.named or group == TOGETHER
    names = (
        name
        for name in args.candidates
        if CANDIDATES[name].has(operation)
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
        check=lambda candidate, result: check(result),
        names=tuple(names),
        facts={"level": group, "layout": layout, "index": kind},
        weighed=kind == INDICES[0],
        rooflines={"copy": copy},
        finish=finish,
    )


def options(parser: argparse.ArgumentParser) -> None:
    text = f"{', '.join(map(repr, GROUPS))}; default: all; with --quick the last"
    parser.add_argument("--levels", nargs="+", choices=GROUPS, metavar="LEVEL", help=text)


def resolve(args: argparse.Namespace) -> None:
    args.levels = args.levels or ([TOGETHER] if args.quick else list(GROUPS))
    if args.quick and not args.named:
        args.candidates = [name for name in args.candidates if not CANDIDATES[name].compiled]


if __name__ == "__main__":
    sys.exit(runner.main(sys.modules[__name__]))
