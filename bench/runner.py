"""The runner of all benchmarks: command line, cases, and results in one JSON format."""

import argparse
import os
import textwrap
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import machine
import measure
import report
import torch
from measure import Entry, deferred
from registry import Case, Size
from report import bytes_text, seconds_text

from ttsr_fast.upscaling import memory

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
    """Print all tables; 1 if a result was wrong, or none is there."""
    for table in report.tables(data, full=True):
        title, *lines = ["", *table.lines(console.width)]
        console.print(title, *lines, sep="\n", markup=False, soft_wrap=True)
    states = {row["status"] for case in data["cases"] for row in case["rows"].values()}
    return int("failed" in states or "ok" not in states)


def parse(bench: ModuleType, argv: list[str] | None) -> argparse.Namespace:
    """The command line of a benchmark, with device, names and sizes resolved."""
    found = parser(bench.__doc__)
    add, names = found.add_argument, " ".join(bench.CANDIDATES)
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add(
        "--sizes", nargs="+", type=Size.parse, metavar="SIZE",
        help="measured in this order; default: by device",
    )  # fmt: skip
    add("--candidates", nargs="+", choices=bench.CANDIDATES, metavar="NAME", help=names)
    add("--no-memory", action="store_true", help="no memory: a process for each candidate")
    add("--seconds", type=float, help="time to spend on each candidate and case")
    add("--limit", type=float, help="skip what takes more seconds, except this package")
    bench.options(found)
    args = found.parse_args(argv)
    try:
        args.device = machine.pick(args.device)
    except (ValueError, RuntimeError) as error:
        found.error(f"--device: {error}")
    kind = ("quick " if args.quick else "") + args.device.type
    args.named = args.candidates is not None
    args.candidates = args.candidates or [
        name for name, c in bench.CANDIDATES.items() if args.device.type in c.devices
    ]
    sizes, seconds, limit = bench.SETTINGS[kind]
    args.sizes = args.sizes or [Size.parse(text) for text in sizes.split()]
    args.seconds = seconds if args.seconds is None else args.seconds
    args.limit = limit if args.limit is None else args.limit
    problem = bench.resolve(args)
    if args.threads < 1 or problem:
        found.error(problem or "--threads must be positive")
    return args


def main(bench: ModuleType, argv: list[str] | None = None) -> int:
    """Measure all cases, write and show the results; 1 if a result was wrong."""
    args = parse(bench, argv)
    set_threads(args.threads)
    screen, runner = console(), Runner(bench, args)
    labels = {name: bench.CANDIDATES[name].label for name in args.candidates}
    files: dict[Path, dict[str, Any]] = {}
    with screen.status("") as status:
        for case in bench.cases(args):
            path = args.out / f"{machine.stem(args.device, case_stem(bench, case))}.json"
            data = files.setdefault(path, document(bench.KIND, args.device, labels))
            status.update(case.title)
            data["cases"].append(runner.run_case(case, data["cases"]))
            machine.write_json(path, data)
    return max([show(data, screen) for data in files.values()])


def case_stem(bench: ModuleType, case: Case) -> str:
    """Name of the file of a case: batches of a transfer and 16-bit types have their own."""
    dtype = case.facts.get("dtype", "float32").replace("float32", "")
    batch = "batch" if bench.KIND == "transfer" and case.size.batch > 1 else ""
    return "-".join(filter(None, (bench.KIND, batch, dtype)))


class Runner(NamedTuple):
    """A benchmark with its options."""

    bench: ModuleType
    args: argparse.Namespace

    def run_case(self, case: Case, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Facts and rows of a case."""
        reasons = {name: self.why_not(name, case, before) for name in case.names}
        rows = {name: {"status": "skipped", "reason": reason} for name, reason in reasons.items()}
        inputs = self.bench.inputs(*case.place, self.args.device)
        records, timings = measure.measure(
            {name: self.entry(name, case, inputs) for name in reasons if reasons[name] is None},
            {name: run for name, (run, _) in case.rooflines.items()},
            seconds=self.args.seconds,
            device=self.args.device,
        )
        rows |= records
        rates = {name: case.rooflines[name][1] / t.median_s for name, t in timings.items()}
        right = {name: row for name, row in rows.items() if row["status"] == "ok"}
        facts = {"operation": case.operation, "title": case.title, **case.size.facts, **case.facts}
        return {**facts, **case.finish(right, rates), "rows": rows}

    def why_not(self, name: str, case: Case, before: list[dict[str, Any]]) -> str | None:
        """The reason why a candidate is not tried, None if it is."""
        candidate = self.bench.CANDIDATES[name]
        reason = candidate.why_not(self.args.device) or case.skip(candidate)
        if reason is not None:
            return reason
        needed = candidate.bytes_needed(case.size, case.operation)
        if needed > memory.free_bytes(self.args.device):
            return f"does not fit (needs {bytes_text(needed)})"
        seconds = 0.0
        for earlier in before:
            row = earlier["rows"].get(name, {})
            if earlier["operation"] == case.operation and "median_s" in row:
                seconds = row["median_s"] * case.size.pairs / earlier["pairs"]
        if seconds > self.args.limit and name not in self.bench.SUBJECTS:
            return f"skipped (estimated {seconds_text(seconds)})"
        return None

    def entry(self, name: str, case: Case, inputs: tuple[Any, ...]) -> Entry:
        """A candidate at a case, to be measured."""
        candidate, device = self.bench.CANDIDATES[name], self.args.device
        run = deferred(candidate.prepare, *inputs)
        run = deferred(measure.graph_run, run) if candidate.graph else run
        check = partial(case.check, candidate)
        # A process of its own would also count the memory of a compiler.
        alone = device.type == "cpu" and (candidate.graph or candidate.compiled)
        if self.args.no_memory or alone or not case.weighed:
            return Entry(run, check)
        if device.type == "cuda":
            return Entry(run, check, partial(measure.peak_bytes_on_gpu, run, device))
        job = (measure.candidate_job, self.bench.KIND, name, case.place)
        return Entry(run, check, partial(measure.peak_bytes, *job))
