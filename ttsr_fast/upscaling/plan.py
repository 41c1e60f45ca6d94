"""Memory plan of an upscaling: its need stage by stage, and the windows that fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ttsr_fast.model import TTSR
from ttsr_fast.model.windowed import LTE_STAGE, SCALE, Stage, main_net_stages
from ttsr_fast.upscaling.memory import free_bytes, gibibytes, resident_bytes, taken_bytes

SHARE = 0.8  # of the free memory, where no limit is given
LARGEST = 2**30  # bytes of a window: larger ones are no faster, as their memory is fresh each time
# Positions along each axis of a window. On the CPU PyTorch takes other convolutions for less than
# 20,480 numbers, which round otherwise; half of this, as the last window has, and its halo is more.
LEAST_TILE = 32
BAND = 2**14  # key positions that are searched at a time where memory is short

CPU = torch.device("cpu")
_FEATURES = (256, 64 * 16 + 128 * 4 + 256)  # numbers per position: of a key, and of three levels
_IMAGE = 3 * SCALE**2  # numbers per position of an image
_IMAGES = 5  # in memory at a time for each size: pixels, floats, upscaled and reduced ones
_DETAIL, _DETAIL_REF = 12, 8  # the same for "detail", with its two kinds of features and textures
_KEPT = 64 * (4 + 3 * 4)  # numbers per position that stay between the stages of MainNet
_COPIES = 3  # halves: a search copies its inputs once, or one and a half times on a GPU
_GROWTH = 7 * 2**26  # bytes that a process on the CPU takes for itself with its first image
_WORKSPACE = 16 * 2**20  # bytes of a thread of the search
_GPU_WORKSPACE = 64 * 2**20

_RESIDENT_AT_START = resident_bytes()

Size = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """Windows of every stage, and the place of the data between stages.

    Attributes:
        limit: bytes that may be taken on the device.
        store: device of features, textures and maps between stages.
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
        """Bytes of the largest stage."""
        return max(size for _, size in self.stages)


class NotEnoughMemory(ValueError):
    """No plan fits.

    Attributes:
        needed: bytes on top of the memory that is taken.
    """

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


def plan_upscale(
    lr: Size,
    refs: Sequence[Size],
    *,
    model: TTSR | None = None,
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    tile: int | None = None,
    cached: bool = False,
) -> Plan:
    """Plan of one upscaling.

    Args:
        lr: height and width of the image.
        refs: heights and widths of all references.
        model: for method "ttsr", planned for its device, type and widths; None for "detail".
        device: device of "detail", by default the CPU.
        max_memory: bytes that the process may take in all on the CPU, or this process on a GPU;
            None for four fifths of the free memory, which "detail" may exceed.
        tile: positions along each axis of every window; None for the largest that fit.
        cached: whether the features of the references are in memory already.

    Raises:
        NotEnoughMemory: the smallest plan exceeds that.
        ValueError: `model` has no hard attention.
    """
    plan, refusal = _fit_or_smallest(lr, refs, model, device, max_memory, tile, cached)
    if refusal is not None:
        raise refusal
    return plan


def describe(
    lr: Size,
    refs: Sequence[Size],
    *,
    model: TTSR | None = None,
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    tile: int | None = None,
    **_: object,
) -> tuple[list[tuple[str, str]], NotEnoughMemory | None]:
    """Plan of `upscale` with these options, in words.

    Returns:
        lines of a name and a value, of the smallest plan if none fits, and the error in that case.
    """
    plan, refusal = _fit_or_smallest(lr, refs, model, device, max_memory, tile, False)
    lines = [("limit", f"{gibibytes(max(0, plan.limit))} more than is taken now")]
    if model is not None:
        lines.append(("features are kept on", str(plan.store)))
        bands = "whole references" if plan.band is None else f"bands of {plan.band} positions"
        lines.append(("searched are", bands))
    for name, size in plan.stages:
        side = plan.tiles.get(name)
        within = "" if side is None or side >= max(lr) else f", windows of {side} x {side}"
        lines.append((name, gibibytes(size) + within))
    return lines, refusal


def room(device: torch.device, max_memory: int | None) -> int:
    """Bytes that may be taken on top of the memory that is taken."""
    if max_memory is None:
        return int(SHARE * free_bytes(device))
    return max_memory - taken_bytes(device) - _growth(device)


def _growth(device: torch.device) -> int:
    """Bytes that this process is still to take for itself: code and buffers of its first image."""
    if device.type != "cpu":
        return 0
    return max(0, _RESIDENT_AT_START + _GROWTH - resident_bytes())


def _fit_or_smallest(
    lr: Size,
    refs: Sequence[Size],
    model: TTSR | None,
    device: str | torch.device | None,
    max_memory: int | None,
    tile: int | None,
    cached: bool,
) -> tuple[Plan, NotEnoughMemory | None]:
    """A plan that fits; otherwise the smallest one, and the error that says so."""
    if model is None:
        device = torch.device(device or "cpu")
        limit = room(device, max_memory)
        plan = Plan(limit, CPU, None, {}, True, [("detail", _detail_bytes(lr, refs))])
        fits = max_memory is None or plan.peak <= limit
        return plan, None if fits else _not_enough("detail", plan.peak, device, max_memory)
    if not model.hard_attention:
        raise ValueError(
            "model must have hard attention to be helped by references; "
            "without it, model(lr) upscales an image"
        )
    device = model.device
    limit = room(device, max_memory)
    plan = _plan_ttsr(lr, refs, model, limit, device, tile, cached)
    if plan.peak > limit and device.type != "cpu":
        plan = _plan_ttsr(lr, refs, model, limit, CPU, tile, cached)
    fits = plan.peak <= limit
    return plan, None if fits else _not_enough("ttsr", plan.peak, device, max_memory)


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


def _plan_ttsr(
    lr: Size,
    refs: Sequence[Size],
    model: TTSR,
    limit: int,
    store: torch.device,
    tile: int | None,
    cached: bool,
) -> Plan:
    """Plan with maps kept on `store`: one that fits, or else the smallest."""
    device, item = model.device, model.dtype.itemsize
    queries = lr[0] * lr[1]
    grids = [(height // SCALE, width // SCALE) for height, width in refs]
    keys = [height * width for height, width in grids]
    key, values = _FEATURES
    here = store == device
    images = 4 * _IMAGE * _IMAGES * (queries + max(keys)) if here else 0
    features = item * (key + values) * sum(keys) if here and not cached else 0

    workspace = _WORKSPACE * torch.get_num_threads() if device.type == "cpu" else _GPU_WORKSPACE

    def copies(band: int | None) -> int:
        """Bytes of the search's copies of query and band, and of a band from another device."""
        positions = min(max(keys), band or max(keys))
        moved = 0 if here else positions
        return item * key * (_COPIES * (positions + queries) // 2 + moved)

    bands = [None, BAND] if here else [BAND]
    before = images + features
    query = item * key * queries
    fitting = (band for band in bands if before + query + copies(band) + workspace <= limit)
    band = next(fitting, bands[-1])
    between = item * _KEPT * queries if here else 0
    stages: list[tuple[str, int]] = []
    tiles: dict[str, int] = {}

    def fit(stage: Stage, grid: Size, taken: int) -> None:
        side, size = _window(stage, grid, item, min(limit - taken, LARGEST), tile)
        tiles[stage.name] = side
        stages.append((stage.name, taken + size))

    height, width = max(grids, key=math.prod)
    fit(LTE_STAGE, (max(height, lr[0]), max(width, lr[1])), before + query)
    stages.append(("search", before + query + copies(band) + workspace))
    main = main_net_stages(model.MainNet)
    at_once = item * queries * (values + max(stage.floats for stage in main))
    whole = tile is None and at_once <= min(limit - before, LARGEST)
    if whole:
        stages.append(("MainNet", before + at_once))
    for stage in main:
        if whole:
            tiles[stage.name] = max(lr)
        else:
            fit(stage, lr, before + between)
    return Plan(limit, store, band, tiles, whole, stages)


def _window(stage: Stage, grid: Size, item: int, limit: int, tile: int | None) -> tuple[int, int]:
    """Side and bytes of the largest window of a stage that fits, or of the smallest."""

    def size(side: int) -> int:
        outer = [min(n, side + 2 * stage.halo) for n in grid]
        return item * stage.floats * outer[0] * outer[1]

    if tile is not None:
        return tile, size(tile)
    side = max(grid)
    while side > LEAST_TILE and size(side) > limit:
        side = max(LEAST_TILE, side * 9 // 10)
    return side, size(side)


def _detail_bytes(lr: Size, refs: Sequence[Size]) -> int:
    queries = lr[0] * lr[1]
    keys = max(height * width // SCALE**2 for height, width in refs)
    return 4 * _IMAGE * (_DETAIL * queries + _DETAIL_REF * keys)
