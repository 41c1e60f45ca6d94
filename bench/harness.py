"""What every benchmark here shares: the correctness gate, time, memory, the machine and the files.

Correctness comes first: `measure` runs every contender once, holds its result against float64
ground truth (`gate.py`), and neither weighs nor times one that is wrong.

Memory: each contender runs once in a process of its own, forked from a server that has only
imported torch. There it warms up on tiny inputs (libraries, thread pools), makes its inputs,
returns freed heap to the system, resets the kernel's high-water mark of resident memory, runs, and
reports how far the mark rose, less the size of its results. That counts what any library allocates,
through torch or past it, to within about 2 MiB. It needs Linux; elsewhere the field is null.

Time: the contenders take turns, every round from another starting point, so a noisy neighbour
slows all of them alike. What they are compared with (a matrix product, a copy) takes part in the
same rounds. Reported are the median and the 20 % and 80 % quantiles.
"""

import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from gate import WrongResult
from torch import Tensor

import ttsr_fast

Run = Callable[[], Any]
MIB = 1 << 20
PAUSE = 0.005  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds per run: the median and the 20 % and 80 % quantiles of `reps` runs."""

    median_s: float
    low_s: float
    high_s: float
    reps: int


@dataclass(frozen=True)
class Contender:
    """One way of computing a result.

    Attributes:
        run: computes the result.
        check: measures of accuracy of a result; raises `WrongResult` if it fails the gate.
        job: what `peak_bytes` takes to repeat the run in a process of its own.
    """

    run: Run
    check: Callable[[Any], dict[str, float]]
    job: tuple[Any, ...]


# --- the measurement ---


def measure(
    contenders: dict[str, Contender],
    rulers: dict[str, Run],
    *,
    seconds: float,
    step: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Timing]]:
    """Check, weigh, then time.

    Args:
        contenders: what to measure, by name.
        rulers: runs timed in the same rounds and not checked.
        seconds: time to spend on each.
        step: called before each piece of work with what it is.

    Returns:
        A record per contender, whose `status` is `"ok"`, or `"failed"` with a `reason` and no
        measurement; and the timing of every ruler.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        step(f"{name}: check and memory")
        try:
            records[name] = {"status": "ok", **contender.check(contender.run())}
            records[name]["peak_bytes"] = peak_bytes(*contender.job)
        except (WrongResult, RuntimeError, ValueError, MemoryError) as error:
            records[name] = {"status": "failed", "reason": shorten(str(error), 160)}
    right = {name: c.run for name, c in contenders.items() if records[name]["status"] == "ok"}
    step("time, in turns")
    timings = time_interleaved({**rulers, **right}, seconds=seconds)
    for name in right:
        records[name] |= asdict(timings[name])
    return records, {name: timings[name] for name in rulers}


# --- time ---


def summarise(samples: Iterable[float]) -> Timing:
    """Median and 20 % and 80 % quantiles, interpolated linearly."""
    samples = list(samples)
    median, low, high = np.quantile(samples, (0.5, 0.2, 0.8)).tolist()
    return Timing(median, low, high, len(samples))


def time_interleaved(
    runs: dict[str, Run], *, seconds: float = 1.0, min_reps: int = 5
) -> dict[str, Timing]:
    """Time runs in turns until each has taken `seconds` and `min_reps` runs.

    A turn is one run, or as many as fit into a tenth of `seconds`, so that short runs are spread
    over the same time as long ones. A run that takes longer than `seconds` stops once it has spent
    `min_reps` times that. The first run of each warms up and is not counted, unless it alone took
    more than `seconds`.
    """
    samples: dict[str, list[float]] = {}
    for name, run in runs.items():
        samples[name] = [taken for taken in _turn(run, 0.0) if taken > seconds]
    order = list(runs)
    gc.disable()
    try:
        while left := [name for name in order if not _enough(samples[name], seconds, min_reps)]:
            for name in left:
                samples[name] += _turn(runs[name], seconds / 10)
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: summarise(taken) for name, taken in samples.items()}


def _turn(run: Run, seconds: float) -> list[float]:
    """Times of consecutive runs.

    The pause lets the threads of the turn before go to sleep: OpenMP runtimes spin for a while,
    each on its own.
    """
    time.sleep(PAUSE)
    taken: list[float] = []
    left = seconds
    while not taken or taken[-1] <= left:
        start = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - start)
        left -= taken[-1]
        del result
    return taken


def _enough(samples: list[float], seconds: float, min_reps: int) -> bool:
    spent = sum(samples)
    return spent >= seconds and (len(samples) >= min_reps or spent >= seconds * min_reps)


def gemm_run(dtype: torch.dtype, depth: int, size: int = 1024) -> tuple[Run, int]:
    """A matrix product `[size, depth] @ [depth, size]` of the vendor's library, and its FLOP."""
    a, b = (torch.randn(shape).to(dtype) for shape in ((size, depth), (depth, size)))
    out = torch.empty(size, size, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * size * size * depth


def copy_run(size: int = 128 * MIB) -> tuple[Run, int]:
    """A copy that does not fit the caches, and the bytes it reads and writes."""
    source = torch.randn(size // 4)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


# --- memory ---


def peak_bytes(job: Callable[..., tuple[Run, Callable[[], Run]]], *arguments: Any) -> int | None:
    """Peak resident memory of a job above its inputs and results, in a process of its own.

    Args:
        job: importable by name; `job(*arguments)` returns a run on tiny inputs to warm up with, and
            a function that makes the inputs and returns the run to measure.
        arguments: picklable.

    Returns:
        Bytes, or None where the system does not keep a high-water mark that can be reset.

    Raises:
        RuntimeError: the process died or raised; its message is passed on.
    """
    if platform.system() != "Linux":
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_weigh, args=(sender, torch.get_num_threads(), job, arguments), daemon=True
    )
    process.start()
    sender.close()
    try:
        kind, answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measures memory died (exit code {process.exitcode})"
        ) from None
    process.join()
    if kind == "error":
        raise RuntimeError(f"measuring memory failed: {answer}")
    return answer


def _weigh(sender: Any, threads: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(threads)
        warm_up, prepare = job(*arguments)
        warm_up()
        run = prepare()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
        sender.send(("peak", max(0, peak - before - _tensor_bytes(result))))
    except Exception as error:
        sender.send(("error", f"{type(error).__name__}: {error}"))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _tensor_bytes(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.nbytes
    return sum(map(_tensor_bytes, result)) if isinstance(result, tuple | list) else 0


def available_bytes() -> int:
    """Memory that a new allocation can have."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# --- machine and files ---


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions: dict[str, str | None] = {"ttsr-fast": ttsr_fast.__version__}
    for package in ("torch", "numpy", "faiss-cpu", "pykeops"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, data: Any) -> None:
    """Write through a temporary file in the same folder, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
