"""The kernels alone: a step of `gpu_check.py` for each of the parts below.

    python bench/gpu_kernels.py check | times | ceilings | profile

`--out FILE` is rewritten after every job. If a job leaves CUDA unusable or
hangs, the process starts again with the next one. Nothing is timed whose result
is wrong. `--tiny` runs at a few pixels, on the CPU with TRITON_INTERPRET=1.
`profile` shows a profiler one launch of each kernel.
"""

import argparse
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple
from unittest import mock

import devices
import gpu_cases
import harness
import peers
import torch
import transfer
import transfer_peers
from devices import Run
from gate import SearchTruth, WrongResult, check_close
from sizes import Size

from ttsr_fast.operators import library

Cells = list[dict[str, Any]]
Jobs = Iterator[tuple[str, Callable[[], Cells]]]
CASES = ("2*9x37:11x35", "40x42:70x13")  # widths that fill no tile, bands and strips
SIZES, BATCH, TINY = ("540x960", "270x480", "125x185", "160x160"), "9*40x40", "2x3"
RINGS = (8, 16, 32, 64)  # MiB
DEFAULT = "128x128/8/4"
TILES = (DEFAULT, "128x128/8/3", "64x128/4/3", "128x64/4/3", "64x64/4/4", "not lazy")
LAUNCHES, LONG = 20, 0.1  # launches timed together, and seconds that they may take
HANGING = 40.0  # seconds that a job may take


class Times(NamedTuple):
    """Seconds of a launch, by events around several and from a graph of them."""

    events_s: float
    graph_s: float


class Bench:
    """The device with its clocks. When `compiling`, kernels are launched and nothing else."""

    def __init__(self, device: torch.device, tiny=False, few=False, compiling=False) -> None:
        self.device, self.tiny, self.few, self.compiling = device, tiny, few, compiling
        self.sizes = (TINY,) if tiny else SIZES
        self.batch, self.precisions = TINY if tiny else BATCH, ("fp16", "fp16x3")[: 2 - tiny]
        self.tiles, self.rings = (TILES[::5], RINGS[:1]) if tiny else (TILES, RINGS)
        channels = 8 if tiny else 256
        self.maps = cache(lambda size: peers.maps(Size.parse(size), channels, device))
        self.truth = cache(lambda size: SearchTruth(*self.maps(size), limit=256))

    def check(self, check: Run) -> None:
        if not self.compiling:
            devices.synchronize(self.device)
            check()

    def times(self, run: Run) -> Times:
        """Of a launch that has run before; a long one is timed once, by events."""
        if self.compiling:
            return Times(1.0, 1.0)
        first = devices.timed(run, self.device)
        if first > LONG or self.tiny:
            return Times(first, first)
        count = min(LAUNCHES, int(LONG / first))
        several = partial(repeat, run, count)
        runs = (several, devices.graph_run(several))
        events, graph = (min(devices.timed(r, self.device) for _ in range(2)) for r in runs)
        return Times(events / count, graph / count)

    def host(self, run: Run) -> float:
        """Seconds of CPU time of a launch."""
        count = 1 if self.tiny or self.compiling else 50
        run()
        devices.synchronize(self.device)
        start = time.perf_counter()
        repeat(run, count)
        taken = (time.perf_counter() - start) / count
        devices.synchronize(self.device)
        return taken


def repeat(run: Run, count: int) -> None:
    for _ in range(count):
        run()


def cell(table: str, row: str, column: str, text: str, **numbers: Any) -> dict[str, Any]:
    return {"table": table, "row": row, "column": column, "cell": text, **numbers}


# --- the search ---


def prepare(bench: Bench, size: str, algorithm: str, precision: str, label: str) -> tuple:
    """The launches of a search by name, once its result is right; and the pairs it multiplies."""
    from ttsr_fast.kernels import search as kernel_search
    from ttsr_fast.kernels import tiles
    from ttsr_fast.kernels.operands import operands

    query, key = bench.maps(size)
    tile = tiles.tile(algorithm, operands(query.dtype, precision).name)
    if "/" in label:
        tile = tiles.Tile(*map(int, label.replace("x", "/").split("/")))
    score = query.new_full((len(query), *query.shape[2:]), float("nan"))
    index = torch.full_like(score, -(2**40), dtype=torch.int64)
    arguments = (query, key, None, score, index, 3, 1, "both", 1e-12, False, precision)
    launches = kernel_search.stages(*arguments, algorithm=algorithm, tile=tile)
    for run in launches.values():
        run()
    tolerance = peers.choice_tolerance(precision)
    bench.check(lambda: bench.truth(size).check((score, index), tolerance))
    return launches, kernel_search.padded_pairs(query.shape, key.shape, algorithm, tile)


def check_search(bench: Bench, size: str, algorithm: str, precision: str) -> Cells:
    prepare(bench, size, algorithm, precision, "")
    return [cell("check", f"{algorithm} {size}", precision, "ok")]


def check_jobs(bench: Bench) -> Jobs:
    """Transfer first; of a few cases one search of each algorithm."""
    few = bench.few or bench.tiny
    if not bench.compiling:  # none of them is Triton's
        yield from gpu_cases.jobs(bench.device, few)
    sizes = (bench.sizes[-1:] if bench.tiny else CASES)[: 1 if few else None]
    precisions = peers.PRECISIONS if not few else ("fp16",)
    for place in itertools.product(sizes, ("rolled", "slab", "direct"), precisions):
        yield " ".join(place), partial(check_search, bench, *place)


def time_search(
    bench: Bench, size: str, algorithm: str, precision: str, label: str, ring: int | None = None
) -> Cells:
    with setting(label, ring):
        launches, padded = prepare(bench, size, algorithm, precision, label)
        times = bench.times(launches[algorithm])
    pairs, (events, graph) = Size.parse(size).pairs, times
    text = " ".join(f"{1e12 * x:.2f}" for x in (events / pairs, graph / pairs, graph / padded))
    table = "kernel alone, ps per pair: events, graph, graph per padded pair"
    facts = {"pairs": pairs, "padded_pairs": padded, **times._asdict()}
    cells = [cell(table, f"{algorithm} {precision} {label}", size, text, **facts)]
    for name in ("pack", "patch_norm", "rescore") if label == DEFAULT else ():
        times = bench.times(launches[name])
        text = " ".join(f"{1e6 * x:.1f}" for x in times)
        cells.append(cell("us: events, graph", name, size, text, **times._asdict()))
    return cells


def setting(label: str, ring: int | None) -> AbstractContextManager:
    """Another size of the slab's ring, or kernels that look for the index of every tile."""
    if ring is not None:
        return mock.patch("ttsr_fast.kernels.slab_search.RING_BYTES", ring << 20)
    name = "ttsr_fast.kernels.tiles.lazy"
    return mock.patch(name, return_value=False) if label == "not lazy" else nullcontext()


def time_jobs(bench: Bench) -> Jobs:
    """What matters most first; the slab at the largest size last."""
    sizes, slab = bench.sizes, itertools.product(bench.sizes[::-1], bench.precisions, bench.rings)
    searches = [(size, "rolled", "fp16", label) for size in sizes for label in bench.tiles]
    searches += [(size, "rolled", "fp16x3", "64x128/4/3") for size in sizes]
    searches += [(bench.batch, "direct", "fp16", "")]
    searches += [(size, "slab", kind, f"{ring} MiB", ring) for size, kind, ring in slab]
    for arguments in searches:
        yield " ".join(arguments[:4]), partial(time_search, bench, *arguments)


# --- ceilings ---


def read_l2(bench: Bench) -> Cells:
    blocks, repeats, programs = (2, 1, 1) if bench.tiny else (4096, 64, 8 * 132)
    x = torch.ones(blocks, 1024, device=bench.device)  # 16 MiB
    sums = x.new_empty(programs)
    run = partial(gpu_cases.read_kernel[(programs,)], x, sums, blocks, repeats, BLOCK=1024)
    run()
    bench.check(lambda: check_close(["sum"], [sums.sum()], [x.double().sum() * repeats], 1e-5))
    return rate(bench, "L2 read, 16 MiB", run, x.nbytes * repeats, "TB/s")


def rate(bench: Bench, row: str, run: Run, count: float, unit: str) -> Cells:
    run()
    times = bench.times(run)
    text = f"{count / times.graph_s / 1e12:.2f} {unit}, {1e6 * times.graph_s:.1f} us"
    return [cell("ceilings", row, "graph", text, count=count, **times._asdict())]


def bmm(bench: Bench, depth: int, leading: int) -> Cells:
    """The slab's product, with a leading dimension of its result."""
    size, leading = (32, 32 + leading % 64) if bench.tiny else (3230, leading)
    a, b = (torch.randn(1, size, depth, device=bench.device).half() for _ in range(2))
    out = torch.empty(1, size, leading, device=bench.device)[:, :, :size]
    if bench.device.type == "cuda":
        run = partial(torch.ops.aten.bmm.dtype_out, a, b.mT, torch.float32, out=out)
    else:
        run = partial(torch.bmm, a.float(), b.float().mT, out=out)
    run()
    bench.check(lambda: check_close(["product"], [out], [a.double() @ b.double().mT], 1e-3))
    row = f"bmm {size}x{size}x{depth}, leading dimension {leading}"
    return rate(bench, row, run, 2 * size * size * depth, "TFLOP/s")


def slab_block(bench: Bench, precision: str, ring: int) -> Cells:
    """Product and box sums of one block."""
    size, cells = bench.sizes[-1], []
    with setting("", ring):
        shape, launches = first_block(bench, size, precision)
    table = f"one block of the slab at {size}, ps per padded pair: events, graph; CPU us"
    for name, run in launches.items():
        host, times = bench.host(run), bench.times(run)
        text = " ".join(f"{1e12 * x / math.prod(shape):.2f}" for x in times)
        facts = {"host_s": host, "pairs": math.prod(shape), **times._asdict()}
        row = f"{precision} {ring} MiB, {'x'.join(map(str, shape))}"
        cells.append(cell(table, row, name, f"{text}; {1e6 * host:.0f}", **facts))
    return cells


def first_block(bench: Bench, size: str, precision: str) -> tuple[list[int], dict[str, Run]]:
    """Images, keys and queries of the first block, and what is launched for it."""
    from ttsr_fast.kernels import slab_search, tiles

    launches, _ = prepare(bench, size, "slab", precision, "")
    query, key, scale, best, how, _ = launches["slab"].args
    blocks = slab_search.Blocks(query.layout, key.layout, query.images)
    block, ring = next(slab_search.each(query, key, blocks)), blocks.ring(query.square)
    queries, keys, out = block.queries(query, how), block.keys(key, how), blocks.products(ring)
    runs = {"product": partial(slab_search.multiply, keys, queries.mT, out)}
    if slab_search.has_cuda_kernel(ring):
        for keys, rows in ((8, 16), (4, 16), (8, 8), (8, 64)):  # of a thread, of a walk
            given = slab_search.cuda_arguments(query, key, scale, best, ring, how, blocks)
            run = partial(torch.ops.ttsr_fast.cuda_slab_argmax, *given[:-2], keys, rows)
            runs[f"{keys}x{rows}"] = run
    tile = tiles.tile("slab", how.name)
    runs["triton"] = partial(slab_search.box_max, ring, scale, best, block, tile)
    return list(out.shape), runs


def launch_cost(bench: Bench, algorithm: str) -> Cells:
    """CPU time of every launch, at a size that the device keeps up with."""
    launches, _ = prepare(bench, TINY, algorithm, "fp16", "")
    hosts = {name: bench.host(run) for name, run in launches.items()}
    table = "CPU us per launch"
    return [cell(table, algorithm, n, f"{1e6 * s:.0f}", host_s=s) for n, s in hosts.items()]


def ceiling_jobs(bench: Bench) -> Jobs:
    device = bench.device
    if device.type == "cuda":
        run, flop = harness.gemm_run("float16", 8192, device)
        yield "mm", partial(rate, bench, "mm 8192x8192x8192 fp16", run, flop, "TFLOP/s")
        for depth in (256, 768):
            run, flop = harness.widening_gemm_run(depth, device)
            row = f"mm 8192x8192x{depth} fp16 to fp32"
            yield row, partial(rate, bench, row, run, flop, "TFLOP/s")
        copy, copied = harness.copy_run(device)
        yield "copy", partial(rate, bench, "device copy, 1 GiB", copy, copied, "TB/s")
    yield "L2 read", partial(read_l2, bench)
    for depth in (256, 768):
        for leading in (3230, 3232, 4096):
            yield f"bmm {depth} {leading}", partial(bmm, bench, depth, leading)
    for precision, ring in itertools.product(bench.precisions, bench.rings):
        yield f"block {precision} {ring} MiB", partial(slab_block, bench, precision, ring)
    for algorithm in ("direct",) if bench.tiny else ("rolled", "slab", "direct"):
        yield f"launches of {algorithm}", partial(launch_cost, bench, algorithm)


# --- profiles ---


def profile_jobs(bench: Bench) -> Jobs:
    def search(size: str, algorithm: str, label: str) -> Run:
        return prepare(bench, size, algorithm, "fp16", label)[0][algorithm]

    def box() -> Run:
        runs = list(first_block(bench, bench.sizes[-1], "fp16")[1].values())
        runs[0]()
        return runs[1]

    def fold(operation: str) -> Run:
        size, levels = Size.parse(bench.batch), "all three"
        maps = transfer.make_maps(levels, "NCHW", size, torch.float32, bench.device)
        index = transfer.make_index("random", size, bench.device)
        return transfer_peers.run("cpp", operation, *maps, index, transfer.strides_of(levels))

    for label in (DEFAULT, "64x128/4/3"):
        yield f"rolled {label}", partial(profile, bench, search, bench.sizes[-1], "rolled", label)
    yield "direct", partial(profile, bench, search, bench.batch, "direct", "")
    yield "box", partial(profile, bench, box)
    for operation in ("gather_fold", "adjoint"):
        yield operation, partial(profile, bench, fold, operation)


def profile(bench: Bench, make: Callable[..., Run], *arguments: str) -> Cells:
    """One launch that the profiler sees, after one that it does not."""
    run = make(*arguments)
    run()
    devices.synchronize(bench.device)
    with torch.cuda.profiler.profile() if bench.device.type == "cuda" else nullcontext():
        run()
        devices.synchronize(bench.device)
    return []


# --- running jobs ---

PARTS = {"check": check_jobs, "times": time_jobs, "ceilings": ceiling_jobs, "profile": profile_jobs}


def run_jobs(jobs: Jobs, args: argparse.Namespace, device: torch.device) -> int:
    """All of them; 1 if one is not right, or all are declined."""
    data = json.loads(args.out.read_text()) if args.resume else {"jobs": {}, "cells": []}

    def keep(name: str, state: str, reason: object = "") -> None:
        data["jobs"][name] = [state, str(reason)]
        if args.out:
            harness.write_json(args.out, data)
        print(f"{state} {name}" + (f": {shorten(str(reason), 200)}" if reason else ""), flush=True)

    def give_up(name: str) -> None:
        keep(name, "hangs", f"no result after {HANGING:.0f} s")
        restart(args)

    for name, job in jobs:
        if name in data["jobs"]:
            continue
        watch = threading.Timer(HANGING, give_up, [name])
        watch.daemon = True
        watch.start()
        try:
            data["cells"] += job()
            keep(name, "ok")
        except harness.Declined as error:
            keep(name, "declined", error)
        except WrongResult as error:
            keep(name, "WRONG", error)
        except Exception as error:  # of compilers and libraries; the other jobs go on
            keep(name, "failed", f"{type(error).__name__}: {error}")
            try:
                devices.synchronize(device)
            except RuntimeError:  # after an illegal access CUDA cannot be used
                restart(args)
        finally:
            watch.cancel()
    states = [state for state, _ in data["jobs"].values()]
    right, declined = states.count("ok"), states.count("declined")
    print(f"{right} right, {declined} declined, {len(states) - right - declined} not right")
    return int(right == 0 or right + declined < len(states))


def restart(args: argparse.Namespace) -> None:
    """The same program, from the next job on."""
    if args.out is None:
        os._exit(1)
    argv = [x for x in sys.argv if x != "--resume"]
    os.execv(sys.executable, [sys.executable, "-u", *argv, "--resume"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=PARTS)
    add("--out", type=Path, metavar="FILE", help="results as JSON")
    add("--tiny", action="store_true", help="a few pixels, on the CPU")
    add("--few", action="store_true", help="of `check` one case of each kernel")
    add("--resume", action="store_true", help="keep the jobs that FILE has")
    args = parser.parse_args(argv)
    device = devices.pick("cpu" if args.tiny else "cuda")
    reason = None if args.tiny else library.load_cuda_library()
    if reason is not None:
        print(f"the slab runs in Triton alone: {reason}")
    return run_jobs(PARTS[args.part](Bench(device, args.tiny, args.few)), args, device)


if __name__ == "__main__":
    sys.exit(main())
