"""Time and memory of the transfer at TTSR's three levels, against its peers.

    python bench/transfer.py                  queries 88x125, keys 92x125
    python bench/transfer.py --size 9*40x40   nine images, as in training
    python bench/transfer.py --quick          small maps, without torch.compile
    python bench/transfer.py --device cuda    the default where there is a GPU

`gather_fold` and its adjoint (the gradient to the value) at each level and at
all three together, with contiguous and channels-last maps and with random,
coherent and all-to-one indices. Peers other than unfold, gather and fold take
part in all three together, unless they are named by `--peers`. Memory is that
with random indices. Writes a result file and a plot into the folder `--out`
(`transfer.json` on the CPU, `<gpu>-transfer.json` otherwise; `-batch` and the
type follow where they are not the default). Exits with status 1 if any result
was wrong; no time is reported for it.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import devices
import harness
import report
import tables
import terminal
import torch
import torch.nn.functional as F
import transfer_peers as peers
from devices import CPU
from gate import WrongResult, check_close
from harness import Contender, Declined, Run, deferred
from rich.console import Console
from sizes import Size
from torch import Tensor

from ttsr_fast import reference

LEVELS = {"lv1": (4, 64), "lv2": (2, 128), "lv3": (1, 256)}  # stride, channels
TOGETHER = "all three"
GROUPS = {**{level: (level,) for level in LEVELS}, TOGETHER: tuple(LEVELS)}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float16, torch.bfloat16)}
SIZES = {"cpu": ("88x125:92x125",), "cuda": ("9*40x40", "88x125:92x125")}
QUICK_SIZES = {"cpu": ("22x31:23x31",), "cuda": ("9*40x40",)}
TOLERANCE = {"gather_fold": 1e-6, "adjoint": 1e-5}


# --- inputs, made on the CPU and the same on every device ---


def make_index(kind: str, size: Size, device: torch.device = CPU) -> Tensor:  # [N, H, W]
    """Key positions: independent, along a smooth flow, or all the same."""
    with CPU:
        return _make_index(kind, size).to(device)


def _make_index(kind: str, size: Size) -> Tensor:
    grid, (height, width) = (size.batch, *size.query), size.key
    if kind == "random":
        generator = torch.Generator().manual_seed(2)
        return torch.randint(height * width, grid, generator=generator)
    if kind == "all to one":
        return torch.full(grid, height // 2 * width + width // 2)
    y, x = (torch.linspace(0, 1, n) for n in size.query)
    phase = torch.arange(size.batch)[:, None, None] / size.batch
    wave = 0.03 * torch.sin(2 * math.pi * (y[:, None] + 2 * x + phase))
    row = ((y[:, None] + wave).clamp(0, 1) * (height - 1)).round().long()
    column = ((x - wave).clamp(0, 1) * (width - 1)).round().long()
    return row * width + column


def make_maps(
    group: str, layout: str, size: Size, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[peers.Maps, peers.Maps]:
    """Values and gradients of the outputs of every level, normally distributed."""
    maps: tuple[list[Tensor], list[Tensor]] = ([], [])
    for level in GROUPS[group]:
        stride, channels = LEVELS[level]
        with CPU:
            generator = torch.Generator().manual_seed(0)
            for found, (h, w) in zip(maps, (size.key, size.query), strict=True):
                shape = (size.batch, channels, stride * h, stride * w)
                x = torch.randn(shape, generator=generator).to(device, dtype)
                found.append(x.contiguous(memory_format=LAYOUTS[layout]))
    return tuple(maps[0]), tuple(maps[1])


def strides_of(group: str) -> tuple[int, ...]:
    return tuple(LEVELS[level][0] for level in GROUPS[group])


# --- what is measured ---


def truths(group: str, index: Tensor, values: peers.Maps, grads: peers.Maps) -> dict[str, list]:
    """What both operations give in float64."""
    levels = list(zip(values, grads, strides_of(group), strict=True))
    return {
        "gather_fold": [reference.gather_fold(v.double(), index, stride=s) for v, _, s in levels],
        "adjoint": [
            reference.gather_fold_adjoint(g.double(), index, None, list(v.shape), stride=s)
            for v, g, s in levels
        ],
    }


def least_bytes(
    operation: str, index: Tensor, key: tuple[int, int], values: peers.Maps, grads: peers.Maps
) -> int:
    """What any implementation has to move: the index, and every input and output once.

    Of a value only the blocks are counted that some patch covers. The gradient to it is written
    whole, zeros and all. What fits a cache can move faster than a copy that does not.
    """
    chosen = torch.zeros(len(index), key[0] * key[1], device=index.device)
    covered = F.max_pool2d(chosen.scatter_(1, index.flatten(1), 1).view(-1, 1, *key), 3, 1, 1)
    share = 1.0 if operation == "adjoint" else covered.mean().item()
    maps = (round(share * v.nbytes) + g.nbytes for v, g in zip(values, grads, strict=True))
    return index.nbytes + sum(maps)


def check(
    name: str, operation: str, dtype: torch.dtype, truth: list[Tensor], result: peers.Maps
) -> dict[str, float]:
    """The gate; peers that add in 16 bits may decline it."""
    tolerance = max(TOLERANCE[operation], 2 * torch.finfo(dtype).eps)
    try:
        return check_close([f"result {n}" for n in range(len(truth))], result, truth, tolerance)
    except WrongResult as error:
        if name in peers.OURS or dtype == torch.float32:
            raise
        raise Declined(f"in {dtype} its {error}") from error


def job(
    name: str, operation: str, group: str, layout: str, kind: str, size: Size, dtype: torch.dtype
) -> tuple[Run, Callable[[], Run]]:
    """A candidate's run as `memory.peak_bytes` takes it."""

    def prepare(size: Size) -> Run:
        maps, index = make_maps(group, layout, size, dtype), make_index(kind, size)
        return peers.run(name, operation, *maps, index, strides_of(group))

    return prepare(Size((4, 4), (4, 4), size.batch)), lambda: prepare(size)


# --- the run ---


def cases(
    names: dict[str, list[str]], size: Size, dtype: torch.dtype, device: torch.device = CPU
) -> Iterator[tuple[dict[str, Any], dict[str, Contender]]]:
    """Descriptions of the cases of every group of levels in `names`, with their contenders."""
    for group in names:
        for kind in tables.INDICES:
            index = make_index(kind, size, device)
            wanted = truths(group, index, *make_maps(group, "NCHW", size, dtype, device))
            for layout in LAYOUTS:
                maps = make_maps(group, layout, size, dtype, device)
                for operation, truth in wanted.items():
                    case = {"operation": operation, "level": group, "layout": layout, "index": kind}
                    case["least_bytes"] = least_bytes(operation, index, size.key, *maps)
                    inputs = (*maps, index, strides_of(group))
                    place = (operation, group, layout, kind, size, dtype)
                    yield (
                        case,
                        {
                            name: Contender(
                                make_run(name, operation, inputs),
                                partial(check, name, operation, dtype, truth),
                                (job, name, *place) if is_weighed(name, kind, device) else None,
                            )
                            for name in names[group]
                            if operation in peers.ALL[name].operations
                        },
                    )


def is_weighed(name: str, kind: str, device: torch.device) -> bool:
    """Whether memory is measured: in a process of its own a compiler's would be, too."""
    return kind == tables.INDICES[0] and (device.type != "cpu" or not peers.ALL[name].compiled)


def make_run(name: str, operation: str, inputs: tuple[Any, ...]) -> Run:
    """A candidate's run, made at its first call."""
    candidate = peers.ALL[name]
    if candidate.graph:
        return deferred(devices.graph_run, peers.run(name, operation, *inputs))
    made = deferred(peers.run, name, operation, *inputs)
    return partial(peers.declining, made) if candidate.compiled else made


def names_at(group: str, args: argparse.Namespace) -> list[str]:
    """The candidates that are measured at a group of levels."""
    everywhere = args.named or group == TOGETHER
    return [*args.backends, *(n for n in args.peers if everywhere or n == peers.REFERENCE)]


def run(size: Size, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every case of a size, writing the results after each."""
    names = {group: names_at(group, args) for group in args.levels}
    data: dict[str, Any] = {
        "kind": "transfer",
        "machine": harness.machine(),
        "device": devices.describe(args.device),
        "seconds": args.seconds,
        **vars(size),
        "dtype": args.dtype,
        "labels": {name: peers.ALL[name].label for name in [*args.backends, *args.peers]},
        "cases": [],
    }
    copy, copied = harness.copy_run(args.device)
    total = len(names) * len(tables.INDICES) * len(LAYOUTS) * len(TOLERANCE)
    with terminal.progress_bar(console) as progress:
        task = progress.add_task("transfer", total=total)
        for case, contenders in cases(names, size, DTYPES[args.dtype], args.device):
            title = " ".join(text for text in case.values() if isinstance(text, str))
            progress.update(task, description=title)
            if args.no_memory:
                contenders = {n: Contender(c.run, c.check, None) for n, c in contenders.items()}
            rows, timings = harness.measure(
                contenders, {"copy": copy}, seconds=args.seconds, device=args.device
            )
            case["copy_bytes_per_s"] = copied / timings["copy"].median_s
            for row in rows.values():
                if row["status"] == "ok":
                    row["bytes_per_s"] = case["least_bytes"] / row["median_s"]
                    row["copy_share"] = row["bytes_per_s"] / case["copy_bytes_per_s"]
            data["cases"].append(case | {"rows": rows})
            data["copy_bytes_per_s"] = median(case["copy_bytes_per_s"] for case in data["cases"])
            harness.write_json(args.out / f"{stem(size, args)}.json", data)
            progress.advance(task)
    return data


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with device, names and sizes resolved."""
    parser = terminal.parser(__doc__)
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add("--size", nargs="+", type=Size.parse, metavar="SIZE", help="default: by device")
    text = f"{', '.join(map(repr, GROUPS))}; default: all; with --quick the last"
    add("--levels", nargs="+", choices=GROUPS, metavar="LEVEL", help=text)
    add("--dtype", choices=DTYPES, default="float32")
    add("--quick", action="store_true", help="small maps and short runs")
    add("--backends", nargs="*", choices=peers.OURS, metavar="NAME", help=" ".join(peers.OURS))
    add("--peers", nargs="*", choices=peers.PEERS, metavar="NAME", help=" ".join(peers.PEERS))
    add("--no-peers", action="store_true", help="only the backends of this package")
    add("--no-memory", action="store_true", help="leave out memory, a process for each contender")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, help="time to spend on each candidate and case")
    add("--no-plot", action="store_true", help="leave out the plot")
    add("--out", type=Path, default=Path("out"), help="folder for results and plots")
    args = parser.parse_args(argv)
    try:
        args.device = devices.pick(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--device: {error}")
    reasons = {name: peers.OURS[name].why_not(args.device) for name in peers.OURS}
    for name in args.backends or ():
        if reasons[name] is not None:
            parser.error(f"--backends {name}: {reasons[name]}")
    if args.threads < 1:
        parser.error("--threads must be positive")
    if args.backends is None:
        args.backends = [name for name in peers.OURS if reasons[name] is None]
    args.named = args.peers is not None
    if args.peers is None:
        args.peers = [n for n, c in peers.PEERS.items() if not (args.quick and c.compiled)]
    args.peers = [] if args.no_peers else args.peers
    args.levels = args.levels or ([TOGETHER] if args.quick else list(GROUPS))
    sizes = (QUICK_SIZES if args.quick else SIZES)[args.device.type]
    args.size = args.size or [Size.parse(text) for text in sizes]
    args.seconds = args.seconds or (0.05 if args.quick else 0.15)
    return args


def stem(size: Size, args: argparse.Namespace) -> str:
    """Name of the files of a size."""
    parts = ["transfer", "batch" * (size.batch > 1), args.dtype.replace("float32", "")]
    return devices.stem(args.device, "-".join(filter(None, parts)))


def main(argv: list[str] | None = None) -> int:
    """Measure, report; 1 if a result was wrong."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    console = terminal.console()
    failed = False
    for size in args.size:
        data = run(size, args, console)
        if not args.no_plot:
            report.draw(data, args.out / f"{stem(size, args)}.png", console)
        console.print(tables.transfer_table(data))
        rows = [row for case in data["cases"] for row in case["rows"].values()]
        failed |= any(row["status"] == "failed" for row in rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
