"""The kernels alone: a step of `gpu_check.py` for each of the parts below.

    python bench/gpu_kernels.py check | times | ceilings | profile

`--out FILE` is rewritten after every job. If a job leaves CUDA unusable or
hangs, the process starts again with the next one. A wrong result is not timed.
`--tiny` runs at a few pixels, on the CPU with TRITON_INTERPRET=1. `profile`
shows a profiler one launch of each kernel.
"""

import argparse
import itertools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple
from unittest import mock

import machine
import measure
import torch
import transfer
import triton
import triton.language as tl
from gate import SearchTruth, WrongResult, check_close
from machine import CPU
from registry import Declined, Run, Size, copy_run, gemm_run
from search_candidates import PATCH, PRECISIONS, choice_tolerance, maps

from ttsr_fast.operators import library
from ttsr_fast.operators.patch import Score

Cells = list[dict[str, Any]]
Jobs = Iterator[tuple[str, Callable[[], Cells]]]
CASES = ("2*9x37:11x35", "40x42:70x13")  # widths that fill no tile, band or strip
SIZES, BATCH, TINY = ("540x960", "270x480", "125x185", "160x160"), "9*40x40", "2x3"
RINGS = (8, 16, 32, 64)  # MiB
DEFAULT = "128x128/8/4"
TILES = (DEFAULT, "128x128/8/3", "64x128/4/3", "128x64/4/3", "64x64/4/4", "not lazy")
LAUNCHES, LONG = 20, 0.1  # launches timed together, and their longest time in seconds
HANGING = 40.0  # seconds, the limit of a job


class Times(NamedTuple):
    """Seconds of a launch, by events around several and from a graph of them; and of the CPU."""

    events_s: float
    graph_s: float
    host_s: float


class Lab:
    """The device with its clocks. When `compiling`, kernels are launched and nothing else."""

    def __init__(self, device: torch.device, tiny=False, few=False, compiling=False) -> None:
        self.device, self.tiny, self.few, self.compiling = device, tiny, few, compiling
        self.sizes = (TINY,) if tiny else SIZES
        self.batch, self.precisions = TINY if tiny else BATCH, ("fp16", "fp16x3")[: 2 - tiny]
        self.tiles, self.rings = (TILES[::5], RINGS[:1]) if tiny else (TILES, RINGS)
        channels = 8 if tiny else 256
        self.maps = cache(lambda size: maps(replace(Size.parse(size), channels=channels), device))
        self.truth = cache(lambda size: SearchTruth(*self.maps(size), limit=256))

    def check(self, check: Run) -> None:
        if not self.compiling:
            measure.synchronize(self.device)
            check()

    def times(self, run: Run) -> Times:
        """Times of a launch that has run before; a long one is timed once, by events."""
        if self.compiling:
            return Times(1.0, 1.0, 1.0)
        first = measure.timed(run, self.device)
        if first > LONG or self.tiny:
            return Times(first, first, first)
        count = min(LAUNCHES, int(LONG / first))
        several = partial(measure.repeat, run, count)
        runs = (several, measure.graph_run(several))
        events, graph = (min(measure.timed(r, self.device) for _ in range(2)) for r in runs)
        host = measure.timed(several, CPU)  # which does not wait for the GPU
        measure.synchronize(self.device)
        return Times(events / count, graph / count, host / count)


def cell(table: str, row: str, column: str, text: str, **numbers: Any) -> dict[str, Any]:
    return {"table": table, "row": row, "column": column, "cell": text, **numbers}


# --- the search ---


def prepare(lab: Lab, size: str, algorithm: str, precision: str, label: str) -> tuple:
    """The launches of a search by name, once its result is right; and its multiplied pairs."""
    from ttsr_fast.kernels import search, tile_configs
    from ttsr_fast.kernels.precision import precision_for

    query, key = lab.maps(size)
    reason = search.why_not(algorithm, query.dtype, 3, precision)
    if reason is not None:
        raise Declined(reason)
    tile = tile_configs.select(algorithm, precision_for(query.dtype, precision).name)
    if "/" in label:
        tile = tile_configs.TileConfig(*map(int, label.replace("x", "/").split("/")))
    grid = (len(query), *query.shape[2:])
    match = (torch.full(grid, math.nan, device=lab.device), torch.full(grid, -1, device=lab.device))
    plan = search.Plan(precision, algorithm, tile)
    stages = search.stages(query, key, None, match, PATCH, Score(), plan)
    for run in stages.values():
        run()
    lab.check(lambda: lab.truth(size).check(match, choice_tolerance(precision)))
    return stages, search.padded_pairs(query.shape, key.shape, PATCH, algorithm, tile)


def check_search(lab: Lab, size: str, algorithm: str, precision: str) -> Cells:
    prepare(lab, size, algorithm, precision, "")
    return [cell("check", f"{algorithm} {size}", precision, "ok")]


def check_jobs(lab: Lab) -> Jobs:
    """Every algorithm and precision, or with `few` one search of each algorithm."""
    few = lab.few or lab.tiny
    sizes = (lab.sizes[-1:] if lab.tiny else CASES)[: 1 if few else None]
    precisions = PRECISIONS if not few else ("fp16",)
    for place in itertools.product(sizes, ("rolled", "slab", "direct"), precisions):
        yield " ".join(place), partial(check_search, lab, *place)


def time_search(
    lab: Lab, size: str, algorithm: str, precision: str, label: str, ring: int | None = None
) -> Cells:
    with setting(label, ring):
        stages, padded = prepare(lab, size, algorithm, precision, label)
        times = lab.times(stages[algorithm])
    pairs, (events, graph, _) = Size.parse(size).pairs, times
    text = " ".join(f"{1e12 * x:.2f}" for x in (events / pairs, graph / pairs, graph / padded))
    table = "kernel alone, ps per pair: events, graph, graph per padded pair"
    facts = {"pairs": pairs, "padded_pairs": padded, **times._asdict()}
    cells = [cell(table, f"{algorithm} {precision} {label}", size, text, **facts)]
    for name in ("pack", "key_scale", "rescore") if label == DEFAULT else ():
        times = lab.times(stages[name])
        text = " ".join(f"{1e6 * x:.1f}" for x in times)
        cells.append(cell("us: events, graph, CPU", name, size, text, **times._asdict()))
    return cells


def setting(label: str, ring: int | None) -> AbstractContextManager:
    """Another size of the slab's ring, or kernels that look for the index of every tile."""
    if ring is not None:
        return mock.patch("ttsr_fast.kernels.slab.RING_BYTES", ring << 20)
    name = "ttsr_fast.kernels.tile_configs.lazy"
    return mock.patch(name, return_value=False) if label == "not lazy" else nullcontext()


def time_jobs(lab: Lab) -> Jobs:
    """The most important first; the slab at the largest size last."""
    sizes, slab = lab.sizes, itertools.product(lab.sizes[::-1], lab.precisions, lab.rings)
    searches = [(size, "rolled", "fp16", label) for size in sizes for label in lab.tiles]
    searches += [(size, "rolled", "fp16x3", "64x128/4/3") for size in sizes]
    searches += [(lab.batch, "direct", "fp16", "")]
    searches += [(size, "slab", kind, f"{ring} MiB", ring) for size, kind, ring in slab]
    for arguments in searches:
        yield " ".join(arguments[:4]), partial(time_search, lab, *arguments)


# --- ceilings ---


@triton.jit
def read_kernel(p_x, p_sum, BLOCKS, REPEATS, BLOCK: tl.constexpr):
    """Reads all blocks REPEATS times, past the first-level cache."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_b in range(tl.program_id(0), BLOCKS * REPEATS, tl.num_programs(0)):
        p_block = p_x + i_b % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        b_sum += tl.load(p_block, cache_modifier=".cg")
    tl.store(p_sum + tl.program_id(0), tl.sum(b_sum))


def read_l2(lab: Lab) -> Cells:
    blocks, repeats, programs = (2, 1, 1) if lab.tiny else (4096, 64, 8 * 132)
    x = torch.ones(blocks, 1024, device=lab.device)  # 16 MiB
    sums = x.new_empty(programs)
    run = partial(read_kernel[(programs,)], x, sums, blocks, repeats, BLOCK=1024)
    run()
    lab.check(lambda: check_close(["sum"], [sums.sum()], [x.double().sum() * repeats], 1e-5))
    return rate(lab, "L2 read, 16 MiB", run, x.nbytes * repeats, "TB/s")


def rate(lab: Lab, row: str, run: Run, count: float, unit: str) -> Cells:
    run()
    times = lab.times(run)
    text = f"{count / times.graph_s / 1e12:.2f} {unit}, {1e6 * times.graph_s:.1f} us"
    return [cell("ceilings", row, "graph", text, count=count, **times._asdict())]


def bmm(lab: Lab, depth: int, leading: int) -> Cells:
    """The slab's product, with a leading dimension of its result."""
    size, leading = (32, 32 + leading % 64) if lab.tiny else (3230, leading)
    a, b = (torch.randn(1, size, depth, device=lab.device).half() for _ in range(2))
    out = torch.empty(1, size, leading, device=lab.device)[:, :, :size]
    if lab.device.type == "cuda":
        run = partial(torch.ops.aten.bmm.dtype_out, a, b.mT, torch.float32, out=out)
    else:
        run = partial(torch.bmm, a.float(), b.float().mT, out=out)
    run()
    lab.check(lambda: check_close(["product"], [out], [a.double() @ b.double().mT], 1e-3))
    row = f"bmm {size}x{size}x{depth}, leading dimension {leading}"
    return rate(lab, row, run, 2 * size * size * depth, "TFLOP/s")


def slab_block(lab: Lab, precision: str, ring: int) -> Cells:
    """Product and box sums of one block."""
    size, cells = lab.sizes[-1], []
    with setting("", ring):
        shape, runs = first_block(lab, size, precision)
    table = f"one block of the slab at {size}, ps per padded pair: events, graph; CPU us"
    for name, run in runs.items():
        run()
        times, pairs = lab.times(run), math.prod(shape)
        text = " ".join(f"{1e12 * x / pairs:.2f}" for x in times[:2])
        row = f"{precision} {ring} MiB, {'x'.join(map(str, shape))}"
        text += f"; {1e6 * times.host_s:.0f}"
        cells.append(cell(table, row, name, text, pairs=pairs, **times._asdict()))
    return cells


def first_block(lab: Lab, size: str, precision: str) -> tuple[list[int], dict[str, Run]]:
    """Images, keys and queries of the first block, and its launches."""
    from ttsr_fast.kernels import slab, tile_configs

    stages, _ = prepare(lab, size, "slab", precision, "")
    query, key, scale, argmax, _ = stages["slab"].args
    blocks = slab.Blocks(query.layout, key.layout, query.images)
    block, ring = next(slab.all_blocks(blocks)), blocks.ring(query.rows)
    queries, keys, out = block.queries(query), block.keys(key), blocks.products(ring)
    runs = {"product": partial(slab.multiply, keys, queries.mT, out)}
    if slab.has_cuda_kernel(ring):
        for keys, rows in ((8, 16), (4, 16), (8, 8), (8, 64)):  # of a thread, of a walk
            given = slab.cuda_arguments(query, key, scale, argmax.words, ring, blocks)
            run = partial(torch.ops.ttsr_fast.cuda_slab_argmax, *given[:-2], keys, rows)
            runs[f"{keys}x{rows}"] = run
    tile = tile_configs.select("slab", query.precision.name)
    runs["triton"] = partial(slab.search_block, ring, scale, argmax.words, block, tile)
    return list(out.shape), runs


def ceiling_jobs(lab: Lab) -> Jobs:
    device = lab.device
    if device.type == "cuda":
        for depth, out in ((8192, None), (256, torch.float32), (768, torch.float32)):
            row = f"mm 8192x8192x{depth} fp16" + (" to fp32" if out else "")
            yield row, partial(rate, lab, row, *gemm_run("float16", depth, device, out), "TFLOP/s")
        yield "copy", partial(rate, lab, "device copy, 1 GiB", *copy_run(device), "TB/s")
    yield "L2 read", partial(read_l2, lab)
    for depth, leading in itertools.product((256, 768), (3230, 3232, 4096)):
        yield f"bmm {depth} {leading}", partial(bmm, lab, depth, leading)
    for precision, ring in itertools.product(lab.precisions, lab.rings):
        yield f"block {precision} {ring} MiB", partial(slab_block, lab, precision, ring)


# --- profiles ---


def profile_jobs(lab: Lab) -> Jobs:
    def search(size: str, algorithm: str, label: str) -> Run:
        return prepare(lab, size, algorithm, "fp16", label)[0][algorithm]

    def box() -> Run:
        product, kernel, *_ = first_block(lab, lab.sizes[-1], "fp16")[1].values()
        product()
        return kernel

    def fold(operation: str) -> Run:
        size = Size.parse(lab.batch)
        place = (operation, transfer.TOGETHER, "NCHW", "random", size)
        return transfer.CANDIDATES["cpp"].prepare(*transfer.inputs(*place, lab.device))

    for label in (DEFAULT, "64x128/4/3"):
        yield f"rolled {label}", partial(profile, lab, search, lab.sizes[-1], "rolled", label)
    yield "direct", partial(profile, lab, search, lab.batch, "direct", "")
    yield "box", partial(profile, lab, box)
    for operation in transfer.OPERATIONS:
        yield operation, partial(profile, lab, fold, operation)


def profile(lab: Lab, make: Callable[..., Run], *arguments: str) -> Cells:
    """One launch in sight of the profiler, after one that it does not see."""
    run = make(*arguments)
    run()
    measure.synchronize(lab.device)
    with torch.cuda.profiler.profile() if lab.device.type == "cuda" else nullcontext():
        run()
        measure.synchronize(lab.device)
    return []


# --- running jobs ---

PARTS = {"check": check_jobs, "times": time_jobs, "ceilings": ceiling_jobs, "profile": profile_jobs}


def run_jobs(jobs: Jobs, args: argparse.Namespace, device: torch.device) -> int:
    """All of them; 1 if one is not right, or all are declined."""
    data = json.loads(args.out.read_text()) if args.resume else {"jobs": {}, "cells": []}

    def keep(name: str, state: str, reason: object = "") -> None:
        data["jobs"][name] = [state, str(reason)]
        if args.out:
            machine.write_json(args.out, data)
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
        except Declined as error:
            keep(name, "declined", error)
        except WrongResult as error:
            keep(name, "WRONG", error)
        except Exception as error:  # of compilers and libraries; the other jobs run
            keep(name, "failed", f"{type(error).__name__}: {error}")
            try:
                measure.synchronize(device)
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
    device = machine.pick("cpu" if args.tiny else "cuda")
    reason = None if args.tiny else library.load_cuda_library()
    if reason is not None:
        print(f"the slab runs in Triton alone: {reason}")
    return run_jobs(PARTS[args.part](Lab(device, args.tiny, args.few)), args, device)


if __name__ == "__main__":
    sys.exit(main())
