"""Time and memory of the patch search against its peers, over a sweep of sizes.

    python bench/search.py                          the sweep of the README
    python bench/search.py --quick                  under a minute
    python bench/search.py --sizes 100x100:108x96   queries 100x100, keys 108x96
    python bench/search.py --sizes 9*40x40          nine images at once

Runs on the GPU where there is one. Writes a result file and a plot into the
folder `--out` (`search.json` on the CPU, the name of the GPU otherwise) and
prints a table per size. Exits with status 1 if any candidate gave a wrong
result; no time is reported for that one.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import devices
import harness
import memory
import peers
import report
import tables
import terminal
import text
import torch
from gate import SearchTruth
from rich.console import Console
from sizes import Size
from torch import Tensor

SIZES = {
    "cpu": (
        "40x40",
        "37x53:61x45",
        "80x80",
        "100x100",
        "100x100:108x96",
        "125x185",
        "160x160",
        "270x480",
    ),
    "cuda": (
        "9*40x40",
        "40x40",
        "80x80",
        "100x100:108x96",
        "125x185",
        "160x160",
        "270x480",
        "540x960",
    ),
}
QUICK_SIZES = {
    "cpu": ("16x16", "24x24", "37x53:61x45"),
    "cuda": ("9*40x40", "80x80", "125x185"),
}
SECONDS, QUICK_SECONDS = {"cpu": 3.0, "cuda": 0.5}, {"cpu": 0.3, "cuda": 0.1}
LIMIT, QUICK_LIMIT = {"cpu": 60.0, "cuda": 5.0}, {"cpu": 5.0, "cuda": 2.0}
TRUTH_BYTES = 1 << 30  # bounds the queries that are checked at the largest sizes
SUBJECTS = ("cpp-fp32", "triton-fp16", "triton-fp16x3")  # of the sweep: tried at every size
PEER_PAIRS = Size.parse("270x480").pairs  # beyond which a GPU runs this package alone
GRAPH_PAIRS = 32_000_000  # beyond which launches are a small part of the time


def sweep(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every size in the order given; results are written after each, smallest first."""
    data: dict[str, Any] = {
        "kind": "search",
        "machine": harness.machine(),
        "device": devices.describe(args.device),
        "channels": args.channels,
        "seconds": args.seconds,
        "sizes": [],
    }
    names = [*args.backends, *args.peers]
    stem = devices.stem(args.device, "search")
    with terminal.progress_bar(console) as progress:
        task = progress.add_task("", total=len(args.sizes) * (len(names) + 2))
        for size in args.sizes:
            title = text.size_title(vars(size))

            def step(text: str, title: str = title) -> None:
                progress.update(task, description=f"{title}  {text}", advance=1)

            entry = measure_size(size, names, data["sizes"], args, step)
            data["sizes"] = sorted([*data["sizes"], entry], key=lambda entry: entry["pairs"])
            console.print(tables.search_table(data, entry))
            progress.update(task, completed=len(data["sizes"]) * (len(names) + 2))
            harness.write_json(args.out / f"{stem}.json", data)
    if not args.no_plot:
        report.draw(data, args.out / f"{stem}.png", console)
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
            "algorithm": candidate.algorithm,
            "precision": candidate.precision,
            **({} if reason is None else {"status": "skipped", "reason": reason}),
        }
    tried = [name for name in names if "status" not in rows[name]]
    query, key = peers.maps(size, args.channels, args.device)
    step("ground truth")
    truth = SearchTruth(query, key, limit=min(2048, TRUTH_BYTES // (8 * size.keys)))
    contenders = {name: contender(name, size, query, key, truth, args.channels) for name in tried}
    gemms = gemm_runs({peers.ALL[name].operands for name in tried}, args)
    records, timings = harness.measure(
        contenders,
        {name: run for name, (run, _) in gemms.items()},
        seconds=args.seconds,
        device=args.device,
        step=step,
    )
    gemm_rates = {name: flop / timings[name].median_s for name, (_, flop) in gemms.items()}
    rates = {
        operands: max(rate for name, rate in gemm_rates.items() if name.startswith(operands + " "))
        for operands in dict.fromkeys(name.split()[0] for name in gemms)
    }
    for name in tried:
        candidate = peers.resolved(peers.ALL[name], query, key)
        rows[name]["algorithm"] = candidate.algorithm
        rows[name] |= with_rates(records[name], candidate, size.pairs, args.channels, rates)
    cheapest = "float16" if args.device.type == "cuda" and "float16" in rates else "float32"
    return {
        **vars(size),
        "dtype": "float32",
        "pairs": size.pairs,
        "gemm_flop_per_s": rates,
        "gemms": gemm_rates,
        "pixel_gemm_operands": cheapest,
        "pixel_gemm_s": size.pairs * 2 * args.channels / rates[cheapest],
        "rows": rows,
    }


def contender(
    name: str,
    size: Size,
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N, C, HK, WK]
    truth: SearchTruth,
    channels: int,
) -> harness.Contender:
    """A candidate at a size, as the harness takes it."""
    candidate = peers.ALL[name]
    run = partial(candidate.search, query, key)
    return harness.Contender(
        run=harness.deferred(devices.graph_run, run) if candidate.graph else run,
        check=partial(
            truth.check,
            tolerance=candidate.tolerance,
            score_tolerance=candidate.score_tolerance,
        ),
        job=None if candidate.graph else (peers.job, name, size, channels),
    )


def gemm_runs(operands: set[str], args: argparse.Namespace) -> dict[str, tuple[harness.Run, int]]:
    """Products as deep as those of the search, by operands and depth; on a GPU also K = 3 C."""
    gpu = args.device.type == "cuda"
    depths = [args.channels, 3 * args.channels] if gpu else [args.channels]
    runs = {
        f"{name} {depth}": harness.gemm_run(name, depth, args.device)
        for name in harness.OPERANDS
        if name in operands | {"float32"}
        for depth in depths
    }
    if gpu and "float16" in operands:
        for depth in depths:
            run, flop = harness.widening_gemm_run(depth, args.device)
            try:
                run()
            except RuntimeError:
                continue  # PyTorch has no such product on ROCm
            runs[f"float16 {depth} to float32"] = (run, flop)
    return runs


def why_not(
    name: str, size: Size, before: list[dict[str, Any]], args: argparse.Namespace
) -> str | None:
    """Why a candidate is not tried at a size, None if it is."""
    candidate = peers.ALL[name]
    reason = candidate.why_not(args.device)
    if reason is not None:
        return reason
    ours = candidate.backend is not None and candidate.algorithm is None
    if args.device.type == "cuda":
        if size.pairs > PEER_PAIRS and not ours:
            return "skipped (beyond what peers are run at)"
        if candidate.graph and size.pairs > GRAPH_PAIRS:
            return "skipped (launches are a small part here)"
    elif candidate.graph:
        return "it needs a GPU"
    needed = candidate.bytes_needed(size, args.channels)
    if needed > memory.available_bytes(args.device):
        return f"does not fit (needs {text.bytes_text(needed)})"
    timed = [entry for entry in before if "median_s" in entry["rows"][name]]
    if timed and name not in SUBJECTS:
        estimate = timed[-1]["rows"][name]["median_s"] * size.pairs / timed[-1]["pairs"]
        if estimate > args.limit:
            return f"skipped (estimated {text.seconds_text(estimate)})"
    return None


def with_rates(
    record: dict[str, Any],
    candidate: peers.Candidate,
    pairs: int,
    channels: int,
    rates: dict[str, float],
) -> dict[str, Any]:
    """A record with what follows from its time."""
    if record["status"] != "ok":
        return record
    issued = 2 * channels * candidate.products * pairs / record["median_s"]
    return record | {
        "pairs_per_s": pairs / record["median_s"],
        "ps_per_pair": 1e12 * record["median_s"] / pairs,
        "effective_flop_per_s": 2 * channels * peers.PATCH * pairs / record["median_s"],
        "issued_flop_per_s": issued,
        "gemm_share": issued / rates[candidate.operands],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, with device, names and threads resolved."""
    parser = terminal.parser(__doc__)
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cpu; default: the GPU where there is one")
    add(
        "--sizes",
        nargs="+",
        type=Size.parse,
        metavar="SIZE",
        help="measured in this order; default: by device",
    )
    add("--quick", action="store_true", help="few sizes, short runs")
    add("--backends", nargs="*", choices=peers.OURS, metavar="NAME", help=" ".join(peers.OURS))
    add("--peers", nargs="*", choices=peers.PEERS, metavar="NAME", help=" ".join(peers.PEERS))
    add("--no-peers", action="store_true", help="only the backends of this package")
    add("--channels", type=int, default=256)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--seconds", type=float, help="time to spend on each candidate and size")
    add("--limit", type=float, help="skip what takes more seconds, but never the kernels")
    add("--no-plot", action="store_true", help="leave out the plot")
    add("--out", type=Path, default=Path("out"), help="folder for results and plot")
    args = parser.parse_args(argv)
    try:
        args.device = devices.pick(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--device: {error}")
    for name in args.backends or ():
        reason = peers.OURS[name].why_not(args.device)
        if reason is not None:
            parser.error(f"--backends {name}: {reason}")
    if args.channels < 1 or args.threads < 1:
        parser.error("--channels and --threads must be positive")
    kind, quick = args.device.type, args.quick
    sizes = map(Size.parse, (QUICK_SIZES if quick else SIZES)[kind])
    args.sizes = args.sizes or sorted(sizes, key=lambda size: size.pairs)
    if args.backends is None:
        args.backends = peers.names_for(peers.OURS, args.device)
    if args.peers is None:
        args.peers = peers.names_for(peers.PEERS, args.device)
    args.peers = [] if args.no_peers else args.peers
    args.seconds = args.seconds or (QUICK_SECONDS if quick else SECONDS)[kind]
    args.limit = args.limit or (QUICK_LIMIT if quick else LIMIT)[kind]
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; 1 if a candidate failed the gate."""
    args = parse(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the libraries that are loaded later
    torch.set_num_threads(args.threads)
    console = terminal.console()
    data = sweep(args, console)
    failed = [
        f"{row['label']} at {text.size_title(entry)}"
        for entry in data["sizes"]
        for row in entry["rows"].values()
        if row["status"] == "failed"
    ]
    console.print(f"failed: {', '.join(failed)}" if failed else "nothing failed", soft_wrap=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
