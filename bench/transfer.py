"""Time and memory of the transfer at TTSR's three levels, against baselines.

    python bench/transfer.py                   queries 88x125, keys 92x125
    python bench/transfer.py --sizes 9*40x40   nine images, as in training
    python bench/transfer.py --quick           small maps, without torch.compile

`gather_fold` and its adjoint (the gradient of the value) at each level and at
all three together, with contiguous and channels-last maps and with random,
coherent and all-to-one indices. Baselines other than unfold, gather and fold
run at all three together, unless `--candidates` names them. Memory is measured
with random indices. Writes a result file into the folder `--out`
(`transfer.json` on the CPU, `<gpu>-transfer.json` otherwise; `-batch` and the
type follow where they are not the default). Exits with status 1 if any result
was wrong, which is not timed.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import runner
import torch
import torch.nn.functional as F
from gate import WrongResult, check_close
from machine import CPU
from registry import Bench, Candidate, Case, Declined, Rows, Size
from report import INDICES
from rooflines import copy_run
from text import size_title
from torch import Tensor
from transfer_candidates import CANDIDATES, OPERATIONS, REFERENCE, Maps

from ttsr_fast import reference

LEVELS = {"lv1": (4, 64), "lv2": (2, 128), "lv3": (1, 256)}  # stride, channels
TOGETHER = "all three"
GROUPS = {**{level: (level,) for level in LEVELS}, TOGETHER: tuple(LEVELS)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
TOLERANCE = {"gather_fold": 1e-6, "adjoint": 1e-5}


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
    """Least traffic of any implementation: the index, and every input and output once.

    Of a value only the blocks covered by some patch count. Its gradient is written whole, zeros
    included. Maps that fit a cache can move faster than a copy that does not.
    """
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
        for group in args.levels:
            for kind in INDICES:
                for layout in LAYOUTS:
                    for operation in OPERATIONS:
                        place = (operation, group, layout, kind, size, dtype)
                        yield case(place, args, copy)


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


BENCH = Bench(
    kind="transfer",
    description=__doc__,
    candidates=CANDIDATES,
    cases=cases,
    inputs=inputs,
    settings={
        "cpu": ("88x125:92x125", 0.15, 60.0),
        "quick cpu": ("22x31:23x31", 0.05, 60.0),
        "cuda": ("9*40x40 88x125:92x125", 0.15, 60.0),
        "quick cuda": ("9*40x40", 0.05, 60.0),
    },
    subjects=("cpp",),
    options=options,
    resolve=resolve,
)

if __name__ == "__main__":
    sys.exit(runner.main(BENCH))
