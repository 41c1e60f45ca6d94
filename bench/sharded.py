"""Time and memory of a search with a key shared out among processes.

    torchrun --nproc-per-node 2 bench/sharded.py
    torchrun --nproc-per-node 2 bench/sharded.py --quick
    torchrun --nproc-per-node 2 bench/sharded.py --sizes 100x100:108x96

On the CPU, under Linux. The search in one process is held against float64
ground truth, and that over processes has to be bit-equal to it; no time is
reported for a wrong one. One process is measured with the threads of each of
several, and with those of all. Prints a table per size: "key" is the largest
share of it that a process holds, "memory" the most that one needs above inputs
and results. Exits with status 1 if a result was wrong.
"""

import argparse
import os
import sys
from functools import partial
from typing import Any

import devices
import harness
import memory
import peers
import terminal
import torch
import torch.distributed as dist
from gate import SearchTruth, WrongResult
from harness import Contender, Run
from sizes import Size
from terminal import Table
from text import bytes_text, count_text, range_text, seconds_text, size_title

from ttsr_fast import Match, search
from ttsr_fast.distributed import search_sharded, shard_rows
from ttsr_fast.operators import backends

SIZES = ("40x40", "100x100:108x96", "160x160")
QUICK_SIZES = ("24x24", "37x53:61x45")
BACKEND = "cpp"  # whose results do not depend on how a key is shared out
STOP, RUN, WEIGH = range(3)

# --- the first process leads, the others do as they are told ---


def tell(task: int) -> None:
    dist.broadcast(torch.tensor(task), src=0)


def told() -> int:
    task = torch.tensor(STOP)
    dist.broadcast(task, src=0)
    return int(task)


def follow(run: Run) -> None:
    while (task := told()) != STOP:
        weigh(run) if task == WEIGH else run()


def weigh(run: Run) -> int:
    """The most memory that the run needs in any process."""
    peak = torch.tensor(memory.peak_bytes_here(run))
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)


def lead(run: Run) -> Any:
    tell(RUN)
    return run()


# --- what is measured ---


def measure(size: Size, args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """A record per number of processes and threads; None in the processes that follow."""
    query, key = peers.maps(size, args.channels)  # the same in every process
    rows = shard_rows(key.shape[2])
    share = key[:, :, rows.top : rows.bottom].clone()
    run = partial(search_sharded, query, share, key.shape[2], timeout=600.0, backend=BACKEND)
    held = torch.tensor(share.nbytes)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    if dist.get_rank() > 0:
        del key
        follow(run)
        return None

    counts = (args.threads, args.threads * args.processes)
    threads = {f"1 process, {_threads(n)}": n for n in counts}
    one = partial(search, query, key, backend=BACKEND)
    several = f"{args.processes} processes, {_threads(args.threads)} each"
    threads[several] = args.threads
    runs = dict.fromkeys(threads, one) | {several: partial(lead, run)}
    runs = {name: partial(_with_threads, threads[name], run) for name, run in runs.items()}
    check = partial(_check, SearchTruth(query, key), one())
    contenders = {name: Contender(run, check, None) for name, run in runs.items()}
    records, _ = harness.measure(contenders, {}, seconds=args.seconds)
    for name, record in records.items():
        record |= {"label": name, "key_bytes": int(held) if name == several else key.nbytes}
        if record["status"] == "ok" and name == several:
            tell(WEIGH)
            record["peak_bytes"] = weigh(partial(_with_threads, args.threads, run))
        elif record["status"] == "ok":
            record["peak_bytes"] = memory.peak_bytes_here(runs[name])
    tell(STOP)
    return list(records.values())


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _with_threads(threads: int, run: Run) -> Any:
    torch.set_num_threads(threads)
    return run()


def _check(truth: SearchTruth, whole: Match, found: Match) -> dict[str, float]:
    """The gate: the right result, and bit for bit that of one process."""
    if not (torch.equal(whole.score, found.score) and torch.equal(whole.index, found.index)):
        raise WrongResult("the result is not that of one process, bit for bit")
    return truth.check(found)


def table(size: Size, channels: int, records: list[dict[str, Any]]) -> Table:
    right = [row for row in records if row["status"] == "ok"]
    return Table(
        f"{size_title(vars(size))}, {channels} channels, {count_text(size.pairs)} pairs",
        ["", "time", "20 to 80 %", "pairs/s", "key", "memory"],
        1,
        [
            [
                row["label"],
                seconds_text(row["median_s"]),
                range_text(row["low_s"], row["high_s"]),
                count_text(size.pairs / row["median_s"]),
                bytes_text(row["key_bytes"]),
                bytes_text(row["peak_bytes"]),
            ]
            for row in right
        ],
        [f"{row['label']}: FAILED: {row['reason']}" for row in records if row not in right],
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, and what torchrun says of the processes."""
    parser = terminal.parser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", type=Size.parse, metavar="SIZE", help=f"default: {' '.join(SIZES)}")
    add("--quick", action="store_true", help="small sizes, short runs")
    add("--channels", type=int, default=256)
    add("--threads", type=int, help="of each process; default: the cores, shared out")
    add("--seconds", type=float, help="time to spend on each way and size")
    args = parser.parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by `torchrun --nproc-per-node 2 bench/sharded.py`")
    args.processes = int(os.environ["WORLD_SIZE"])
    if args.threads is None:
        args.threads = max(1, (os.cpu_count() or 1) // args.processes)
    if args.channels < 1 or args.threads < 1:
        parser.error("--channels and --threads must be positive")
    reason = backends.why_not(BACKEND, devices.CPU)
    if reason is not None:
        parser.error(f"it measures backend {BACKEND!r}, which cannot run: {reason}")
    args.sizes = args.sizes or [Size.parse(x) for x in (QUICK_SIZES if args.quick else SIZES)]
    args.seconds = args.seconds or (0.3 if args.quick else 3.0)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 if a result was wrong."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    console = terminal.console()
    right = True
    for size in args.sizes:
        records = measure(size, args)
        if records is not None:
            console.print(table(size, args.channels, records))
            right &= all(record["status"] == "ok" for record in records)
    dist.destroy_process_group()
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
