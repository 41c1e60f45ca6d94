"""`search.py --tune`: algorithms, tiles and ring sizes of the Triton search side by side.

Every candidate is held against the ground truth at every size before it is timed, all of them in
turns. The tile that wins is the one with the least sum of times, each over the best at its size and
precision; it is printed as an entry of the table in `kernels/tiles.py`. A candidate that does not
compile or does not fit the device is a row that says so.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import devices
import harness
import peers
import tables
import text
from gate import SearchTruth
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ttsr_fast import backends

Data = dict[str, Any]
SIZES, QUICK_SIZES = ("9*40x40", "80x80", "160x160"), ("9*40x40", "125x185")
QUICK_PRECISIONS = ("fp16", "fp16x3")
RINGS = tuple(n << 20 for n in (8, 16, 32, 64))
BUDGET, QUICK_BUDGET = 600.0, 60.0  # seconds
CHECKS = 0.6  # of the time of a comparison, compilers included; the rest is for timing
RING_TIME = 0.25  # of the time of the slab algorithm


@dataclass(frozen=True)
class Problem:
    """A search to be tuned for."""

    name: str
    precision: str
    query: Tensor  # [N, C, H, W]
    key: Tensor  # [N, C, HK, WK]
    truth: SearchTruth
    pairs: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `search.py` that are for tuning."""
    group = parser.add_argument_group("tuning")
    add = group.add_argument
    add("--tune", action="store_true", help="compare algorithms, tiles and ring sizes instead")
    add("--algorithms", nargs="+", choices=peers.ALGORITHMS, default=list(peers.ALGORITHMS))
    add("--precisions", nargs="+", choices=peers.PRECISIONS)
    add("--budget", type=float, help="seconds after which candidates are left out, default 600")


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare, print the winners and write `<gpu>-tune.json`; 1 if a result was wrong."""
    reason = backends.why_not("triton", args.device)
    if reason is not None:
        console.print(f"--tune needs the Triton backend on {args.device}: {reason}")
        return 2
    from ttsr_fast.kernels import tiles

    precisions = args.precisions or (QUICK_PRECISIONS if args.quick else list(peers.PRECISIONS))
    data: Data = {
        "kind": "tune",
        "machine": harness.machine(),
        "device": devices.describe(args.device),
        "target": tiles.target(),
        "channels": args.channels,
        "seconds": args.seconds,
        "groups": [],
        "winners": [],
    }
    problems = list(make_problems(args, precisions))
    kinds = dict.fromkeys(map(operands_of, precisions))
    groups = [(algorithm, kind) for kind in kinds for algorithm in args.algorithms]
    end = time.monotonic() + (args.budget or (QUICK_BUDGET if args.quick else BUDGET))
    for n, (algorithm, kind) in enumerate(groups):
        now = time.monotonic()
        share = now + max(0.0, end - now) / (len(groups) - n)
        mine = [problem for problem in problems if operands_of(problem.precision) == kind]
        data["groups"].append(tune_group(algorithm, kind, mine, args, share))
        data["winners"] = list(winners(data))
        console.print(group_table(data["groups"][-1]))
        harness.write_json(args.out / f"{devices.stem(args.device, 'tune')}.json", data)
    console.print(algorithms_table(data, problems))
    console.print("\nFor kernels/tiles.py, as measured in this run:")
    for line in data["winners"]:
        console.print(line, highlight=False, soft_wrap=True)
    rows = [row for group in data["groups"] for row in group["rows"]]
    return int(any(row.get("wrong") for row in rows))


def operands_of(precision: str) -> str:
    """What is multiplied of float32 features at a precision, as the table of tiles names it."""
    from ttsr_fast.kernels.operands import OPERANDS

    return OPERANDS[precision].name


def make_problems(args: argparse.Namespace, precisions: list[str]) -> Iterator[Problem]:
    """Every size at every precision; maps and truth are shared."""
    for size in sorted(args.sizes, key=lambda size: size.pairs):
        query, key = peers.maps(size, args.channels, args.device)
        truth = SearchTruth(query, key, limit=512)
        title = text.size_title(vars(size))
        for precision in precisions:
            yield Problem(f"{precision} {title}", precision, query, key, truth, size.pairs)


def tune_group(
    algorithm: str,
    kind: str,
    problems: list[Problem],
    args: argparse.Namespace,
    deadline: float,
) -> Data:
    """All tiles of an algorithm for one kind of operand, and for the slab the sizes of its ring."""
    from ttsr_fast.kernels import tiles

    group: Data = {"algorithm": algorithm, "operands": kind, "winner": None}
    group["rows"] = rows = []
    timed = partial(time_all, algorithm, problems=problems, args=args)
    first = deadline
    if algorithm == "slab":
        first -= RING_TIME * (deadline - time.monotonic())
    candidates = [tiles.tile(algorithm, kind), *tiles.candidates(algorithm)]
    rows += timed(dict.fromkeys(candidates), deadline=first)
    best = winner(rows)
    if best is None:
        return group
    group["winner"] = best["tile"]
    if algorithm == "slab":
        tile = tiles.Tile(*best["tile"])
        rings = timed({tile: RINGS}, deadline=deadline)
        rows += rings
        best_ring = winner(rings)
        group["ring_bytes"] = None if best_ring is None else best_ring["ring_bytes"]
    return group


def time_all(
    algorithm: str,
    candidates: dict[Any, tuple[int, ...] | None],
    *,
    problems: list[Problem],
    args: argparse.Namespace,
    deadline: float,
) -> list[Data]:
    """Check every candidate at every problem, then time those that are right.

    Args:
        algorithm: by its name.
        candidates: tiles, each with the ring sizes to try, None for the one that is set.
        problems: what to run.
        args: as `search.py` parsed them.
        deadline: on the monotonic clock; candidates that would miss it are left out.
    """
    end_of_checks = deadline - (1 - CHECKS) * max(0.0, deadline - time.monotonic())
    rows: list[Data] = []
    runs: dict[str, dict[str, harness.Run]] = {problem.name: {} for problem in problems}
    for tile, rings in candidates.items():
        for ring in rings or (None,):
            row: Data = {"tile": list(vars(tile).values()), "ring_bytes": ring, "times_s": {}}
            rows.append(row | check(algorithm, tile, ring, problems, args, end_of_checks))
            if rows[-1]["status"] == "ok":
                for problem in problems:
                    runs[problem.name][str(len(rows) - 1)] = search_run(
                        algorithm, tile, ring, problem
                    )
    left = max(0.0, deadline - time.monotonic()) / max(1, sum(map(len, runs.values())))
    for name, contenders in runs.items():
        timings = harness.time_interleaved(
            contenders, seconds=min(args.seconds, left), min_reps=3, device=args.device
        )
        for number, timing in timings.items():
            rows[int(number)]["times_s"][name] = timing.median_s
    return rows


def check(
    algorithm: str,
    tile: Any,
    ring: int | None,
    problems: list[Problem],
    args: argparse.Namespace,
    deadline: float,
) -> Data:
    """`status` "ok", or "failed" or "skipped" with a reason; `wrong` if a result was."""
    for problem in problems:
        if time.monotonic() > deadline:
            return {"status": "skipped", "reason": "no time was left"}
        record = harness.check_and_weigh(
            harness.Contender(
                search_run(algorithm, tile, ring, problem),
                partial(problem.truth.check, tolerance=peers.choice_tolerance(problem.precision)),
                None,
            ),
            args.device,
        )
        if record["status"] != "ok":
            return record | {"reason": f"{problem.name}: {record['reason']}"}
    return {"status": "ok"}


def search_run(algorithm: str, tile: Any, ring: int | None, problem: Problem) -> harness.Run:
    search = partial(
        peers.algorithm_search, problem.query, problem.key, algorithm, problem.precision, tile
    )
    return search if ring is None else with_ring(ring, search)


def with_ring(ring: int, run: harness.Run) -> harness.Run:
    """A run of the slab algorithm in a ring of that many bytes."""

    def in_ring() -> Any:
        with ring_of(ring):
            return run()

    return in_ring


@contextmanager
def ring_of(count: int):
    from ttsr_fast.kernels import box_max

    before = box_max.RING_BYTES
    box_max.RING_BYTES = count
    try:
        yield
    finally:
        box_max.RING_BYTES = before


# --- who won ---


def cost(row: Data, best: dict[str, float]) -> float:
    """Sum of a row's times, each over the best at its problem."""
    return sum(taken / best[name] for name, taken in row["times_s"].items())


def winner(rows: list[Data]) -> Data | None:
    """The row with the least cost, the first of them; None if none is right."""
    right = [row for row in rows if row["status"] == "ok"]
    best = best_times(right)
    return min(right, key=lambda row: cost(row, best), default=None)


def best_times(rows: list[Data]) -> dict[str, float]:
    """The least time of every problem."""
    names = dict.fromkeys(name for row in rows for name in row["times_s"])
    return {name: min(row["times_s"][name] for row in rows) for name in names}


def winners(data: Data) -> Iterator[str]:
    """The winners as the table of tiles writes them."""
    for group in data["groups"]:
        if group["winner"] is not None:
            key = ", ".join(
                f'"{x}"' for x in (group["algorithm"], data["target"], group["operands"])
            )
            yield f"({key}): Tile({', '.join(map(str, group['winner']))}),"
    for group in data["groups"]:
        if group.get("ring_bytes"):
            yield f"RING_BYTES = {group['ring_bytes'] >> 20} << 20  # best for {group['operands']}"


# --- tables ---


def group_table(group: Data) -> Table:
    """Every tile of an algorithm: its times, or why there are none."""
    rows = group["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["times_s"]))
    table = Table(title=f"\n{group['algorithm']}, {group['operands']}", **tables.STYLE)
    for column in ("block_q", "block_k", "block_c", "warps", "stages", "ring", *names):
        table.add_column(column, justify="right", no_wrap=column not in names)
    left_out: dict[str, list[str]] = {}
    for row in rows:
        shape = [str(n) for n in row["tile"]]
        if row["status"] != "ok":
            why = ("WRONG: " if row.get("wrong") else "") + row["reason"]
            left_out.setdefault(why, []).append("(" + ", ".join(shape) + ")")
            continue
        ring = "" if row["ring_bytes"] is None else f"{row['ring_bytes'] >> 20} MiB"
        times = [text.seconds_text(row["times_s"][name]) for name in names]
        won = row["tile"] == group["winner"] and row["ring_bytes"] in (
            None,
            group.get("ring_bytes"),
        )
        table.add_row(*shape, ring, *times, style="bold" if won else "")
    table.caption = "\n".join(f"{why}: {', '.join(which)}" for why, which in left_out.items())
    return table


def algorithms_table(data: Data, problems: list[Problem]) -> Table:
    """The best of every algorithm at every problem."""
    algorithms = list(dict.fromkeys(group["algorithm"] for group in data["groups"]))
    table = Table(title="\nthe best of each algorithm, ps per pair", **tables.STYLE)
    table.add_column("")
    for name in (*algorithms, "fastest"):
        table.add_column(name, justify="right")
    for problem in problems:
        best: dict[str, float] = {}
        for group in data["groups"]:
            times = [row["times_s"].get(problem.name) for row in group["rows"]]
            known = [taken for taken in times if taken is not None]
            if known:
                best[group["algorithm"]] = 1e12 * min(known) / problem.pairs
        cells = [f"{best[name]:.2f}" if name in best else "" for name in algorithms]
        table.add_row(problem.name, *cells, min(best, key=best.__getitem__, default=""))
    return table
