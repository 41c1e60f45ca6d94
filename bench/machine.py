"""The device, what the results say of it, and the files of results."""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import ttsr_fast
from ttsr_fast import files
from ttsr_fast.operators import library

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "faiss-cpu", "pykeops")


def pick(name: str) -> torch.device:
    """The device of that name, made current; without a name the GPU where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {name!r}")
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees no CUDA device")
    device = torch.device("cuda", torch.device(name).index or 0)
    torch.cuda.set_device(device)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    """Fields of the device in the results."""
    if device.type == "cpu":
        return {"type": "cpu", "name": _cpu_model(), "memory_bytes": _memory_bytes()}
    properties = torch.cuda.get_device_properties(device)
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda or torch.version.hip,
        "driver": driver and driver.split("\n")[0],
    }


def facts() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    found = {x: [y.version for y in metadata.distributions(name=x)] for x in PACKAGES}
    versions = {package: next(iter(versions), None) for package, versions in found.items()}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": instruction_set(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"ttsr-fast": ttsr_fast.__version__, **versions},
        "commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def instruction_set() -> str | None:
    """Instruction set of this package's kernels for the CPU, None without them."""
    return library.instruction_set() if library.load_library() is None else None


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it."""
    return bool(re.search("bf16|amx", f"{instruction_set()} {_cpuinfo('flags|Features')}"))


def output(*command: str) -> str | None:
    """Standard output of a program, None if there is none."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def stem(device: torch.device, kind: str) -> str:
    """Name of a result file, with the name of the GPU before it."""
    gpu = f"{torch.cuda.get_device_name(device)} " if device.type == "cuda" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{gpu}{kind}".lower())


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    files.write_bytes(path, text.encode())


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(names: str) -> str:
    """A field of Linux's description of the first processor, empty without one."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^(?:{names})\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
