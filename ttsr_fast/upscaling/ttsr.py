"""TTSR on pictures of any size: references prepared once, searched at once, networks in windows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ttsr_fast.model import TTSR
from ttsr_fast.model.windowed import Window, lte_in_tiles, main_net_in_tiles, windows
from ttsr_fast.references import ReferenceMatch, gather_fold_references, search_references
from ttsr_fast.upscaling.finite import check_finite
from ttsr_fast.upscaling.plan import Plan

# Called with a stage, the windows of it that are done, and all of them.
Progress = Callable[[str, int, int], None]


class ReferenceFeatures(NamedTuple):
    """What the model needs of a reference, whatever it is to help with.

    Attributes:
        key: `[1, C, HK, WK]`, what is searched: level 3 of the blurred reference.
        values: levels 1, 2 and 3 of the reference: `[1, C, 4*HK, 4*WK]`, `[1, C, 2*HK, 2*WK]` and
            `[1, C, HK, WK]`.
    """

    key: Tensor
    values: tuple[Tensor, ...]


@torch.no_grad()
def reference_features(
    model: TTSR,
    ref: Tensor,  # [1, 3, HR, WR]
    refsr: Tensor,  # [1, 3, HR, WR]
    plan: Plan,
    amp: torch.dtype | None = None,
    progress: Progress | None = None,
) -> ReferenceFeatures:
    """Features of a reference in [-1, 1], whose sides are multiples of 4, kept on `plan.store`.

    Textures are made and kept in the type `amp`, where it is given, and what is searched is not.

    Raises:
        ValueError: the features hold NaN or infinity, as `check_finite` explains.
    """
    stage = "references"
    (key,) = _features(model, refsr, [3], plan, plan.store, stage, progress)
    with _mixed(model, amp):
        values = _features(model, ref, [1, 2, 3], plan, plan.store, stage, progress, amp)
    check_finite("the features of the reference hold", key, *values, model=model, amp=amp)
    return ReferenceFeatures(key, tuple(values))


@torch.no_grad()
def super_resolve(
    model: TTSR,
    lr: Tensor,  # [1, 3, H, W]
    lrsr: Tensor,  # [1, 3, 4*H, 4*W]
    references: Sequence[ReferenceFeatures],
    plan: Plan,
    *,
    precision: str | None = None,
    backend: str | None = None,
    amp: torch.dtype | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, ReferenceMatch]:  # [1, 3, 4*H, 4*W]
    """The picture in [-1, 1], kept on `plan.store`, and where each of its details comes from.

    What `TTSR.forward` computes, with the best of several references.

    Raises:
        ValueError: the image or its scores hold NaN or infinity, as `check_finite` explains.
    """
    device = model.device
    (query,) = _features(model, lrsr, [3], plan, device, "features", progress)
    columns = max(features.key.shape[3] for features in references)
    match = search_references(
        query,
        [features.key for features in references],
        band=None if plan.band is None else max(1, plan.band // columns),
        precision=precision,
        backend=backend,
    )
    del query
    if progress is not None:
        progress("search", 1, 1)
    score = match.score.unsqueeze(1).to(lr.dtype)
    kept = ReferenceMatch(*(x.to(plan.store) for x in match))
    textures = partial(_textures, references, kept, backend)
    grid = (lr.shape[2], lr.shape[3])
    step = _counter("MainNet", 1 if plan.whole else _count(plan, grid), progress)
    with _mixed(model, amp):
        if plan.whole:
            whole = Window(0, grid[0], 0, grid[1])
            maps = (textures(level, whole).to(device) for level in (3, 2, 1))
            sr = model.MainNet(lr.to(device), score, *maps)
            step()
        else:
            sr = main_net_in_tiles(
                model.MainNet,
                lr,
                score,
                textures,
                tiles=plan.tiles,
                store=plan.store,
                step=step,
            )
    check_finite("the result holds", sr, match.score, model=model, amp=amp)
    return sr, match


def _mixed(model: TTSR, amp: torch.dtype | None) -> torch.autocast:
    """Convolutions in the type `amp`, if there is one."""
    device = model.device.type
    return torch.autocast(device, amp, enabled=amp is not None)


def _features(
    model: TTSR,
    image: Tensor,
    levels: Sequence[int],
    plan: Plan,
    store: torch.device,
    stage: str,
    progress: Progress | None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    grid = (image.shape[2] // 4, image.shape[3] // 4)
    tile = plan.tiles["LTE"]
    step = _counter(stage, sum(1 for _ in windows(grid, tile)), progress)
    pixels = (image + 1) / 2
    return lte_in_tiles(model.LTE, pixels, levels, tile=tile, store=store, dtype=dtype, step=step)


def _textures(
    references: Sequence[ReferenceFeatures],
    match: ReferenceMatch,
    backend: str | None,
    level: int,
    window: Window,
) -> Tensor:
    """A window of a level; at its sides overlap the patches of its neighbours."""
    scale = 1 << (3 - level)
    around = window.grown(1, (match.index.shape[1], match.index.shape[2]))
    index, reference = (around.of(x, 1) for x in (match.index, match.reference))
    values = [features.values[level - 1] for features in references]
    out = gather_fold_references(values, index, reference, stride=scale, backend=backend)
    return window.within(around).of(out, scale)


def _count(plan: Plan, grid: tuple[int, int]) -> int:
    names = [name for name in plan.tiles if name != "LTE"]
    return sum(1 for name in names for _ in windows(grid, plan.tiles[name]))


def _counter(stage: str, total: int, progress: Progress | None) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(stage, done, total)

    return step
