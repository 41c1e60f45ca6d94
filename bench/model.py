"""Time and memory of `SearchTransfer` and of TTSR, against their original form.

    python bench/model.py                        ten minutes on a small CPU
    python bench/model.py --quick                small maps, under a minute
    python bench/model.py --sizes 270x480        maps of SearchTransfer
    python bench/model.py --pair 88x125:368x500  image and reference of TTSR

`SearchTransfer` forward, and with all its gradients where there are not too
many pairs of positions; on a GPU also replayed from a CUDA graph. Then TTSR:
forward on an image with its reference, and a training step (L1, backward, Adam)
on a batch of patches, with the time of every stage. The original form is
`ttsr_fast.reference.search_transfer`, in the same model; float32 is float32
throughout.

Writes a result file and a plot into the folder `--out` (`model.json` on the
CPU, `<gpu>-model.json` otherwise). Exits with status 1 if any result was wrong;
no time is reported for that one.
"""

import argparse
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
import memory
import model_runs
import peers
import report
import tables
import terminal
import text
import torch
from devices import Run
from gate import SearchTruth, check_close
from harness import Contender, deferred
from model_runs import ORIGINAL, VARIANTS, Subject
from rich.console import Console
from sizes import Size
from torch import Tensor
from transfer import LEVELS

from ttsr_fast import reference

SIZES = {
    "cpu": ("9*40x40", "88x125:92x125", "160x160", "270x480"),
    "cuda": ("9*40x40", "88x125:92x125", "270x480"),
}
QUICK_SIZES = {"cpu": ("2*16x16", "22x31:23x31"), "cuda": ("9*40x40",)}
PAIR, QUICK_PAIR = "88x125:368x500", "12x16:48x60"
PATCH, QUICK_PATCH = "40x40", "10x10"
BATCH = {"cpu": 2, "cuda": 9}  # as published on a GPU; a CPU takes long enough for two
SUBJECTS = ("cpp", "default")  # tried at every size
PAIRS = 1 << 27  # beyond which the forward pass alone is measured and some of its queries checked
SIDE, MARGIN = 16, 2  # of a window of queries, and of what is wrong at the sides it was cut at
MAPS = ["S", "T_lv3", "T_lv2", "T_lv1"]
STRIDES = (1, 1, 2, 4)
GRADIENTS = ["lrsr_lv3", "refsr_lv3", "ref_lv1", "ref_lv2", "ref_lv3"]
MODEL = ("TTSR", "training step")
STAGE_RUNS = 3
TOLERANCE = {"SearchTransfer": 5e-6, "with gradients": 1e-5}

Check = Callable[[Any], dict[str, float]]
Place = list[tuple[int, int]]  # first and last, exclusive, of rows and columns
Window = tuple[Place, list[Tensor]]


# --- the gates ---


def module_check(operation: str, size: Size, maps: list[Tensor], grads: list[Tensor]) -> Check:
    """`SearchTransfer` against float64: all of it, or three windows where that is too much."""
    if size.pairs > PAIRS:
        return partial(check_windows, windows(maps))
    doubles = ([x.double() for x in tensors] for tensors in (maps, grads))
    truth = model_runs.module_run(ORIGINAL, operation, *doubles)()
    names = MAPS if operation == "SearchTransfer" else GRADIENTS
    return lambda result: check_close(names, result, truth, TOLERANCE[operation])


def windows(maps: list[Tensor]) -> list[Window]:
    """Two corners and the middle."""
    corners = ([part * max(0, n - SIDE) // 2 for n in maps[0].shape[2:]] for part in (0, 1, 2))
    return [window(maps, y, x) for y, x in corners]


def window(maps: list[Tensor], y: int, x: int) -> Window:
    """Where a window of the first image lies, and what `SearchTransfer` gives there in float64.

    The queries of the window are searched in all keys, and the oracle transfers what of the values
    they have found. Next to the sides that were cut neither is right, and that is left out.
    """
    lrsr, refsr, *values = maps
    query = lrsr[:1, :, y : y + SIDE, x : x + SIDE]
    grid = query.shape[2:]
    found = SearchTruth(query, refsr[:1], limit=grid.numel())
    kept = [
        (MARGIN * (start > 0), n - MARGIN * (start + n < whole))
        for start, n, whole in zip((y, x), grid, lrsr.shape[2:], strict=True)
    ]
    columns = refsr.shape[3]
    # From the grid of all keys to that of the box that the window's right matches lie in.
    sure = tuple(slice(max(0, first - 1), last + 1) for first, last in kept)
    box, place = [], []
    for at in (found.index // columns, found.index % columns):
        low, high = (int(end) for end in at.view(grid)[sure].aminmax())
        box.append((max(0, low - 1), high + 2))
        place.append(at.clamp(low, high).view(1, *grid) - box[-1][0])
    width = min(box[1][1], columns) - box[1][0]
    truth = [found.best.view(1, 1, *grid)]
    for value, stride in zip(reversed(values), STRIDES[1:], strict=True):
        rows, cols = (slice(stride * low, stride * high) for low, high in box)
        index = place[0] * width + place[1]
        truth.append(reference.gather_fold(value[:1, :, rows, cols].double(), index, stride=stride))
    inner = [cut(t, kept, stride) for t, stride in zip(truth, STRIDES, strict=True)]
    (top, bottom), (left, right) = kept
    return [(y + top, y + bottom), (x + left, x + right)], inner


def cut(x: Tensor, place: Place, stride: int) -> Tensor:
    rows, columns = (slice(stride * first, stride * last) for first, last in place)
    return x[:1, :, rows, columns]


def check_windows(parts: list[Window], result: list[Tensor]) -> dict[str, float]:
    """Hold a result of `SearchTransfer` against windows of it."""
    worst, checked = 0.0, 0
    for place, truth in parts:
        found = [cut(x, place, stride) for x, stride in zip(result, STRIDES, strict=True)]
        error = check_close(MAPS, found, truth, TOLERANCE["SearchTransfer"])
        worst, checked = max(worst, error["max_relative_error"]), checked + truth[0].numel()
    return {"max_relative_error": worst, "checked_queries": checked}


def model_check(operation: str, truth: tuple[Tensor, ...]) -> Check:
    """The model's results, or loss and gradient of a training step, against float64.

    The gradient jumps where rounding turns over the sign of a residual, of which L1 has one per
    pixel, or that of an activation.
    """
    if operation == "TTSR":
        return partial(check_picture, truth)

    def check(result: tuple[Tensor, ...]) -> dict[str, float]:
        check_close(["loss"], result[:1], truth[:1], 1e-5)
        return check_close(["gradient"], result[1:], truth[1:], 1e-2)

    return check


def check_picture(truth: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> dict[str, float]:
    """All maps, or with convolutions in 16 bits the picture and the scores, which stay exact."""
    if len(result) == len(truth):
        return check_close(["sr", *MAPS], result, truth, 1e-4)
    check_close(["S"], result[1:], truth[1:2], 1e-5)
    return check_close(["sr"], result[:1], truth[:1], 2e-2)


# --- the cases ---


def module_cases(
    args: argparse.Namespace, before: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Contender], dict[str, Any]]]:
    """Descriptions, contenders and rows of those that are not tried, for `SearchTransfer`."""
    for size in sorted(args.sizes, key=lambda size: size.pairs):
        maps, grads = model_runs.make_features(size, args.device)
        for operation in TOLERANCE:
            if operation == "with gradients" and size.pairs > PAIRS:
                continue
            title = text.size_title(vars(size))
            case = {"operation": operation, "title": title, **vars(size), "pairs": size.pairs}
            names = [name for name in args.names if VARIANTS[name].amp is None]
            why = {name: why_not(name, operation, size, before, args) for name in names}
            skipped = {n: {"status": "skipped", "reason": why[n]} for n in why if why[n]}
            check = module_check(operation, size, maps, grads)
            contenders = {
                name: Contender(
                    module_runner(name, operation, maps, grads),
                    check,
                    None
                    if VARIANTS[name].graph
                    else (model_runs.module_job, name, operation, size),
                )
                for name in names
                if not why[name]
            }
            yield case, contenders, skipped


def module_runner(name: str, operation: str, maps: list[Tensor], grads: list[Tensor]) -> Run:
    run = model_runs.module_run(name, operation, maps, grads)
    return deferred(devices.graph_run, run) if VARIANTS[name].graph else run


def why_not(
    name: str, operation: str, size: Size, before: list[dict[str, Any]], args: argparse.Namespace
) -> str | None:
    """Why a variant is not tried at a size, None if it is."""
    if name == ORIGINAL:
        needed = bytes_needed(size, operation)
        if needed > memory.available_bytes(args.device):
            return f"does not fit (needs {text.bytes_text(needed)})"
    timed = [
        case
        for case in before
        if case["operation"] == operation and "median_s" in case["rows"].get(name, {})
    ]
    if timed and name not in SUBJECTS:
        estimate = timed[-1]["rows"][name]["median_s"] * size.pairs / timed[-1]["pairs"]
        if estimate > args.limit:
            return f"skipped (estimated {text.seconds_text(estimate)})"
    return None


def bytes_needed(size: Size, operation: str) -> int:
    """What the original form takes: all scores and the unfolded features, or those of level 1.

    With gradients it took 2.4 times as much wherever it was measured.
    """
    stride, channels = LEVELS["lv1"]
    patches = 4 * 9 * channels * stride**2 * size.batch * (size.queries + size.keys)
    forward = max(peers.PEERS[peers.ORACLE].bytes_needed(size, 256), patches)
    return forward * 12 // 5 if operation == "with gradients" else forward


def model_cases(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], dict[str, Subject]]]:
    """Descriptions and subjects, for the whole model."""
    patch = args.patch.query
    training = Size(patch, (4 * patch[0], 4 * patch[1]), args.batch)
    texts = (
        f"LR {text.size_title({**vars(args.pair), 'key': args.pair.query})}, "
        f"reference {'x'.join(map(str, args.pair.key))}",
        f"LR {text.size_title({**vars(training), 'key': patch})}",
    )
    for operation, size, title in zip(MODEL, (args.pair, training), texts, strict=True):
        names = [name for name in args.names if not VARIANTS[name].graph]
        if operation != "TTSR":
            names = [name for name in names if VARIANTS[name].amp is None]
        subjects = {name: Subject(name, operation, size, args.device) for name in names}
        yield {"operation": operation, "title": title, **vars(size)}, subjects


# --- the run ---


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every case, writing the results after each."""
    path = args.out / f"{devices.stem(args.device, 'model')}.json"
    data: dict[str, Any] = {
        "kind": "model",
        "machine": harness.machine(),
        "device": devices.describe(args.device),
        "seconds": args.seconds,
        "labels": {name: VARIANTS[name].label for name in args.names},
        "cases": [],
    }
    total = sum(1 + (size.pairs <= PAIRS) for size in args.sizes) + len(MODEL)
    with terminal.progress_bar(console) as progress:
        task = progress.add_task("", total=total)

        def measure(case: dict[str, Any], contenders: dict[str, Contender]) -> dict[str, Any]:
            name = f"{case['operation']}, {case['title']}"
            if args.no_memory:
                contenders = {n: replace(c, job=None) for n, c in contenders.items()}
            rows, _ = harness.measure(
                contenders,
                {},
                seconds=args.seconds,
                device=args.device,
                step=lambda text: progress.update(task, description=f"{name}: {text}"),
            )
            return rows

        def keep(case: dict[str, Any], rows: dict[str, Any]) -> None:
            rows = {name: rows[name] for name in args.names if name in rows}
            data["cases"].append(case | {"rows": rows})
            harness.write_json(path, data)
            progress.advance(task)

        for case, contenders, skipped in module_cases(args, data["cases"]):
            keep(case, measure(case, contenders) | skipped)
        for case, subjects in model_cases(args):
            keep(case, measure_model(case, subjects, measure))
    return data


def measure_model(
    case: dict[str, Any],
    subjects: dict[str, Subject],
    measure: Callable[[dict[str, Any], dict[str, Contender]], dict[str, Any]],
) -> dict[str, Any]:
    """Rows of a case of the whole model, with its stages: medians, in turns as all times."""
    operation = case["operation"]
    first = next(iter(subjects.values()))
    truth = Subject(ORIGINAL, operation, first.size, first.device, torch.float64).run()
    check = model_check(operation, truth)
    contenders = {
        name: Contender(subject.run, check, (model_runs.subject_job, name, operation, subject.size))
        for name, subject in subjects.items()
    }
    rows = measure(case, contenders)
    whole = [name for name in subjects if VARIANTS[name].amp is None]
    right = [name for name in whole if rows[name]["status"] == "ok"]
    taken = [{name: subjects[name].stages() for name in right} for _ in range(STAGE_RUNS)]
    for name in right:
        rows[name]["stages_s"] = {
            stage: median(run[name][stage] for run in taken) for stage in taken[0][name]
        }
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with device, names and sizes resolved."""
    parser = terminal.parser(__doc__)
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add("--sizes", nargs="+", type=Size.parse, metavar="SIZE", help="default: by device")
    add("--pair", type=Size.parse, metavar="LR:REF", help=f"pixels, default: {PAIR}")
    add("--patch", type=Size.parse, metavar="LR", help=f"of a training step, default: {PATCH}")
    add("--batch", type=int, help="of a training step, default: 9 on a GPU, 2 on the CPU")
    add("--quick", action="store_true", help="small maps and images, short runs")
    add("--backends", nargs="+", choices=VARIANTS, metavar="NAME", help=" ".join(VARIANTS))
    add("--no-memory", action="store_true", help="leave out memory, a process for each contender")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, help="time to spend on each variant and case")
    add("--limit", type=float, default=60.0, help="skip what takes more seconds, but never ours")
    add("--no-plot", action="store_true", help="leave out the plot")
    add("--out", type=Path, default=Path("out"), help="folder for results and plot")
    args = parser.parse_args(argv)
    try:
        args.device = devices.pick(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--device: {error}")
    kind, quick = args.device.type, args.quick
    for name in args.backends or ():
        reason = VARIANTS[name].why_not(args.device)
        if reason is not None:
            parser.error(f"--backends {name}: {reason}")
    args.names = args.backends or [
        name
        for name, variant in VARIANTS.items()
        if kind in variant.devices and variant.why_not(args.device) is None
    ]
    args.sizes = args.sizes or [Size.parse(x) for x in (QUICK_SIZES if quick else SIZES)[kind]]
    args.pair = args.pair or Size.parse(QUICK_PAIR if quick else PAIR)
    args.patch = args.patch or Size.parse(QUICK_PATCH if quick else PATCH)
    args.batch = (1 if quick else BATCH[kind]) if args.batch is None else args.batch
    args.seconds = args.seconds or (0.1 if quick else 1.0)
    if args.threads < 1 or args.batch < 1:
        parser.error("--threads and --batch must be positive")
    if args.pair.queries * args.pair.keys > 16 * PAIRS:
        parser.error("--pair is too large for the float64 model that its results are held against")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, report; 1 if a result was wrong."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # of convolutions, where it is torch's default
    console = terminal.console()
    data = run(args, console)
    if not args.no_plot:
        report.draw(data, args.out / f"{devices.stem(args.device, 'model')}.png", console)
    for table in tables.model_tables(data):
        console.print(table)
    rows = [row for case in data["cases"] for row in case["rows"].values()]
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
