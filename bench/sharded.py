"""Time and memory of a search with the key sharded over processes.

    torchrun --nproc-per-node 2 bench/sharded.py
    torchrun --nproc-per-node 2 bench/sharded.py --sizes 100x100:108x96

On the CPU, under Linux. The result over processes has to be bit-equal to the
result of one process, which is held against float64; a wrong one is not timed.
"key" is the largest shard of a process, "memory" the peak of any process above
inputs and results. Exits with status 1 if a result was wrong.
"""

import argparse
import os
import sys
from functools import partial
from typing import Any

import measure
import runner
import torch
import torch.distributed as dist
from gate import SearchTruth, WrongResult
from machine import CPU, write_json
from measure import Entry
from registry import Run, Size
from search_candidates import maps

from ttsr_fast import Match, search
from ttsr_fast.distributed import search_sharded, shard_rows

SIZES = ("40x40", "100x100:108x96", "160x160")
QUICK_SIZES = ("24x24", "37x53:61x45")
BACKEND = "cpp"  # with results that do not depend on the shards
STOP, RUN, WEIGH = range(3)

# --- the first process leads, the others follow ---


def broadcast(task: int = STOP) -> int:
    """The task of the first process."""
    found = torch.tensor(task)
    dist.broadcast(found, src=0)
    return int(found)


def largest(x: int) -> int:
    found = torch.tensor(x)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def do(task: int, run: Run) -> Any:
    """Run, or the peak memory of the run in any process."""
    return largest(measure.peak_bytes_here(run)) if task == WEIGH else run()


def lead(task: int, run: Run, threads: int) -> Any:
    torch.set_num_threads(threads)
    return do(broadcast(task), run)


# --- the measurement ---


def run_case(size: Size, args: argparse.Namespace) -> dict[str, Any] | None:
    """A case with a row per number of processes and threads; None in the processes that follow."""
    query, key = maps(size)  # the same in every process
    rows = shard_rows(key.shape[2])
    shard = key[:, :, rows.top : rows.bottom].clone()
    run = partial(search_sharded, query, shard, key.shape[2], timeout=600.0, backend=BACKEND)
    held = largest(shard.nbytes)
    if dist.get_rank() > 0:
        del key
        while (task := broadcast()) != STOP:
            do(task, run)
        return None

    one = partial(search, query, key, backend=BACKEND)
    check = partial(_check, SearchTruth(query, key), one())
    entries, several = {}, f"{args.processes} processes, {_threads(args.threads)} each"
    for count in (args.threads, args.threads * args.processes):
        alone = partial(_alone, one, count)
        weighed = partial(measure.peak_bytes_here, alone)
        entries[f"1 process, {_threads(count)}"] = Entry(alone, check, weighed)
    leading = (partial(lead, task, run, args.threads) for task in (RUN, WEIGH))
    entries[several] = Entry(next(leading), check, next(leading))
    records, _ = measure.measure(entries, {}, seconds=args.seconds)
    broadcast(STOP)
    for name, record in records.items():
        record["key_bytes"] = held if name == several else key.nbytes
    return {"operation": "search", **size.facts, "channels": size.channels, "rows": records}


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _alone(run: Run, threads: int) -> Match:
    torch.set_num_threads(threads)
    return run()


def _check(truth: SearchTruth, whole: Match, found: Match) -> dict[str, float]:
    """The gate: the right result, and bit-equal to the result of one process."""
    if not (torch.equal(whole.score, found.score) and torch.equal(whole.index, found.index)):
        raise WrongResult("the result is not that of one process, bit for bit")
    return truth.check(found)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, and the number of processes by torchrun."""
    parser = runner.parser(__doc__)
    default = f"default: {' '.join(SIZES)}"
    parser.add_argument("--sizes", nargs="+", type=Size.parse, metavar="SIZE", help=default)
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it by `torchrun --nproc-per-node 2 bench/sharded.py`")
    processes = int(os.environ["WORLD_SIZE"])
    parser.set_defaults(threads=max(1, (os.cpu_count() or 1) // processes), processes=processes)
    args = parser.parse_args(argv)
    sizes, args.seconds = (QUICK_SIZES, 0.3) if args.quick else (SIZES, 3.0)
    args.sizes = args.sizes or [Size.parse(x) for x in sizes]
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure and show; 1 if a result was wrong."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo")
    cases = [run_case(size, args) for size in args.sizes]
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    if not first:
        return 0
    data = {**runner.document("sharded", CPU, {}), "cases": cases}
    data["labels"] = {name: name for case in cases for name in case["rows"]}
    write_json(args.out / "sharded.json", data)
    return runner.show(data)


if __name__ == "__main__":
    sys.exit(main())
