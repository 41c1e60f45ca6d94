"""Convolutional networks window by window: the same result as at once, in the memory of a window.

Windows are parts of the grid of the smallest map; larger maps have `scale` pixels per position
along each axis. A window is computed with a halo, the positions around it that the network reads.
Neighbours compute these again, so every result equals the result of the whole map. At the sides of
a map a window ends with the map, and is padded like the map.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsr_fast.model.convolution import channels_last_on_cpu
from ttsr_fast.model.lte import LTE
from ttsr_fast.model.main_net import MainNet

SCALE = 4


class Window(NamedTuple):
    """Rows and columns of a grid, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def grown(self, halo: int, grid: tuple[int, int]) -> "Window":
        """This window with `halo` positions around it, within the grid."""
        return Window(
            max(0, self.top - halo),
            min(grid[0], self.bottom + halo),
            max(0, self.left - halo),
            min(grid[1], self.right + halo),
        )

    def within(self, other: "Window") -> "Window":
        """This window in the coordinates of `other`, which contains it."""
        return Window(
            self.top - other.top,
            self.bottom - other.top,
            self.left - other.left,
            self.right - other.left,
        )

    def of(self, x: Tensor, scale: int) -> Tensor:
        """This part of a map with `scale` pixels per position."""
        rows = slice(scale * self.top, scale * self.bottom)
        return x[..., rows, scale * self.left : scale * self.right]


Source = Callable[[Window], Tensor]


def windows(grid: tuple[int, int], tile: int) -> Iterator[Window]:
    """Windows of at most `tile` positions along each axis, of nearly equal sizes."""
    rows, columns = (_ends(size, tile) for size in grid)
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            yield Window(top, bottom, left, right)


def _ends(size: int, tile: int) -> list[int]:
    count = -(-size // tile)
    return [part * size // count for part in range(count + 1)]


def part_of(x: Tensor, scale: int) -> Source:
    """A map as a source of windows."""
    return lambda window: window.of(x, scale)


class Tiling(NamedTuple):
    """Windows of a network.

    Attributes:
        grid: positions of the map.
        tile: positions along each axis of a window, without its halo.
        halo: positions around each one that the network reads, at most.
    """

    grid: tuple[int, int]
    tile: int
    halo: int


def run_in_tiles(
    network: Callable[..., Sequence[Tensor]],
    sources: Sequence[Source],
    outs: Sequence[tuple[Tensor, int]],
    tiling: Tiling,
    *,
    device: torch.device,
    step: Callable[[], None] | None = None,
) -> None:
    """Fill maps with the results of a network.

    Args:
        network: takes a window of every source and returns as many maps as `outs` has, or more.
        sources: return the inputs of a window.
        outs: maps to fill, on any device, with their scales.
        tiling: windows of the maps.
        device: device of the network.
        step: called after every window.
    """
    for window in windows(tiling.grid, tiling.tile):
        outer = window.grown(tiling.halo, tiling.grid)
        results = network(*(channels_last_on_cpu(source(outer).to(device)) for source in sources))
        for (out, scale), result in zip(outs, results, strict=False):
            window.of(out, scale).copy_(window.within(outer).of(result, scale))
        if step is not None:
            step()


# --- TTSR's networks ---


class Stage(NamedTuple):
    """A part of the model between maps that are small enough to be kept whole.

    Attributes:
        name: for plans and tables.
        halo: positions around a window that change its results, at most.
        floats: numbers in memory per position of a window, halo included.
    """

    name: str
    halo: int
    floats: int


LTE_STAGE = Stage("LTE", 3, 7 * 16 * 64)


def lte_in_tiles(
    lte: LTE,
    image: Tensor,  # [N, 3, H, W] in [0, 1], H and W multiples of 4
    levels: Sequence[int],
    *,
    tile: int,
    store: torch.device,
    dtype: torch.dtype | None = None,
    step: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Levels 1, 2 or 3 of `lte(image, dtype=dtype)`, computed where `lte` is, kept on `store`."""
    weight = next(lte.parameters())
    grid = (image.shape[2] // SCALE, image.shape[3] // SCALE)
    shapes = [(len(image), 64 << (lv - 1), *(n << (3 - lv) for n in grid)) for lv in levels]
    outs = [empty_map(shape, dtype or weight.dtype, store) for shape in shapes]

    def network(part: Tensor) -> list[Tensor]:
        maps = lte(part, dtype=dtype)
        return [maps[level - 1] for level in levels]

    run_in_tiles(
        network,
        [part_of(image, SCALE)],
        [(out, 1 << (3 - level)) for out, level in zip(outs, levels, strict=True)],
        Tiling(grid, tile, LTE_STAGE.halo),
        device=weight.device,
        step=step,
    )
    return outs


def main_net_stages(net: MainNet) -> list[Stage]:
    """Stages of `main_net_in_tiles`, in their order.

    Halos: a 3x3 convolution reads one pixel, with `scale` pixels in a position; a bicubic upscaling
    reads two pixels of its input.
    """
    n0, n1, n2, n3 = (len(blocks) for blocks in (net.SFE.RBs, net.RB11, net.RB21, net.RB31))
    n = net.SFE.conv_head.out_channels
    return [
        Stage("SFE", 2 * n0 + 2, 7 * n),
        Stage("attend1", 2 * n1 + 2, 6 * n + 3 * 256),
        Stage("attend2", 2 * n2 + 5, 4 * (8 * n + 3 * 128)),
        Stage("integrate", 4, 16 * (7 * n + 3 * 64)),
        Stage("refine", 2 * n3 + 1, 4 * 7 * n),
        Stage("merge", 3 + (n3 + 1) // 2, 16 * (11 * n + 64)),
    ]


def main_net_in_tiles(
    net: MainNet,
    lr: Tensor,  # [N, 3, H, W]
    S: Tensor,  # [N, 1, H, W]
    textures: Callable[[int, Window], Tensor],
    *,
    tiles: Mapping[str, int],
    store: torch.device,
    step: Callable[[], None] | None = None,
) -> Tensor:  # [N, 3, 4*H, 4*W]
    """`net(lr, S, T_lv3, T_lv2, T_lv1)`, computed where `net` is, kept on `store`.

    Maps have the type of `lr`, the result has the type of the weights.

    Maps at 1x and 2x are kept whole. Maps at 4x exist in windows only, and their inputs are
    computed twice: once for the other scales, and once for the image.

    Args:
        textures: returns a window of T_lv3 (level 3), T_lv2 or T_lv1.
        tiles: for every stage of `main_net_stages` positions along each axis of a window.
    """
    weight = net.SFE.conv_head.weight
    batch, n, grid = len(lr), len(weight), (lr.shape[2], lr.shape[3])
    stages = {stage.name: stage for stage in main_net_stages(net)}

    def empty(name: str, scale: int) -> Tensor:
        channels, dtype = (3, weight.dtype) if name == "merge" else (n, lr.dtype)
        shape = (batch, channels, *(scale * size for size in grid))
        return empty_map(shape, dtype, store)

    def run(name: str, network: Callable[..., Any], sources: Sequence[Source], *scales: int):
        outs = [(empty(name, scale), scale) for scale in scales]
        tiling = Tiling(grid, tiles[name], stages[name].halo)
        run_in_tiles(network, sources, outs, tiling, device=weight.device, step=step)
        return [out for out, _ in outs]

    def integrate(x1: Tensor, x2: Tensor, score: Tensor, t_lv1: Tensor) -> tuple[Tensor, Tensor]:
        return net.ex123.integrate_lower(x1, x2, net.attend4(x2, score, t_lv1))

    def merge(x1, x2, score, t_lv1, refined1, refined2) -> tuple[Tensor]:
        x4 = net.attend4(x2, score, t_lv1)
        return (net.merge(refined1, refined2, x4, net.ex123.integrate4(x1, x2, x4)),)

    score = part_of(S, 1)
    t_lv1, t_lv2, t_lv3 = (partial(textures, level) for level in (1, 2, 3))
    (x,) = run("SFE", lambda x: (net.SFE(x),), [part_of(lr, 1)], 1)
    (x1,) = run("attend1", lambda *x: (net.attend1(*x),), [part_of(x, 1), score, t_lv3], 1)
    x1, x2 = run("attend2", net.attend2, [part_of(x1, 1), score, t_lv2], 1, 2)
    before = [part_of(x1, 1), part_of(x2, 2)]
    out1, out2 = run("integrate", integrate, [*before, score, t_lv1], 1, 2)
    lower = [*before, part_of(out1, 1), part_of(out2, 2)]
    x1, x2 = run("refine", net.refine, lower, 1, 2)
    after = [part_of(x1, 1), part_of(x2, 2)]
    return run("merge", merge, [*before, score, t_lv1, *after], 4)[0]


def empty_map(shape: tuple[int, ...], dtype: torch.dtype, store: torch.device) -> Tensor:
    """An empty map with the memory layout of LTE's maps."""
    layout = torch.channels_last if store.type == "cpu" else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=store, memory_format=layout)
