"""How much memory an upscaling will take, stage by stage, and in which windows it fits."""

import ctypes
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ttsr_fast.model import TTSR
from ttsr_fast.model.windowed import LTE_STAGE, SCALE, Stage, main_net_stages

SHARE = 0.8  # of the memory that is free, where no limit is given
LARGEST = 2**30  # bytes of a window: larger ones are no faster, as their memory is fresh each time
# Positions along each axis of a window. On the CPU PyTorch takes other convolutions for less than
# 20,480 numbers, which round otherwise; half of this, as the last window has, and its halo is more.
LEAST_TILE = 32
BAND = 2**14  # key positions that are searched at a time where memory is short

_CONTAINER = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_FEATURES = (256, 64 * 16 + 128 * 4 + 256)  # numbers per position: of a key, and of three levels
_PICTURE = 3 * SCALE**2  # numbers per position of a picture
_PICTURES = 5  # that are there at a time for each size: pixels, floats, enlarged and reduced ones
_DETAIL, _DETAIL_REF = 12, 8  # the same for "detail", which has features of two kinds, and textures
_KEPT = 64 * (4 + 3 * 4)  # numbers per position that stay between the stages of MainNet
_COPIES = 3  # halves: a search copies its inputs once, or one and a half times on a GPU
_GROWTH = 7 * 2**26  # bytes that a process on the CPU takes for itself with its first image
_WORKSPACE = 16 * 2**20  # bytes of a thread of the search
_GPU_WORKSPACE = 64 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc, see mallopt(3)

Size = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is kept where, and the windows of every stage.

    Attributes:
        limit: bytes that may be taken on the device.
        store: where features, textures and maps between stages are kept.
        band: key positions that are searched at a time; None for whole references.
        tiles: for LTE and every stage of MainNet, positions (4x4 pixels of the result) along each
            axis of a window; whole if it is the grid or more.
        whole: whether all of MainNet runs at once.
        stages: name and bytes at the peak of each, in their order.
    """

    limit: int
    store: torch.device
    band: int | None
    tiles: dict[str, int]
    whole: bool
    stages: list[tuple[str, int]]

    @property
    def peak(self) -> int:
        """Bytes of the stage that takes most."""
        return max(size for _, size in self.stages)


class NotEnoughMemory(ValueError):
    """What is needed does not fit.

    Attributes:
        needed: bytes on top of what is taken.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def keep_freed_memory() -> None:
    """Let this process use memory again that it has freed, in blocks of up to a gigabyte.

    glibc gives blocks of more than 32 MiB back at once, and the system clears each new one: a sixth
    of the time of a network whose maps are that large. Its peak can rise by a quarter, so this is
    for a program that may take what is free. Where the C library is another one nothing changes.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    mallopt = getattr(library, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**30)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def plan_ttsr(
    model: TTSR,
    lr: Size,
    refs: Sequence[Size],
    *,
    max_memory: int | None = None,
    tile: int | None = None,
    made: bool = False,
) -> Plan:
    """A plan for method "ttsr" on the device of `model`.

    Args:
        model: whose device, type and widths count.
        lr: height and width of the picture.
        refs: those of every reference.
        max_memory: bytes that the process may take in all on the CPU, or this process on a GPU;
            None for four fifths of what is free.
        tile: positions along each axis of every window; None for what fits.
        made: whether the features of the references are in memory already.

    Raises:
        NotEnoughMemory: the smallest plan takes more than that.
        ValueError: `model` has no hard attention.
    """
    plan = _fitting_or_smallest(model, lr, refs, max_memory, tile, made)
    if plan.peak > plan.limit:
        raise _not_enough("ttsr", plan.peak, model.device, max_memory)
    return plan


def _fitting_or_smallest(
    model: TTSR,
    lr: Size,
    refs: Sequence[Size],
    max_memory: int | None,
    tile: int | None,
    made: bool,
) -> Plan:
    if not model.hard_attention:
        raise ValueError(
            "model must have hard attention to be helped by references; "
            "without it, model(lr) enlarges a picture"
        )
    device = model.device
    limit = room(device, max_memory)
    plan = _plan_on(model, lr, refs, limit, device, tile, made)
    if plan.peak > limit and device.type != "cpu":
        plan = _plan_on(model, lr, refs, limit, torch.device("cpu"), tile, made)
    return plan


def _not_enough(
    method: str, needed: int, device: torch.device, max_memory: int | None
) -> NotEnoughMemory:
    """An error that says how much memory is enough, also for later images."""
    if max_memory is None:
        free = gibibytes(room(device, None))
        message = f"method {method!r} needs {gibibytes(needed)} at these sizes, {free} may be used"
    else:
        enough = math.ceil(10 * (needed + taken_bytes(device) + _GROWTH) / 2**30) / 10
        message = (
            f"max_memory {gibibytes(max_memory)} is too little for method {method!r} at these "
            f"sizes: {enough:.1f}GiB is enough"
        )
    return NotEnoughMemory(message, needed)


def _plan_on(
    model: TTSR,
    lr: Size,
    refs: Sequence[Size],
    limit: int,
    store: torch.device,
    tile: int | None,
    made: bool,
) -> Plan:
    """With maps kept on `store`: what fits, or else the smallest plan there is."""
    device, item = model.device, model.dtype.itemsize
    queries = lr[0] * lr[1]
    grids = [(height // SCALE, width // SCALE) for height, width in refs]
    keys = [height * width for height, width in grids]
    key, values = _FEATURES
    here = store == device
    pictures = 4 * _PICTURE * _PICTURES * (queries + max(keys)) if here else 0
    kept = item * (key + values) * sum(keys) if here and not made else 0

    workspace = _WORKSPACE * torch.get_num_threads() if device.type == "cpu" else _GPU_WORKSPACE

    def copies(band: int | None) -> int:
        """What a search makes of query and band, and a band that was kept elsewhere."""
        positions = min(max(keys), band or max(keys))
        moved = 0 if here else positions
        return item * key * (_COPIES * (positions + queries) // 2 + moved)

    bands = [None, BAND] if here else [BAND]
    before = pictures + kept
    query = item * key * queries
    fitting = (band for band in bands if before + query + copies(band) + workspace <= limit)
    band = next(fitting, bands[-1])
    search = copies(band)
    between = item * _KEPT * queries if here else 0
    grid = lr
    stages: list[tuple[str, int]] = []
    tiles: dict[str, int] = {}

    def fit(stage: Stage, grid: Size, taken: int) -> None:
        side, size = _window(stage, grid, item, min(limit - taken, LARGEST), tile)
        tiles[stage.name] = side
        stages.append((stage.name, taken + size))

    largest = max(grids, key=lambda grid: grid[0] * grid[1])
    fit(LTE_STAGE, _around(largest, grid), before + query)
    stages.append(("search", before + query + search + workspace))
    main = main_net_stages(model.MainNet)
    at_once = item * queries * (values + max(stage.floats for stage in main))
    whole = tile is None and at_once <= min(limit - before, LARGEST)
    if whole:
        stages.append(("MainNet", before + at_once))
    for stage in main:
        if whole:
            tiles[stage.name] = max(grid)
        else:
            fit(stage, grid, before + between)
    return Plan(limit, store, band, tiles, whole, stages)


def check_detail(
    lr: Size, refs: Sequence[Size], device: torch.device, max_memory: int | None
) -> None:
    """Raise NotEnoughMemory if method "detail" takes more than `max_memory`."""
    needed = _detail_bytes(lr, refs)
    if max_memory is not None and needed > room(device, max_memory):
        raise _not_enough("detail", needed, device, max_memory)


def _detail_bytes(lr: Size, refs: Sequence[Size]) -> int:
    queries = lr[0] * lr[1]
    keys = max(height * width // SCALE**2 for height, width in refs)
    return 4 * _PICTURE * (_DETAIL * queries + _DETAIL_REF * keys)


def _window(stage: Stage, grid: Size, item: int, room: int, tile: int | None) -> tuple[int, int]:
    """The largest window of a stage that fits, or the smallest there is, and what it takes."""

    def size(side: int) -> int:
        outer = [min(n, side + 2 * stage.halo) for n in grid]
        return item * stage.floats * outer[0] * outer[1]

    if tile is not None:
        return tile, size(tile)
    side = max(grid)
    while side > LEAST_TILE and size(side) > room:
        side = max(LEAST_TILE, side * 9 // 10)
    return side, size(side)


def _around(a: Size, b: Size) -> Size:
    return max(a[0], b[0]), max(a[1], b[1])


def describe(
    lr: Size,
    refs: Sequence[Size],
    *,
    model: TTSR | None = None,
    device: torch.device | None = None,
    max_memory: int | None = None,
    tile: int | None = None,
    **_: object,
) -> tuple[list[tuple[str, str]], NotEnoughMemory | None]:
    """What `upscale` would do with these options.

    Returns:
        lines of a name and a value, of the smallest plan if none fits, and the error in that case.
    """
    if model is None:
        where = device or torch.device("cpu")
        limit, peak = room(where, max_memory), _detail_bytes(lr, refs)
        lines = [("limit", _headroom(limit)), ("detail", gibibytes(peak))]
        fits = max_memory is None or peak <= limit
        return lines, None if fits else _not_enough("detail", peak, where, max_memory)
    plan = _fitting_or_smallest(model, lr, refs, max_memory, tile, made=False)
    lines = [("limit", _headroom(plan.limit))]
    lines.append(("features are kept on", str(plan.store)))
    bands = "whole references" if plan.band is None else f"bands of {plan.band} positions"
    lines.append(("searched are", bands))
    for name, size in plan.stages:
        side = plan.tiles.get(name)
        within = "" if side is None or side >= max(lr) else f", windows of {side} x {side}"
        lines.append((name, gibibytes(size) + within))
    fits = plan.peak <= plan.limit
    return lines, None if fits else _not_enough("ttsr", plan.peak, model.device, max_memory)


def _headroom(limit: int) -> str:
    """Remaining bytes, at least 0."""
    return f"{gibibytes(max(0, limit))} more than is taken now"


# --- memory ---


def room(device: torch.device, max_memory: int | None) -> int:
    """Bytes that may be taken on top of what is."""
    if max_memory is None:
        return int(SHARE * free_bytes(device))
    return max_memory - taken_bytes(device) - _growth(device)


def _growth(device: torch.device) -> int:
    """What this process is still to take for itself: code and buffers of its first image."""
    if device.type != "cpu":
        return 0
    return max(0, _RESIDENT_AT_START + _GROWTH - resident_bytes())


def taken_bytes(device: torch.device) -> int:
    """What this process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resident_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory that new allocations can have, within the limits of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    (available,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return min(int(available) * 1024, _container_bytes())


def _container_bytes() -> int:
    """What a control group leaves, of version 2."""
    try:
        limit = (_CONTAINER / "memory.max").read_text().strip()
        used = int((_CONTAINER / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
    return 2**62 if limit == "max" else max(0, int(limit) - used)


def resident_bytes() -> int:
    """What this process has in memory now; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_RESIDENT_AT_START = resident_bytes()


def parse_bytes(text: str) -> int:
    """`4GiB`, `4G`, `512M` or plain bytes; units are powers of 1024.

    Raises:
        ValueError: it is nothing of that kind.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"a size in bytes is expected, such as 4GiB or 512M, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count > 2**30 // 10 else f"{count / 2**20:.0f} MiB"
