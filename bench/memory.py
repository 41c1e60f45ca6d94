"""Peak memory of a run above its inputs and results, and what there is to be had.

On a GPU: the high-water mark of torch's allocator, reset before the run. What a library allocates
past torch is not seen there.

On the CPU: each contender runs once in a process of its own, forked from a server that has only
imported torch. There it warms up on tiny inputs (libraries, thread pools), makes its inputs,
returns freed heap to the system, resets the kernel's high-water mark of resident memory, runs, and
reports how far the mark rose, less the size of its results. That counts what any library allocates,
through torch or past it, to within about 2 MiB. It needs Linux; elsewhere there is no figure.
"""

import ctypes
import gc
import multiprocessing
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from devices import Run, memory_bytes
from torch import Tensor


def peak_bytes_on_gpu(run: Run, device: torch.device) -> int:
    """Peak memory of `run`, in this process; libraries must have warmed up."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return max(0, peak - before - _tensor_bytes(result))


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


def peak_bytes_here(run: Run) -> int:
    """The same of a run in this process, on Linux; libraries must have warmed up."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    return max(0, peak - before - _tensor_bytes(result))


def _weigh(sender: Any, threads: int, job: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(threads)
        warm_up, prepare = job(*arguments)
        warm_up()
        sender.send(("peak", peak_bytes_here(prepare())))
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


def available_bytes(device: torch.device) -> int:
    """Memory that a new allocation can have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return memory_bytes()
