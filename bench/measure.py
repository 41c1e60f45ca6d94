"""Correctness, peak memory and time of runs.

A wrong result gets neither memory nor time. Memory is the peak above inputs and results: in torch's
allocator on a GPU; on the CPU resident memory in a process of its own, which counts every
allocation to within 2 MiB and needs Linux. Time: all runs take turns, so that other load slows all
alike; on a GPU by CUDA events around the call, launches included.
"""

import ctypes
import gc
import importlib
import multiprocessing
import platform
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from gate import WrongResult
from machine import CPU
from registry import Declined, Run, Size
from torch import Tensor

PAUSE = 0.005  # seconds
GRAPH_WARM_UPS = 3
TINY = {"query": (4, 4), "key": (16, 16)}


class Timing(NamedTuple):
    """Seconds per run: the median and the 20 % and 80 % quantiles of `reps` runs."""

    median_s: float
    low_s: float
    high_s: float
    reps: int


class Entry(NamedTuple):
    """A run, its check against the truth, and its peak memory if `weigh` is given."""

    run: Run
    check: Callable[[Any], dict[str, float]]
    weigh: Callable[[], int | None] = lambda: None


def measure(
    entries: dict[str, Entry],
    rooflines: dict[str, Run],
    *,
    seconds: float,
    device: torch.device = CPU,
) -> tuple[dict[str, dict[str, Any]], dict[str, Timing]]:
    """Check, weigh, then time; entries and rooflines take turns.

    Returns a record per entry, with `status` `"ok"`, `"failed"` or `"skipped"`; the last two have a
    `reason` and no measurement. Then the timing of every roofline.
    """
    records = {name: check_and_weigh(entry, device) for name, entry in entries.items()}
    right = {name: e.run for name, e in entries.items() if records[name]["status"] == "ok"}
    timings = time_interleaved({**rooflines, **right}, seconds=seconds, device=device)
    for name in right:
        records[name] |= timings[name]._asdict()
    return records, {name: timings[name] for name in rooflines}


def check_and_weigh(entry: Entry, device: torch.device) -> dict[str, Any]:
    """The record of an entry, without its time."""
    try:
        return {"status": "ok", **entry.check(entry.run()), "peak_bytes": entry.weigh()}
    except torch.OutOfMemoryError:
        return {"status": "skipped", "reason": "out of memory"}
    except Declined as error:
        return {"status": "skipped", "reason": shorten(str(error), 160)}
    # Compilers and libraries have exceptions of their own; the other entries are measured.
    except Exception as error:
        if type(error).__module__.startswith("torch._dynamo"):
            return {"status": "skipped", "reason": shorten(f"it does not compile: {error}", 160)}
        wrong = isinstance(error, WrongResult)
        reason = str(error) if wrong else f"{type(error).__name__}: {error}"
        return {"status": "failed", "wrong": wrong, "reason": shorten(reason, 160)}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def deferred(make: Callable[..., Run], *arguments: Any) -> Run:
    """A run made at its first call, where a failure is recorded like any other."""
    made = cache(partial(make, *arguments))
    return lambda: made()()


# --- time ---


def summarise(samples: list[float]) -> Timing:
    """Median and 20 % and 80 % quantiles, interpolated linearly."""
    median, low, high = np.quantile(samples, (0.5, 0.2, 0.8)).tolist()
    return Timing(median, low, high, len(samples))


def time_interleaved(
    runs: dict[str, Run],
    *,
    seconds: float = 1.0,
    min_reps: int = 5,
    device: torch.device = CPU,
) -> dict[str, Timing]:
    """Time runs in turns until each has taken `seconds` and `min_reps` runs.

    A turn is one run, or as many as fit into a tenth of `seconds`. A run longer than `seconds`
    stops at `min_reps` times that. The first run warms up and counts only if it took longer than
    `seconds`.
    """

    def enough(taken: list[float]) -> bool:
        spent = sum(taken)
        return spent >= seconds and (len(taken) >= min_reps or spent >= seconds * min_reps)

    warm_ups = {name: _turn(run, 0.0, device) for name, run in runs.items()}
    samples = {name: [x for x in taken if x > seconds] for name, taken in warm_ups.items()}
    order = list(runs)
    gc.disable()
    try:
        while left := [name for name in order if not enough(samples[name])]:
            for name in left:
                samples[name] += _turn(runs[name], seconds / 10, device)
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: summarise(taken) for name, taken in samples.items()}


def _turn(run: Run, seconds: float, device: torch.device) -> list[float]:
    """Times of consecutive runs, after a pause in which the threads of the last turn sleep."""
    time.sleep(PAUSE)
    taken: list[float] = []
    left = seconds
    while not taken or taken[-1] <= left:
        taken.append(timed(run, device))
        left -= taken[-1]
    return taken


def timed(run: Run, device: torch.device) -> float:
    """Seconds of a run."""
    if device.type == "cpu":
        start = time.perf_counter()
        result = run()
        taken = time.perf_counter() - start
        del result
        return taken
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    result = run()
    last.record()
    last.synchronize()
    del result
    return first.elapsed_time(last) / 1e3


def repeat(run: Run, count: int) -> None:
    for _ in range(count):
        run()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_run(run: Run) -> Run:
    """A replay of `run` from a CUDA graph; every call returns the same result tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up before the capture
        repeat(run, GRAPH_WARM_UPS)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# --- memory ---


def peak_bytes_on_gpu(run: Run, device: torch.device) -> int:
    """Peak memory of `run` in torch's allocator; libraries must have warmed up."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before - _tensor_bytes(result))


def candidate_job(kind: str, name: str, place: tuple[Any, ...]) -> tuple[Run, Callable[[], Run]]:
    """A job of `peak_bytes`: a candidate of a benchmark on tiny inputs, and at a place."""
    bench = importlib.import_module(kind)
    prepare = bench.CANDIDATES[name].prepare
    tiny = tuple(replace(x, **TINY) if isinstance(x, Size) else x for x in place)
    return (
        lambda: prepare(*bench.inputs(*tiny, CPU))(),
        lambda: prepare(*bench.inputs(*place, CPU)),
    )


def peak_bytes(job: Callable[..., tuple[Run, Callable[[], Run]]], *arguments: Any) -> int | None:
    """Peak resident memory of a job above its inputs and results, in a process of its own.

    `job(*arguments)` returns a run on tiny inputs to warm up with, and a function that makes the
    inputs and returns the run to measure. None where no high-water mark can be reset.
    """
    if platform.system() != "Linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_weigh, torch.get_num_threads(), job, arguments).result()


def peak_bytes_here(run: Run) -> int:
    """Peak resident memory of `run` in this process, on Linux; libraries must have warmed up."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _kilobytes("VmRSS")
    result = run()
    peak = _kilobytes("VmHWM")
    return max(0, (peak - before) * 1024 - _tensor_bytes(result))


def _weigh(threads: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    torch.set_num_threads(threads)
    warm_up, prepare = job(*arguments)
    warm_up()
    return peak_bytes_here(prepare())


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[0])


def _tensor_bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(map(_tensor_bytes, result)) if isinstance(result, tuple | list) else 0
