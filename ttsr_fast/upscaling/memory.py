"""Memory of this process and of the machine, and sizes in words."""

import ctypes
import os
import re
from pathlib import Path

import torch

_CONTAINER = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_UNLIMITED = 2**62
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc, see mallopt(3)


def keep_freed_memory() -> None:
    """Let this process use memory again that it has freed, in blocks of up to a gigabyte.

    glibc returns blocks of more than 32 MiB at once, and the system clears each new one: a sixth of
    the time of a network with maps of that size. The peak can rise by a quarter, so this is for a
    program that may take all free memory. With another C library nothing changes.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def taken_bytes(device: torch.device) -> int:
    """Memory of this process on a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not report it."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_bytes(device: torch.device) -> int:
    """Memory for new allocations, within the limits of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        if not hasattr(os, "sysconf"):  # Windows
            return _UNLIMITED
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return min(int(available) * 1024, _container_bytes())


def _container_bytes() -> int:
    """Memory left in a control group of version 2."""
    try:
        limit = (_CONTAINER / "memory.max").read_text().strip()
        used = int((_CONTAINER / "memory.current").read_text())
    except (OSError, ValueError):
        return _UNLIMITED
    return _UNLIMITED if limit == "max" else max(0, int(limit) - used)


def parse_bytes(text: str) -> int:
    """`4GiB`, `4G`, `512M` or plain bytes; units are powers of 1024.

    Raises:
        ValueError: another text, or zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"a size in bytes is expected, such as 4GiB or 512M, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def gibibytes(count: int) -> str:
    """A size in GiB, or in MiB below a tenth of one."""
    return f"{count / 2**30:.2f} GiB" if count > 2**30 // 10 else f"{count / 2**20:.0f} MiB"
