"""The runner of all benchmarks: command line, cases, results and their report.

Results are one JSON format: kind, machine (with versions and commit), device, the labels of the
candidates, and cases with a row per candidate.
"""

import argparse
import os
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import measure
import report
import torch
from measure import Entry, deferred
from registry import Bench, Candidate, Case, Size
from text import bytes_text, seconds_text

from ttsr_fast.upscaling import plan

if TYPE_CHECKING:
    from rich.console import Console  # which the checks of a GPU do without

PIPE_WIDTH = 1000  # characters; rich assumes 80


class _Help(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names have hyphens


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=_Help)
    found.add_argument("--quick", action="store_true", help="small sizes and short runs")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    return found


def console() -> "Console":
    """Standard output. Tables in a pipe or a file have their full width."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def document(kind: str, device: torch.device, labels: dict[str, str]) -> dict[str, Any]:
    """Results without cases."""
    found = {"kind": kind, "machine": machine.facts(), "device": machine.describe(device)}
    return {**found, "labels": labels, "cases": []}


def set_threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)  # for libraries loaded later
    torch.set_num_threads(count)


def show(data: dict[str, Any], console: "Console") -> int:
    """Print all tables; 1 if a result was wrong."""
    for table in report.tables(data, full=True):
        title, *lines = ["", *table.lines(console.width)]
        console.print(title, *lines, sep="\n", markup=False, soft_wrap=True)
    rows = [row for case in data["cases"] for row in case["rows"].values()]
    return int(any(row["status"] == "failed" for row in rows))


def parse(bench: Bench, argv: list[str] | None) -> argparse.Namespace:
    """The command line of a benchmark, with device, names and sizes resolved."""
    found = parser(bench.description)
    add, names = found.add_argument, " ".join(bench.candidates)
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add(
        "--sizes", nargs="+", type=Size.parse, metavar="SIZE",
        help="measured in this order; default: by device",
    )  # fmt: skip
    add("--candidates", nargs="+", choices=bench.candidates, metavar="NAME", help=names)
    add("--no-memory", action="store_true", help="no memory: a process for each candidate")
    add("--seconds", type=float, help="time to spend on each candidate and case")
    add("--limit", type=float, help="skip what takes more seconds, except this package")
    bench.options(found)
    args = found.parse_args(argv)
    try:
        args.device = machine.pick(args.device)
    except (ValueError, RuntimeError) as error:
        found.error(f"--device: {error}")
    for name in args.candidates or ():
        reason = bench.candidates[name].why_not(args.device)
        if reason is not None:
            found.error(f"--candidates {name}: {reason}")
    kind = ("quick " if args.quick else "") + args.device.type
    args.named = args.candidates is not None
    args.candidates = args.candidates or [
        name for name, c in bench.candidates.items() if args.device.type in c.devices
    ]
    sizes, seconds, limit = bench.settings[kind]
    args.sizes = args.sizes or [Size.parse(text) for text in sizes.split()]
    args.seconds = seconds if args.seconds is None else args.seconds
    args.limit = limit if args.limit is None else args.limit
    problem = bench.resolve(args)
    if args.threads < 1 or problem:
        found.error(problem or "--threads must be positive")
    return args


def main(bench: Bench, argv: list[str] | None = None) -> int:
    """Measure all cases, write and show the results; 1 if a result was wrong."""
    args = parse(bench, argv)
    set_threads(args.threads)
    screen = console()
    labels = {name: bench.candidates[name].label for name in args.candidates}
    files: dict[Path, dict[str, Any]] = {}
    with screen.status("") as status:
        for case in bench.cases(args):
            path = args.out / f"{machine.stem(args.device, case_stem(bench, case))}.json"
            data = files.setdefault(path, document(bench.kind, args.device, labels))

            def on_progress(text: str, title: str = case.title) -> None:
                status.update(f"{title}: {text}")

            data["cases"].append(run_case(bench, case, data["cases"], args, on_progress))
            machine.write_json(path, data)
    failed = 0
    for data in files.values():
        failed |= show(data, screen)
    return failed


def case_stem(bench: Bench, case: Case) -> str:
    """Name of the file of a case: batches of a transfer and 16-bit types have their own."""
    dtype = case.facts.get("dtype", "float32").replace("float32", "")
    batch = "batch" if bench.kind == "transfer" and case.size.batch > 1 else ""
    return "-".join(filter(None, (bench.kind, batch, dtype)))


def run_case(
    bench: Bench,
    case: Case,
    before: list[dict[str, Any]],
    args: argparse.Namespace,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Facts and rows of a case."""
    rows: dict[str, dict[str, Any]] = {}
    for name in case.names:
        reason = why_not(bench, name, case, before, args)
        rows[name] = {} if reason is None else {"status": "skipped", "reason": reason}
    tried = [name for name in case.names if not rows[name]]
    inputs = bench.inputs(*case.place, args.device)
    entries = {name: entry(bench, name, case, inputs, args) for name in tried}
    records, timings = measure.measure(
        entries,
        {name: run for name, (run, _) in case.rooflines.items()},
        seconds=args.seconds,
        device=args.device,
        on_progress=on_progress,
    )
    rows |= records
    rates = {name: case.rooflines[name][1] / t.median_s for name, t in timings.items()}
    right = {name: row for name, row in rows.items() if row["status"] == "ok"}
    facts = {"operation": case.operation, "title": case.title, **case.size.facts, **case.facts}
    return {**facts, **case.finish(right, rates), "rows": rows}


def why_not(
    bench: Bench,
    name: str,
    case: Case,
    before: list[dict[str, Any]],
    args: argparse.Namespace,
) -> str | None:
    """The reason why a candidate is not tried, None if it is."""
    candidate = bench.candidates[name]
    reason = candidate.why_not(args.device) or case.skip(candidate)
    if reason is not None:
        return reason
    needed = candidate.bytes_needed(case.size, case.operation)
    if needed > plan.free_bytes(args.device):
        return f"does not fit (needs {bytes_text(needed)})"
    timed = [
        earlier["rows"][name]["median_s"] * case.size.pairs / earlier["pairs"]
        for earlier in before
        if earlier["operation"] == case.operation and "median_s" in earlier["rows"].get(name, {})
    ]
    if timed and timed[-1] > args.limit and name not in bench.subjects:
        return f"skipped (estimated {seconds_text(timed[-1])})"
    return None


def entry(
    bench: Bench, name: str, case: Case, inputs: tuple[Any, ...], args: argparse.Namespace
) -> Entry:
    """A candidate at a case, to be measured."""
    candidate, device = bench.candidates[name], args.device
    run = deferred(candidate.prepare, *inputs)
    run = deferred(measure.graph_run, run) if candidate.graph else run
    check = partial(case.check, candidate)
    if args.no_memory or not is_weighed(candidate, case, device):
        return Entry(run, check)
    if device.type == "cuda":
        return Entry(run, check, partial(measure.peak_bytes_on_gpu, run, device))
    job = (measure.candidate_job, bench.kind, name, case.place)
    return Entry(run, check, partial(measure.peak_bytes, *job))


def is_weighed(candidate: Candidate, case: Case, device: torch.device) -> bool:
    """False also where a process of its own would count the memory of a compiler."""
    if device.type == "cpu" and (candidate.graph or candidate.compiled):
        return False
    return case.weighed
