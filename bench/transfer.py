"""Time and memory of the transfer at the sizes of TTSR's three levels, against unfold and fold.

    python bench/transfer.py                  queries 88x125, keys 92x125
    python bench/transfer.py --quick          small maps, about a minute
    python bench/transfer.py --device cuda    on the GPU, which is the default where there is one

`gather_fold` and its adjoint (the gradient to the value) with contiguous and channels-last values
and with random, coherent and all-to-one indices; then `SearchTransfer` as a whole, forward and with
its gradients. Writes a result file and a plot into the folder `--out` (`transfer.json` on the CPU,
`<gpu>-transfer.json` otherwise). Exits with status 1 if any result was wrong; no time is reported
for that one.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import devices
import harness
import report
import torch
from devices import CPU
from gate import check_close
from harness import Contender, Run, deferred
from rich.console import Console
from sizes import Size
from torch import Tensor

from ttsr_fast import SearchTransfer, backends, gather_fold, reference

Grid = tuple[int, int]

LEVELS = {"lv1": (4, 64), "lv2": (2, 128), "lv3": (1, 256)}  # stride, channels
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
SIZE, QUICK_SIZE = "88x125:92x125", "22x31:23x31"
REFERENCE = "reference"
LABELS = {"cpp": "cpp", "torch": "torch", REFERENCE: "unfold, gather, fold"}
TOLERANCE = {"gather_fold": 1e-6, "adjoint": 1e-5, "SearchTransfer": 5e-6, "with gradients": 1e-5}


# --- inputs ---


# Made on the CPU and the same on every device.


def make_index(
    kind: str, query: Grid, key: Grid, device: torch.device = CPU
) -> Tensor:  # [1, H, W]
    """Key positions: independent, along a smooth flow, or all the same."""
    with CPU:
        return _make_index(kind, query, key).to(device)


def _make_index(kind: str, query: Grid, key: Grid) -> Tensor:
    if kind == "random":
        generator = torch.Generator().manual_seed(2)
        return torch.randint(key[0] * key[1], (1, *query), generator=generator)
    if kind == "all to one":
        return torch.full((1, *query), key[0] // 2 * key[1] + key[1] // 2)
    y, x = (torch.linspace(0, 1, n) for n in query)
    wave = 0.03 * torch.sin(2 * math.pi * (y[:, None] + 2 * x))
    row = ((y[:, None] + wave).clamp(0, 1) * (key[0] - 1)).round().long()
    column = ((x - wave).clamp(0, 1) * (key[1] - 1)).round().long()
    return (row * key[1] + column)[None]


def make_maps(
    level: str, layout: str, query: Grid, key: Grid, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """A value and a gradient of the output, normally distributed."""
    stride, channels = LEVELS[level]
    with CPU:
        generator = torch.Generator().manual_seed(0)
        value, grad = (
            torch.randn(1, channels, stride * h, stride * w, generator=generator).to(device)
            for h, w in (key, query)
        )
    layout_of = {"memory_format": LAYOUTS[layout]}
    return value.contiguous(**layout_of), grad.contiguous(**layout_of)


def make_features(
    query: Grid, key: Grid, device: torch.device = CPU
) -> tuple[list[Tensor], list[Tensor]]:
    """The five maps of `SearchTransfer`, and gradients of its four results.

    The queries are keys along a smooth flow plus noise, so that every best match is clear and
    results can be compared number by number.
    """
    with CPU:
        maps, grads = _make_features(query, key)
    return [x.to(device) for x in maps], [x.to(device) for x in grads]


def _make_features(query: Grid, key: Grid) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(channels: int, stride: int, grid: Grid) -> Tensor:
        return torch.randn(1, channels, *(stride * n for n in grid), generator=generator)

    values = [normal(channels, stride, key) for stride, channels in LEVELS.values()]
    refsr = normal(256, 1, key)
    lrsr = reference.gather_fold(refsr, make_index("coherent", query, key))
    lrsr += 0.3 * normal(256, 1, query)
    grads = [normal(1, 1, query)]
    grads += [normal(channels, stride, query) for stride, channels in reversed(LEVELS.values())]
    return [lrsr, refsr, *values], grads


# --- what is measured ---


def fold_run(
    name: str, operation: str, value: Tensor, grad: Tensor, index: Tensor, stride: int
) -> Run:
    """`gather_fold` or its adjoint alone, by a backend or by the reference."""
    fold = reference.gather_fold if name == REFERENCE else partial(gather_fold, backend=name)
    if operation == "gather_fold":
        return lambda: (fold(value, index, stride=stride),)
    value = value.detach().requires_grad_()
    out = fold(value, index, stride=stride)
    return lambda: torch.autograd.grad(out, value, grad, retain_graph=True)


def fold_truths(value: Tensor, grad: Tensor, index: Tensor, stride: int) -> dict[str, Tensor]:
    """What both operations give in float64."""
    size = list(value.shape)
    return {
        "gather_fold": reference.gather_fold(value.double(), index, stride=stride),
        "adjoint": reference.gather_fold_adjoint(grad.double(), index, None, size, stride=stride),
    }


def module_run(name: str, operation: str, maps: list[Tensor], grads: list[Tensor]) -> Run:
    """`SearchTransfer`, forward or with all its gradients, by a backend or by the reference."""
    module = reference.search_transfer if name == REFERENCE else SearchTransfer(backend=name)
    if operation == "SearchTransfer":
        return lambda: module(*maps)
    leaves = [x.detach().requires_grad_() for x in maps]
    return lambda: torch.autograd.grad(module(*leaves), leaves, grads)


def fold_job(
    name: str, operation: str, level: str, layout: str, kind: str, query: Grid, key: Grid
) -> tuple[Run, Callable[[], Run]]:
    """`fold_run` for `harness.peak_bytes`."""

    def prepare(query: Grid, key: Grid) -> Run:
        value, grad = make_maps(level, layout, query, key)
        index = make_index(kind, query, key)
        return fold_run(name, operation, value, grad, index, LEVELS[level][0])

    return prepare((4, 4), (4, 4)), lambda: prepare(query, key)


def module_job(name: str, operation: str, query: Grid, key: Grid) -> tuple[Run, Callable[[], Run]]:
    """`module_run` for `harness.peak_bytes`."""

    def prepare(query: Grid, key: Grid) -> Run:
        return module_run(name, operation, *make_features(query, key))

    return prepare((4, 4), (4, 4)), lambda: prepare(query, key)


# --- the run ---


def fold_cases(
    names: list[str], query: Grid, key: Grid, device: torch.device = CPU
) -> Iterator[tuple[dict, dict]]:
    """Descriptions of the cases of `gather_fold` and its adjoint, with their contenders."""
    for level, (stride, channels) in LEVELS.items():
        for kind in report.INDICES:
            index = make_index(kind, query, key, device)
            truths = fold_truths(*make_maps(level, "NCHW", query, key, device), index, stride)
            for layout in LAYOUTS:
                maps = make_maps(level, layout, query, key, device)
                for operation, truth in truths.items():
                    least = 2 * 4 * channels * stride**2 * index.numel() + index.nbytes
                    case = {
                        "operation": operation,
                        "level": level,
                        "layout": layout,
                        "index": kind,
                        "least_bytes": least,
                    }
                    yield (
                        case,
                        {
                            name: Contender(
                                deferred(fold_run, name, operation, *maps, index, stride),
                                _check(operation, ["result"], [truth]),
                                (fold_job, name, operation, level, layout, kind, query, key),
                            )
                            for name in names
                        },
                    )


def module_cases(
    names: list[str], query: Grid, key: Grid, device: torch.device = CPU
) -> Iterator[tuple[dict, dict]]:
    """The same for `SearchTransfer`."""
    maps, grads = make_features(query, key, device)
    doubles = [x.double() for x in maps]
    results = {
        "SearchTransfer": ["S", "T_lv3", "T_lv2", "T_lv1"],
        "with gradients": ["lrsr_lv3", "refsr_lv3", "ref_lv1", "ref_lv2", "ref_lv3"],
    }
    for operation, labels in results.items():
        truth = module_run(REFERENCE, operation, doubles, [x.double() for x in grads])()
        yield (
            {"operation": operation},
            {
                name: Contender(
                    module_run(name, operation, maps, grads),
                    _check(operation, labels, truth),
                    (module_job, name, operation, query, key),
                )
                for name in names
            },
        )


def _check(operation: str, labels: list[str], truth: Any) -> Callable[[Any], dict[str, float]]:
    return lambda result: check_close(labels, result, truth, TOLERANCE[operation])


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every case."""
    names = [*args.backends, REFERENCE]
    query, key = args.size.query, args.size.key
    data: dict[str, Any] = {
        "kind": "transfer",
        "machine": harness.machine(),
        "device": devices.describe(args.device),
        "seconds": args.seconds,
        "query": query,
        "key": key,
        "labels": {name: LABELS[name] for name in names},
        "cases": [],
    }
    copy, copied = harness.copy_run(args.device)
    total = len(LEVELS) * len(report.INDICES) * len(LAYOUTS) * 2 + 2  # directions; whole module
    with report.progress_bar(console) as progress:
        task = progress.add_task("transfer", total=total)
        for cases in (fold_cases, module_cases):
            for case, contenders in cases(names, query, key, args.device):
                title = " ".join(text for text in case.values() if isinstance(text, str))
                progress.update(task, description=title)
                if args.no_memory:
                    contenders = {name: replace(c, job=None) for name, c in contenders.items()}
                rows, timings = harness.measure(
                    contenders, {"copy": copy}, seconds=args.seconds, device=args.device
                )
                case["copy_bytes_per_s"] = copied / timings["copy"].median_s
                for row in rows.values():
                    if "least_bytes" in case and row["status"] == "ok":
                        row["bytes_per_s"] = case["least_bytes"] / row["median_s"]
                        row["copy_share"] = row["bytes_per_s"] / case["copy_bytes_per_s"]
                data["cases"].append(case | {"rows": rows})
                progress.advance(task)
    data["copy_bytes_per_s"] = median(case["copy_bytes_per_s"] for case in data["cases"])
    return data


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    known = [name for name in LABELS if name != REFERENCE]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add("--size", type=Size.parse, help=f"default: {SIZE}")
    add("--quick", action="store_true", help="small maps and short runs")
    add("--backends", nargs="*", choices=known, metavar="NAME", help="cpp torch")
    add("--no-memory", action="store_true", help="leave out memory, a process for each contender")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, help="time to spend on each candidate and case, default 0.5")
    add("--out", type=Path, default=Path("out"), help="folder for results and plot")
    args = parser.parse_args(argv)
    try:
        args.device = devices.pick(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--device: {error}")
    reasons = {name: backends.why_not(name, args.device) for name in known}
    for name in args.backends or ():
        if reasons[name] is not None:
            parser.error(f"--backends {name}: {reasons[name]}")
    if args.threads < 1:
        parser.error("--threads must be positive")
    if args.size is not None and args.size.batch != 1:
        parser.error("--size: this benchmark has one image")
    if args.backends is None:
        args.backends = [name for name in known if reasons[name] is None]
    args.size = args.size or Size.parse(QUICK_SIZE if args.quick else SIZE)
    args.seconds = args.seconds or (0.1 if args.quick else 0.5)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, report; 1 if a result was wrong."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    console = Console()
    data = run(args, console)
    stem = devices.stem(args.device, "transfer")
    harness.write_json(args.out / f"{stem}.json", data)
    report.draw(data, args.out / f"{stem}.png", console)
    console.print(report.transfer_table(data))
    rows = [row for case in data["cases"] for row in case["rows"].values()]
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
