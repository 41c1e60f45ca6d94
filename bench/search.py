"""Time and memory of the patch search against its peers, over a sweep of sizes.

    python bench/search.py                          the sweep of the README
    python bench/search.py --quick                  under a minute
    python bench/search.py --sizes 100x100:108x96   queries 100x100, keys 108x96

Writes `search.json` and `search.png` into the folder `--out` and prints a table per size. Exits
with status 1 if any candidate gave a wrong result; no time is reported for that one.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import peers
import plots
import report
import torch
from gate import SearchTruth
from rich.console import Console

SIZES = (
    "40x40",
    "37x53:61x45",
    "80x80",
    "100x100",
    "100x100:108x96",
    "125x185",
    "160x160",
    "270x480",
)
QUICK_SIZES = ("16x16", "24x24", "37x53:61x45")
TRUTH_BYTES = 1 << 30  # bounds the queries that are checked at the largest sizes


@dataclass(frozen=True)
class Size:
    """A query grid and a key grid."""

    query: tuple[int, int]
    key: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> "Size":
        """`HxW`, or `HxW:HKxWK` where the grids differ."""
        match = re.fullmatch(r"(\d+)x(\d+)(?::(\d+)x(\d+))?", text)
        if match is None or "0" in match.groups():
            raise argparse.ArgumentTypeError(f"must read 100x100 or 100x100:108x96, got {text!r}")
        h, w, hk, wk = (int(n) if n else 0 for n in match.groups())
        return cls((h, w), (hk, wk) if hk else (h, w))

    @property
    def queries(self) -> int:
        return self.query[0] * self.query[1]

    @property
    def keys(self) -> int:
        return self.key[0] * self.key[1]

    @property
    def pairs(self) -> int:
        return self.queries * self.keys


def sweep(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every size, smallest first, writing the results after each."""
    data: dict[str, Any] = {
        "kind": "search",
        "machine": harness.machine(),
        "channels": args.channels,
        "seconds": args.seconds,
        "sizes": [],
    }
    names = [*args.backends, *args.peers]
    with report.progress_bar(console) as progress:
        task = progress.add_task("", total=len(args.sizes) * (len(names) + 2))
        for size in sorted(args.sizes, key=lambda size: size.pairs):
            title = report.size_title({"query": size.query, "key": size.key})

            def step(text: str, title: str = title) -> None:
                progress.update(task, description=f"{title}  {text}", advance=1)

            data["sizes"].append(measure_size(size, names, data["sizes"], args, step))
            console.print(report.search_table(data, data["sizes"][-1]))
            progress.update(task, completed=len(data["sizes"]) * (len(names) + 2))
            harness.write_json(args.out / "search.json", data)
    plots.search(data, args.out / "search.png")
    return data


def measure_size(
    size: Size,
    names: list[str],
    before: list[dict[str, Any]],
    args: argparse.Namespace,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """One entry of the results: the rulers and a row per candidate."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        candidate, reason = peers.ALL[name], why_not(name, size, before, args)
        rows[name] = {
            "label": candidate.label,
            "backend": candidate.backend,
            "precision": candidate.precision,
            **({} if reason is None else {"status": "skipped", "reason": reason}),
        }
    tried = [name for name in names if "status" not in rows[name]]
    query, key = peers.maps(size.query, size.key, args.channels)
    step("ground truth")
    truth = SearchTruth(query, key, limit=min(2048, TRUTH_BYTES // (8 * size.keys)))
    contenders = {}
    for name in tried:
        candidate = peers.ALL[name]
        contenders[name] = harness.Contender(
            run=partial(candidate.search, query, key),
            check=partial(truth.check, tolerance=candidate.tolerance),
            job=(peers.job, name, size.query, size.key, args.channels),
        )
    gemms = {
        dtype: harness.gemm_run(dtype, args.channels)
        for dtype in {torch.float32, *(peers.ALL[name].dtype for name in tried)}
    }
    rulers = {str(dtype): run for dtype, (run, _) in gemms.items()}
    records, timings = harness.measure(contenders, rulers, seconds=args.seconds, step=step)
    rates = {dtype: flop / timings[str(dtype)].median_s for dtype, (_, flop) in gemms.items()}
    for name in tried:
        rows[name] |= with_rates(records[name], peers.ALL[name], size.pairs, args.channels, rates)
    return {
        "query": size.query,
        "key": size.key,
        "dtype": "float32",
        "pairs": size.pairs,
        "gemm_flop_per_s": {str(dtype).removeprefix("torch."): r for dtype, r in rates.items()},
        "pixel_gemm_s": size.pairs * 2 * args.channels / rates[torch.float32],
        "rows": rows,
    }


def why_not(
    name: str, size: Size, before: list[dict[str, Any]], args: argparse.Namespace
) -> str | None:
    """Why a candidate is not tried at a size, None if it is."""
    candidate = peers.ALL[name]
    reason = candidate.why_not()
    if reason is not None:
        return reason
    needed = candidate.bytes_needed(size.queries, size.keys, args.channels)
    if needed > harness.available_bytes():
        return f"does not fit (needs {report.bytes_text(needed)})"
    timed = [entry for entry in before if "median_s" in entry["rows"][name]]
    if timed and name != next(iter(peers.OURS)):  # which the sweep is about
        estimate = timed[-1]["rows"][name]["median_s"] * size.pairs / timed[-1]["pairs"]
        if estimate > args.limit:
            return f"skipped (estimated {report.seconds_text(estimate)})"
    return None


def with_rates(
    record: dict[str, Any],
    candidate: peers.Candidate,
    pairs: int,
    channels: int,
    rates: dict[torch.dtype, float],
) -> dict[str, Any]:
    """A record with what follows from its time."""
    if record["status"] != "ok":
        return record
    issued = 2 * channels * candidate.products * pairs / record["median_s"]
    return record | {
        "pairs_per_s": pairs / record["median_s"],
        "effective_flop_per_s": 2 * channels * peers.PATCH * pairs / record["median_s"],
        "issued_flop_per_s": issued,
        "gemm_share": issued / rates[candidate.dtype],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with names and threads resolved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", nargs="+", type=Size.parse, metavar="SIZE", help=f"default: {' '.join(SIZES)}")
    add("--quick", action="store_true", help=f"sizes {' '.join(QUICK_SIZES)}, short runs")
    add("--backends", nargs="*", choices=peers.OURS, metavar="NAME", help=" ".join(peers.OURS))
    add("--peers", nargs="*", choices=peers.PEERS, metavar="NAME", help=" ".join(peers.PEERS))
    add("--no-peers", action="store_true", help="only the backends of this package")
    add("--channels", type=int, default=256)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, help="time to spend on each candidate and size, default 3")
    add("--limit", type=float, help="skip what takes more seconds, but never cpp-fp32; default 60")
    add("--out", type=Path, default=Path("out"), help="folder for search.json and search.png")
    args = parser.parse_args(argv)
    for name in args.backends or ():
        reason = peers.OURS[name].why_not()
        if reason is not None:
            parser.error(f"--backends {name}: {reason}")
    if args.channels < 1 or args.threads < 1:
        parser.error("--channels and --threads must be positive")
    quick = args.quick
    args.sizes = args.sizes or [Size.parse(text) for text in (QUICK_SIZES if quick else SIZES)]
    args.backends = list(peers.OURS) if args.backends is None else args.backends
    args.peers = list(peers.PEERS) if args.peers is None else args.peers
    args.peers = [] if args.no_peers else args.peers
    args.seconds = args.seconds or (0.3 if quick else 3.0)
    args.limit = args.limit or (5.0 if quick else 60.0)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; 1 if a candidate failed the gate."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the libraries that are loaded later
    torch.set_num_threads(args.threads)
    data = sweep(args, Console())
    rows = [row for entry in data["sizes"] for row in entry["rows"].values()]
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
