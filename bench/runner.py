"""The runner of all benchmarks: command line, cases, and results in one JSON format."""

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import machine
import measure
import report
import torch
from measure import Entry, deferred
from registry import Case, Size
from report import bytes_text, seconds_text

from ttsr_fast.upscaling import memory

IN_A_PIPE = (1000, 24)  # columns and lines, where there is no terminal


def positive(text: str) -> int:
    """The type of an option."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return int(text)


def parser(description: str | None) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="small sizes and short runs")
    found.add_argument("--threads", type=positive, default=torch.get_num_threads())
    found.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    return found


def document(kind: str, device: torch.device, labels: dict[str, str]) -> dict[str, Any]:
    """Results without cases."""
    found = {"kind": kind, "machine": machine.facts(), "device": machine.describe(device)}
    return {**found, "labels": labels, "cases": []}


def set_threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)  # for libraries loaded later
    torch.set_num_threads(count)


def show(data: dict[str, Any]) -> int:
    """Print all tables; 1 if a result was wrong, or none is there."""
    for table in report.tables(data, full=True):
        print("", *table.lines(shutil.get_terminal_size(IN_A_PIPE).columns), sep="\n")
    states = {row["status"] for case in data["cases"] for row in case["rows"].values()}
    return int("failed" in states or "ok" not in states)


def parse(bench: ModuleType, argv: list[str] | None) -> argparse.Namespace:
    """The command line of a benchmark, with device, names and sizes resolved."""
    found = parser(bench.__doc__)
    add, names = found.add_argument, " ".join(bench.CANDIDATES)
    device = "cuda or cpu; default: the GPU where there is one"
    add("--device", type=machine.pick, default="", metavar="DEVICE", help=device)
    add("--sizes", nargs="+", metavar="SIZE", help="default: by device")
    add("--candidates", nargs="+", choices=bench.CANDIDATES, metavar="NAME", help=names)
    add("--no-memory", action="store_true", help="no memory: a process for each candidate")
    add("--seconds", type=float, help="time to spend on each candidate and case")
    add("--limit", type=float, help="skip what takes more seconds, except this package")
    bench.options(found)
    args = found.parse_args(argv)
    kind = ("quick " if args.quick else "") + args.device.type
    args.named = args.candidates is not None
    args.candidates = args.candidates or [
        name for name, c in bench.CANDIDATES.items() if args.device.type in c.devices
    ]
    sizes, seconds, limit = bench.SETTINGS[kind]
    args.seconds = seconds if args.seconds is None else args.seconds
    args.limit = limit if args.limit is None else args.limit
    channels = getattr(args, "channels", 0)
    try:
        args.sizes = [Size.parse(text, channels) for text in args.sizes or sizes.split()]
        bench.resolve(args)
    except (ValueError, argparse.ArgumentTypeError) as error:
        found.error(str(error))
    return args


def main(bench: ModuleType, argv: list[str] | None = None) -> int:
    """Measure all cases, write and show the results; 1 if a result was wrong."""
    args = parse(bench, argv)
    set_threads(args.threads)
    runner = Runner(bench, args)
    labels = {name: bench.CANDIDATES[name].label for name in args.candidates}
    files: dict[Path, dict[str, Any]] = {}
    for case in bench.cases(args):
        batch = "-batch" * (bench.KIND == "transfer" and case.size.batch > 1)
        path = args.out / f"{machine.stem(args.device, bench.KIND + batch)}.json"
        data = files.setdefault(path, document(bench.KIND, args.device, labels))
        print(case.title, file=sys.stderr, flush=True)
        data["cases"].append(runner.run_case(case, data["cases"]))
        machine.write_json(path, data)
    return max([show(data) for data in files.values()])


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
