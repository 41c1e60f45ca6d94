"""CPU or GPU: the choice, what the results say of it, and its clock.

A run on a GPU is timed by CUDA events around the call, recorded on the current stream, and waited
for: what a caller who waits for the result sees, launches included. Inputs and results that fit
stay in the L2 cache from run to run, for every contender alike. `graph_run` replays a run from a
CUDA graph, without its launches.
"""

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
CPU = torch.device("cpu")
GRAPH_WARM_UPS = 3


def pick(name: str | None) -> torch.device:
    """The device of that name, made the current one; without a name the GPU where there is one.

    Raises:
        ValueError: it is neither the CPU nor a CUDA device that is there.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be cpu or cuda, got {name!r}")
    if device.type == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ValueError(f"{name}: torch {torch.__version__} sees no CUDA device")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name}: there are {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device.index or 0)
    return torch.device("cuda", device.index or 0)


def describe(device: torch.device) -> dict[str, Any]:
    """What the results say of the device."""
    if device.type == "cpu":
        return {"type": "cpu", "name": cpu_model(), "memory_bytes": memory_bytes()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": _driver(),
    }


def stem(device: torch.device, kind: str) -> str:
    """Name of a result file: that of the benchmark, or of the GPU with it."""
    if device.type == "cpu":
        return kind
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return name if kind == "search" else f"{name}-{kind}"


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _driver() -> str | None:
    if torch.version.hip or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.split("\n")[0].strip() or None


# --- its clock ---


def timed(run: Run, device: torch.device) -> float:
    """Seconds that a run takes."""
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


def synchronize(device: torch.device) -> None:
    """Wait for what was launched, and raise what went wrong with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graph_run(run: Run) -> Run:
    """A replay of `run` from a CUDA graph; every call returns the same result tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as capture asks for: libraries set themselves up
        for _ in range(GRAPH_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
