"""What every benchmark here shares: the correctness gate, time, memory, the machine and the files.

Correctness comes first: `measure` runs every contender once, holds its result against float64
ground truth (`gate.py`), and neither weighs nor times one that is wrong.

Memory: see `memory.py`; above inputs and results, on either device.

Time: the contenders take turns, every round from another starting point, so a noisy neighbour
slows all of them alike. What they are compared with (a matrix product, a copy) takes part in the
same rounds. Reported are the median and the 20 % and 80 % quantiles. `devices.py` holds the clocks.
"""

import datetime
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import Any

import devices
import memory
import numpy as np
import torch
from devices import CPU, Run
from gate import WrongResult

import ttsr_fast

MIB = 1 << 20
PAUSE = 0.005  # seconds
# What a matrix product multiplies, and how torch is told to.
OPERANDS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class Declined(Exception):
    """A contender cannot do what is asked, and says why."""


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
        job: what `memory.peak_bytes` takes to repeat the run in a process of its own; None if there
            is no figure.
    """

    run: Run
    check: Callable[[Any], dict[str, float]]
    job: tuple[Any, ...] | None


# --- the measurement ---


def measure(
    contenders: dict[str, Contender],
    rulers: dict[str, Run],
    *,
    seconds: float,
    device: torch.device = CPU,
    step: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, Timing]]:
    """Check, weigh, then time.

    Args:
        contenders: what to measure, by name.
        rulers: runs timed in the same rounds and not checked.
        seconds: time to spend on each.
        device: where they run.
        step: called before each piece of work with what it is.

    Returns:
        A record per contender, whose `status` is `"ok"`; `"failed"` or, where it declines or the
        memory of a GPU does not suffice, `"skipped"`, each with a `reason` and no measurement; and
        the timing of every ruler.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        step(f"{name}: check and memory")
        records[name] = check_and_weigh(contender, device)
    right = {name: c.run for name, c in contenders.items() if records[name]["status"] == "ok"}
    step("time, in turns")
    timings = time_interleaved({**rulers, **right}, seconds=seconds, device=device)
    for name in right:
        records[name] |= asdict(timings[name])
    return records, {name: timings[name] for name in rulers}


def check_and_weigh(contender: Contender, device: torch.device) -> dict[str, Any]:
    """The record of a contender, without its time."""
    try:
        record = {"status": "ok", **contender.check(contender.run())}
        if contender.job is None:
            return record | {"peak_bytes": None}
        if device.type == "cuda":
            return record | {"peak_bytes": memory.peak_bytes_on_gpu(contender.run, device)}
        return record | {"peak_bytes": memory.peak_bytes(*contender.job)}
    except torch.OutOfMemoryError:
        return {"status": "skipped", "reason": "out of memory"}
    except Declined as error:
        return {"status": "skipped", "reason": shorten(str(error), 160)}
    except WrongResult as error:
        return {"status": "failed", "wrong": True, "reason": shorten(str(error), 160)}
    # Compilers and libraries have exceptions of their own; one must not end the run of the others.
    except Exception as error:
        reason = shorten(f"{type(error).__name__}: {error}", 160)
        return {"status": "failed", "reason": reason}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def deferred(make: Callable[..., Run], *arguments: Any) -> Run:
    """A run that is made at its first call, where a failure is recorded like any other."""
    made = cache(partial(make, *arguments))
    return lambda: made()()


# --- time ---


def summarise(samples: Iterable[float]) -> Timing:
    """Median and 20 % and 80 % quantiles, interpolated linearly."""
    samples = list(samples)
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

    A turn is one run, or as many as fit into a tenth of `seconds`, so that short runs are spread
    over the same time as long ones. A run that takes longer than `seconds` stops once it has spent
    `min_reps` times that. The first run of each warms up and is not counted, unless it alone took
    more than `seconds`.
    """
    samples: dict[str, list[float]] = {}
    for name, run in runs.items():
        samples[name] = [taken for taken in _turn(run, 0.0, device) if taken > seconds]
    order = list(runs)
    gc.disable()
    try:
        while left := [name for name in order if not _enough(samples[name], seconds, min_reps)]:
            for name in left:
                samples[name] += _turn(runs[name], seconds / 10, device)
            order = order[1:] + order[:1]
    finally:
        gc.enable()
    return {name: summarise(taken) for name, taken in samples.items()}


def _turn(run: Run, seconds: float, device: torch.device) -> list[float]:
    """Times of consecutive runs.

    The pause lets the threads of the turn before go to sleep: OpenMP runtimes spin for a while,
    each on its own.
    """
    time.sleep(PAUSE)
    taken: list[float] = []
    left = seconds
    while not taken or taken[-1] <= left:
        taken.append(devices.timed(run, device))
        left -= taken[-1]
    return taken


def _enough(samples: list[float], seconds: float, min_reps: int) -> bool:
    spent = sum(samples)
    return spent >= seconds and (len(samples) >= min_reps or spent >= seconds * min_reps)


@contextmanager
def matmul_precision(name: str):
    """`torch.set_float32_matmul_precision` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def products_of(operands: str) -> AbstractContextManager[None]:
    """Where products of float32 are products of `operands`, whatever was allowed before."""
    if OPERANDS[operands] != torch.float32:
        return nullcontext()
    return matmul_precision("high" if operands == "tf32" else "highest")


def gemm_run(operands: str, depth: int, device: torch.device) -> tuple[Run, int]:
    """A product `[size, depth] @ [depth, size]` of the vendor's library, and its FLOP.

    The size is one that fills the device: 1024 on a CPU, 8192 on a GPU.
    """
    size = 1024 if device.type == "cpu" else 8192
    dtype = OPERANDS[operands]
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((size, depth), (depth, size)))
    out = torch.empty(size, size, dtype=dtype, device=device)

    def run() -> None:
        with products_of(operands):
            torch.mm(a, b, out=out)

    return run, 2 * size * size * depth


def widening_gemm_run(depth: int, device: torch.device) -> tuple[Run, int]:
    """The same with operands in float16 and a result in float32, which only GPUs have."""
    size = 8192
    a, b = (torch.randn(shape, device=device).half() for shape in ((size, depth), (depth, size)))
    out = torch.empty(size, size, device=device)
    run = partial(torch.ops.aten.mm.dtype_out, a, b, torch.float32, out=out)
    return run, 2 * size * size * depth


def copy_run(device: torch.device = CPU) -> tuple[Run, int]:
    """A copy that does not fit the caches, and the bytes it reads and writes."""
    size = (128 if device.type == "cpu" else 1024) * MIB
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


# --- machine and files ---


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    versions: dict[str, str | None] = {"ttsr-fast": ttsr_fast.__version__}
    for package in ("torch", "triton", "numpy", "faiss-cpu", "pykeops", "flashlib"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": devices.cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": devices.memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_json(path: Path, data: Any) -> None:
    """Write through a temporary file in the same folder, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)
