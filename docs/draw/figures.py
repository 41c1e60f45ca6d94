"""The diagrams of the user guide, drawn from results of this package.

    python docs/draw/figures.py

Writes a PNG for each into `--out`; the gaps, which need a search in float64,
take a minute.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow
from torch import Tensor

from ttsr_fast.images import SCALE, Image, from_tensor, upscale_bicubic
from ttsr_fast.upscaling import upscale
from ttsr_fast.upscaling.detail import reference_pair

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import figure_data
import plots
from demo import make_pair

BLUE, ORANGE = plots.BLUE, plots.RED
COLOURS = (BLUE, ORANGE, plots.GREEN, plots.PINK, plots.ORANGE, plots.SKY)
SPOTS = ((32, 21), (58, 46), (76, 112), (84, 24), (76, 149), (107, 103))  # row, column of the lr
SIDE, DPI = 8.6, 140  # inches and dots: 1204 pixels
DETAIL_PART = np.s_[140:420, 280:650]  # rows and columns of the result
CLOSE_UP = 12  # pixels of the lr along a side


def draw_diagonals(path: Path) -> None:
    """M, its sums along the diagonals, and the cosines that are compared."""
    found, (row, column) = figure_data.products(), (4, 3)
    figure, axes = plots.pyplot().subplots(1, 3, figsize=(SIDE, 3.9))
    figure.subplots_adjust(0.06, 0.18, 0.99, 0.93, wspace=0.12)
    terms = [f"{found.pixels[row + d, column + d]:.0f}" for d in (-1, 0, 1)]
    panels = (
        (found.pixels, "{:.0f}", "M: pixel times pixel"),
        (found.patches, "{:.0f}", "P: patch times patch"),
        (found.cosines, "{:.2f}", "cosines: P over both norms"),
    )
    for axis, (x, form, title) in zip(axes, panels, strict=True):
        _numbers(axis, x, form)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("query position j", color=plots.EDGE)
    axes[0].set_ylabel("key position i", color=plots.EDGE)
    for d in (-1, 0, 1):
        _frame(axes[0], row + d, column + d, ORANGE)
    _frame(axes[1], row, column, ORANGE)
    for j, i in enumerate(found.index.tolist()):
        _frame(axes[2], i, j, BLUE)
    words = (
        ("three terms on a diagonal ...", ORANGE),
        (f"... add up: {' + '.join(terms)} = {found.patches[row, column]:.0f}", ORANGE),
        ("the best key of every query", BLUE),
    )
    for axis, (text, colour) in zip(axes, words, strict=True):
        axis.text(0, -0.18, text, transform=axis.transAxes, color=colour, fontsize=10, va="top")
    plots.save(figure, path, dpi=DPI)


def draw_walk(path: Path) -> None:
    """Three pairs of rows, the term of each, and the sum."""
    found = figure_data.walk()
    figure = plots.pyplot().figure(figsize=(SIDE, 3.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 3.6))
    strips, panels = upper.subplots(1, 2), lower.subplots(1, 4)
    for axis, name, image in zip(strips, ("query", "key"), found[:2], strict=True):
        axis.imshow(from_tensor(image, np.empty((0, 0, 3), np.uint8)), interpolation="nearest")
        for d, colour in enumerate(COLOURS[:3]):
            axis.text(-1, d, str(d + 1), color=colour, fontsize=9, ha="center", va="center")
            box = plots.pyplot().Rectangle((-0.5, d - 0.4), 48, 0.8, fill=False, edgecolor=colour)
            axis.add_patch(box)
        axis.set_title(f"three rows of the {name}", loc="left", fontsize=11)
    top = float(found.patches.max())
    for axis, x, title, colour in zip(
        panels,
        (*found.steps, found.patches),
        ("row 1 times row 1", "+ row 2 times row 2", "+ row 3 times row 3", "= patch times patch"),
        (*COLOURS[:3], "black"),
        strict=True,
    ):
        axis.imshow(x.numpy(), cmap="PuOr_r", vmin=-top, vmax=top)
        axis.set_title(title, loc="left", fontsize=11, color=colour)
        axis.set_xlabel("column of the key", color=plots.EDGE)
    panels[0].set_ylabel("column of the query", color=plots.EDGE)
    for axis in (*strips, *panels):
        _bare(axis)
    plots.save(figure, path, dpi=DPI)


def draw_matches(path: Path) -> None:
    """A stereo pair, where some of its patches were found, and both close up."""
    lr, ref, _ = make_pair()
    result = upscale(lr, ref, phases=4)
    figure = plots.pyplot().figure(figsize=(SIDE, 4.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(3.3, 1))
    left, right = upper.subplots(1, 2)
    close = lower.subplots(1, 2 * len(SPOTS))
    for axis, image, title in ((left, lr, "to upscale"), (right, ref, "reference")):
        axis.imshow(image.pixels, interpolation="nearest")
        axis.set_title(f"{title}, {image.size[1]} x {image.size[0]}", loc="left", fontsize=11)
        _bare(axis)
    for n, ((y, x), colour) in enumerate(zip(SPOTS, COLOURS, strict=True)):
        y_r, x_r = divmod(int(result.index[y, x]), ref.size[1])
        panels = (
            (left, close[2 * n], lr, y, x, 1),
            (right, close[2 * n + 1], ref, y_r, x_r, SCALE),
        )
        for axis, detail, image, row, column, scale in panels:
            side = CLOSE_UP * scale
            top, edge = _corner(row, column, side, image)
            _frame(axis, top + side / 2, edge + side / 2, colour, side)
            detail.imshow(image.pixels[top : top + side, edge : edge + side])
            detail.spines[:].set(visible=True, color=colour, linewidth=2)
            _bare(detail, framed=True)
        close[2 * n].set_title(
            f"cosine {result.score[y, x]:.3f}", loc="left", fontsize=9, color=colour
        )
    _save_photograph(figure, path)


def draw_detail(path: Path) -> None:
    """The steps of method "detail" on a part of the stereo pair."""
    lr, ref, _ = make_pair()
    result = upscale(lr, ref)
    bicubic = upscale_bicubic(lr.pixels)
    sharp, blurred = reference_pair(ref, (0, 0), torch.device("cpu"))
    panels: list[tuple[str, Any]] = [
        ("lrsr: bicubic", bicubic),
        ("reference", ref.pixels),
        ("missing: reference - refsr", _difference(sharp - blurred)),
        ("score, 0.85 to 1", result.score.numpy().repeat(SCALE, 0).repeat(SCALE, 1)),
        (
            "added: result - lrsr",
            _difference(result.image.to_tensor() - Image(bicubic).to_tensor()),
        ),
        ("result", result.image.pixels),
    ]
    figure, axes = plots.pyplot().subplots(2, 3, figsize=(SIDE, 4.7), layout="constrained")
    for axis, (title, pixels) in zip(axes.flat, panels, strict=True):
        axis.imshow(pixels[DETAIL_PART], interpolation="nearest", vmin=0.85, vmax=1)
        axis.set_title(title, loc="left", fontsize=11)
        _bare(axis)
    _save_photograph(figure, path)


def draw_blocks(path: Path) -> None:
    """The nine patches over one output block, and the blocks of the value that they bring."""
    found = figure_data.blocks()
    figure, (left, right) = plots.pyplot().subplots(
        1, 2, figsize=(SIDE, 3.6), layout="constrained", width_ratios=(6, 8)
    )
    common = max(found.read, key=found.read.count)
    readers: dict[tuple[int, int], list[str]] = {}
    for n, place in enumerate(found.read):
        row, column = divmod(n, 3)
        colour = BLUE if place == common else ORANGE
        _cell(left, found.at[0] + row - 1, found.at[1] + column - 1, str(n + 1), colour)
        readers.setdefault(place, []).append(str(n + 1))
    for place, names in readers.items():
        rows = [" ".join(names[n : n + 3]) for n in range(0, len(names), 3)]
        _cell(right, *place, "\n".join(rows), BLUE if place == common else ORANGE)
    for axis, size, title in (
        (left, found.grid, "query grid: nine patches meet"),
        (right, found.key_grid, "value: the blocks they bring"),
    ):
        _lines(axis, size)
        axis.set(xlim=(-0.5, size[1] - 0.5), ylim=(size[0] - 0.5, -0.5), aspect="equal")
        axis.set_title(title, loc="left", fontsize=11)
        _bare(axis)
    _frame(left, *found.at, "black")
    plots.save(figure, path, dpi=DPI)


def draw_overlap(path: Path) -> None:
    """A value of ones, by divisor."""
    titles = {
        "none": '"none": how many patches meet',
        "area": '"area": that by nine, as in TTSR',
        "overlap": '"overlap": that by itself',
    }
    figure, axes = plots.pyplot().subplots(1, 3, figsize=(SIDE, 2.4), layout="constrained")
    for axis, (name, x) in zip(axes, figure_data.overlaps().items(), strict=True):
        _numbers(axis, x, "{:.2g}")
        axis.set_title(titles[name], loc="left", fontsize=11)
        axis.set(xticks=[], yticks=[])
    plots.save(figure, path, dpi=DPI)


def draw_gaps(path: Path) -> None:
    """Queries by their lead, and the changes by rounding."""
    found = figure_data.gaps()
    figure, axis = plots.pyplot().subplots(figsize=(SIDE, 3.9), layout="constrained")
    leads = found.lead.clamp(min=1e-9).sort().values.numpy()
    share = np.arange(1, len(leads) + 1) / len(leads) * 100
    axis.plot(leads, share, color="black", linewidth=1.8)
    for n, (name, moved) in enumerate(found.moved.items()):
        colour = COLOURS[n]
        axis.axvline(moved, color=colour, linestyle="--", linewidth=1.2)
        axis.annotate(
            f"{name}\n± {moved:.1e}\n{found.same[name]:.2%} same".replace("e-0", "e-"),
            (moved, 0.7 if n == 1 else 0.98),  # the first two lines are close to each other
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axis.set(xscale="log", yscale="log", xlim=(1e-8, 0.3), ylim=(share[0], 100))
    axis.set_xlabel("lead of the best key over the second best (cosine)")
    axis.set_title("% of the queries with a smaller lead", loc="left", fontsize=11)
    plots.save(figure, path, dpi=DPI)


FIGURES = {
    "diagonals": draw_diagonals,
    "walk": draw_walk,
    "matches": draw_matches,
    "detail": draw_detail,
    "blocks": draw_blocks,
    "overlap": draw_overlap,
    "gaps": draw_gaps,
}


# --- parts of figures ---


def _numbers(axis: Any, x: Tensor, form: str) -> None:
    """A grid of numbers, the larger the bluer, light enough to read them."""
    axis.imshow((x / x.max() * 0.45).numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(x.tolist()):
        for j, number in enumerate(row):
            axis.text(j, i, form.format(number), ha="center", va="center", fontsize=9)
    _lines(axis, x.shape)
    axis.set(xticks=range(x.shape[1]), yticks=range(x.shape[0]))
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)


def _lines(axis: Any, size: tuple[int, ...]) -> None:
    axis.grid(visible=False)
    for place in np.arange(-0.5, size[0]):
        axis.axhline(place, color="#cccccc", linewidth=0.8)
    for place in np.arange(-0.5, size[1]):
        axis.axvline(place, color="#cccccc", linewidth=0.8)


def _frame(axis: Any, row: float, column: float, colour: str, side: float = 1) -> None:
    """The outline of a square around a place."""
    corner = (column - side / 2, row - side / 2)
    style = {"fill": False, "edgecolor": colour, "linewidth": 2.2, "zorder": 3}
    axis.add_patch(plots.pyplot().Rectangle(corner, side, side, **style))


def _cell(axis: Any, row: int, column: int, text: str, colour: str) -> None:
    square = plots.pyplot().Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.2)
    axis.add_patch(square)
    axis.text(column, row, text, ha="center", va="center", fontsize=10)


def _corner(row: int, column: int, side: int, image: Image) -> tuple[int, int]:
    """Top and left of a square around a place, moved inside the image."""
    top, left = (
        min(max(place - side // 2, 0), size - side)
        for place, size in zip((row, column), image.size, strict=True)
    )
    return top, left


def _difference(
    x: Tensor,  # [1, 3, H, W]
) -> np.ndarray:  # [H, W, 3] uint8
    """A difference of images around mid-grey."""
    return from_tensor(x.clamp(-1, 1), np.empty((0, 0, 3), np.uint8))


def _bare(axis: Any, framed: bool = False) -> None:
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    if not framed:
        axis.spines[:].set_visible(False)


def _save_photograph(figure: Any, path: Path) -> None:
    """With 256 colours: a third of the bytes."""
    plots.save(figure, path, dpi=DPI)
    with pillow.open(path) as image:
        image.convert("RGB").quantize(256).save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    """Draw them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="NAME")
    args = parser.parse_args(argv)
    for name in args.only:
        FIGURES[name](args.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
