"""Method "ttsr" on images of any size: features of references, one search, networks in windows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ttsr_fast.model import TTSR
from ttsr_fast.model.windowed import Window, lte_in_tiles, main_net_in_tiles, windows
from ttsr_fast.references import ReferenceMatch, gather_fold_references, search_references
from ttsr_fast.upscaling.execution import Execution, Progress
from ttsr_fast.upscaling.finite import check_finite
from ttsr_fast.upscaling.plan import Plan


class ReferenceFeatures(NamedTuple):
    """Features of a reference, independent of the images that it helps.

    Attributes:
        key: `[1, C, HK, WK]`, level 3 of the blurred reference, which is searched.
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
    execution: Execution,
) -> ReferenceFeatures:
    """Features of a reference in [-1, 1] with sides that are multiples of 4, on `plan.store`.

    Textures are computed and stored in the type `execution.amp`, where it is given; the key is not.

    Raises:
        ValueError: the features hold NaN or infinity, as `check_finite` explains.
    """
    stage, exact = "references", execution._replace(amp=None)
    (key,) = _features(model, refsr, [3], plan, plan.store, stage, exact)
    values = _features(model, ref, [1, 2, 3], plan, plan.store, stage, execution)
    what = "the features of the reference hold"
    check_finite(what, key, *values, model=model, amp=execution.amp)
    return ReferenceFeatures(key, tuple(values))


@torch.no_grad()
def super_resolve(
    model: TTSR,
    lr: Tensor,  # [1, 3, H, W]
    lrsr: Tensor,  # [1, 3, 4*H, 4*W]
    references: Sequence[ReferenceFeatures],
    plan: Plan,
    execution: Execution,
) -> tuple[Tensor, ReferenceMatch]:  # [1, 3, 4*H, 4*W]
    """The image in [-1, 1] on `plan.store`, and the origin of each of its patches.

    The result equals `TTSR.forward`, with the best of several references.

    Raises:
        ValueError: the image or its scores hold NaN or infinity, as `check_finite` explains.
    """
    device, amp, progress = model.device, execution.amp, execution.progress
    backend = execution.backend or model.SearchTransfer.backend
    exact = execution._replace(amp=None)
    (query,) = _features(model, lrsr, [3], plan, device, "features", exact)
    columns = max(features.key.shape[3] for features in references)
    match = search_references(
        query,
        [features.key for features in references],
        band=None if plan.band is None else max(1, plan.band // columns),
        precision=execution.precision or model.SearchTransfer.precision,
        backend=backend,
    )
    del query
    if progress is not None:
        progress("search", 1, 1)
    lr = lr.to(amp or lr.dtype)
    score = match.score.unsqueeze(1).to(lr.dtype)
    kept = ReferenceMatch(*(x.to(plan.store) for x in match))
    textures = partial(_textures, references, kept, backend)
    grid = (lr.shape[2], lr.shape[3])
    tiles = {name: side for name, side in plan.tiles.items() if name != "LTE"}
    step = _counter("MainNet", grid, [max(grid)] if plan.whole else tiles.values(), progress)
    if plan.whole:
        whole = Window(0, grid[0], 0, grid[1])
        maps = (textures(level, whole).to(device) for level in (3, 2, 1))
        sr = model.MainNet(lr.to(device), score, *maps)
        step()
    else:
        sr = main_net_in_tiles(
            model.MainNet, lr, score, textures, tiles=tiles, store=plan.store, step=step
        )
    check_finite("the result holds", sr, match.score, model=model, amp=amp)
    return sr, match


def _features(
    model: TTSR,
    image: Tensor,  # [1, 3, 4*H, 4*W] in [-1, 1]
    levels: Sequence[int],
    plan: Plan,
    store: torch.device,
    stage: str,
    execution: Execution,
) -> list[Tensor]:
    """Levels of LTE on `store`, in the type of its convolutions."""
    tile, grid = plan.tiles["LTE"], (image.shape[2] // 4, image.shape[3] // 4)
    step = _counter(stage, grid, [tile], execution.progress)
    pixels, dtype = (image + 1) / 2, execution.amp
    return lte_in_tiles(model.LTE, pixels, levels, tile=tile, store=store, dtype=dtype, step=step)


def _textures(
    references: Sequence[ReferenceFeatures],
    match: ReferenceMatch,
    backend: str | None,
    level: int,
    window: Window,
) -> Tensor:
    """A window of a level; patches of neighbouring windows overlap its sides."""
    scale = 1 << (3 - level)
    around = window.grown(1, (match.index.shape[1], match.index.shape[2]))
    index, reference = (around.of(x, 1) for x in (match.index, match.reference))
    values = [features.values[level - 1] for features in references]
    out = gather_fold_references(values, index, reference, stride=scale, backend=backend)
    return window.within(around).of(out, scale)


def _counter(
    stage: str, grid: tuple[int, int], tiles: Iterable[int], progress: Progress | None
) -> Callable[[], None]:
    """A step for every window of a stage."""
    total = sum(1 for tile in tiles for _ in windows(grid, tile))
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(stage, done, total)

    return step
