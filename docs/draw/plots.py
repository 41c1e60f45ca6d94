"""The plots of the benchmarks: colour-blind safe, labelled at the lines.

    python docs/draw/plots.py bench/results/*.json

Writes `<stem>.png` for each file into `--out`. The other figures of the guide share
the style.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median, mode
from typing import Any

from ttsr_fast import files

Data = dict[str, Any]

# Okabe and Ito's palette, one colour and marker for a candidate in every plot. Candidates without a
# style are in the tables alone.
BLUE, SKY, GREEN, RED = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PINK, GREY = "#E69F00", "#CC79A7", "#777777"
STYLES = {
    "cpp-fp32": (BLUE, "o"),
    "cpp-bf16": (SKY, "s"),
    "triton-fp32": (BLUE, "o"),
    "triton-fp16x3": (BLUE, "D"),
    "triton-tf32": (SKY, "v"),
    "triton-fp16": (SKY, "s"),
    "triton-bf16": (SKY, "P"),
    "torch-fp32": (GREEN, "^"),
    "unfold": (RED, "D"),
    "unfold-tf32": (RED, "v"),
    "unfold-fp16": (RED, "s"),
    "chunked": (ORANGE, "v"),
    "compile": (ORANGE, "X"),
    "faiss": (PINK, "P"),
    "keops": (GREY, "X"),
    "cpp": (BLUE, "o"),
    "torch": (GREEN, "^"),
    "reference": (RED, "D"),
    "grid_sample": (PINK, "P"),
    "index_add": (GREY, "v"),
    "default": (BLUE, "o"),
    "default-graph": (BLUE, "D"),
    "fp16x3": (SKY, "s"),
    "fp16x3-graph": (SKY, "D"),
    "cpp-graph": (BLUE, "D"),
}
STAGES = {  # Tol's light palette, under black text
    "LTE": "#77AADD",
    "search": "#EE8866",
    "transfer": "#EEDD88",
    "MainNet": "#BBCC33",
    "backward": "#99DDFF",
    "Adam": "#DDDDDD",
}
EDGE = "#666666"
TIME = ("median_s", "Time, {}")
MEMORY = ("peak_bytes", "Memory above inputs and results, MB")
LEAST = {"median_s": 0.0, "peak_bytes": 1e5}  # drawn: less is within the error of the measurement


def draw(data: Data, path: Path) -> None:
    """The plot of a result file.

    Raises:
        ValueError: the file holds no results of a kind with a plot.
    """
    kinds = {"search": _search, "transfer": _transfer, "model": _model}
    if data.get("kind") not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {data.get('kind')!r}")
    save(kinds[data["kind"]](pyplot(), data), path)


def save(figure: Any, path: Path, dpi: int = 160) -> None:
    """Write a figure, which appears whole."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        figure.savefig(file, dpi=dpi, format="png")
    plt.close(figure)


def pyplot() -> Any:
    """Imported here, as processes that measure memory would pay for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    edges = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), EDGE)
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    grid = {"axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True}
    plt.rcParams.update({"font.size": 10, **edges, **spines, **grid})
    return plt


# --- search ---


def _search(plt: Any, data: Data) -> Any:
    """Time and memory against the number of pairs, at the channels of most cases."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    usual = mode(case.get("channels") for case in data["cases"])
    cases = [case for case in data["cases"] if case.get("channels") == usual]
    cases.sort(key=lambda case: case["pairs"])
    labels = {name: label for name, label in data["labels"].items() if name in STYLES}
    device = data.get("device", data["machine"])
    limit = device["memory_bytes"] / 4
    for axis, (field, title), scale in zip(axes, (TIME, MEMORY), (1.0, 1e-6), strict=True):
        lines = []
        for name, label in labels.items():
            found = [(case["pairs"], case["rows"].get(name, {}).get(field)) for case in cases]
            points = [(x, max(y, LEAST[field]) * scale) for x, y in found if y is not None]
            if points:
                colour, marker = STYLES[name]
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5)
                lines.append((*points[-1], label, colour))
        if field == "median_s":
            bound = [(case["pairs"], case["pixel_gemm_s"]) for case in cases]
            axis.plot(*zip(*bound, strict=True), color="black", linestyle=":", linewidth=1.2)
            operands = cases[-1].get("pixel_gemm_operands", "float32")
            text = "pixel GEMM alone" + ("" if operands == "float32" else f", {operands}")
            lines.append((*bound[-1], text, "black"))
        axis.set(xscale="log", yscale="log", xlabel="pairs of query and key position")
        axis.set_title(title.format("s"), loc="left", fontsize=11)
        axis.margins(y=0.08)
        axis.axvline(limit, color=EDGE, linestyle="--", linewidth=1)
        figure.draw_without_rendering()
        for x in {line[0] for line in lines}:
            # Lines that end where others go on have no room at the right.
            left = cases[0]["pairs"] < x < cases[-1]["pairs"] and field == "median_s"
            _label_ends(axis, [line for line in lines if line[0] == x], left)
    place = "GPU" if device.get("type") == "cuda" else "machine"
    axes[0].annotate(
        f"the matrix of all scores\nexceeds this {place}'s {limit * 4e-9:.0f} GB",
        (limit, 0.03),
        xycoords=("data", "axes fraction"),
        **_offset(-5, 0, "right", EDGE, size=8.5),
    )
    return figure


def _offset(x: float, y: float, side: str, colour: str, size: float = 9) -> dict[str, Any]:
    """Options of text next to a point."""
    place = {"xytext": (x, y), "textcoords": "offset points", "ha": side}
    return {**place, "color": colour, "fontsize": size}


def _label_ends(axis: Any, lines: list[tuple[float, float, str, str]], left: bool) -> None:
    """Labels at the ends of lines, without overlap: right of them, or above them at the left."""
    from matplotlib.patheffects import withStroke

    height = axis.get_window_extent().height / axis.figure.dpi * 72  # points
    lines = sorted(lines, key=lambda line: line[1])
    to_axis = axis.transData + axis.transAxes.inverted()
    ends = [to_axis.transform(line[:2])[1] * height for line in lines]
    places = spread(ends, 12.0)
    raise_by = ends[-1] + 4 - places[0] if left else 0.0  # all of them above the highest line
    for (x, y, label, colour), end, place in zip(lines, ends, places, strict=True):
        at = _offset(-8 if left else 8, place + raise_by - end, "right" if left else "left", colour)
        stroke = [withStroke(linewidth=3, foreground="white")]
        axis.annotate(label, (x, y), va="center", annotation_clip=False, path_effects=stroke, **at)


def spread(places: list[float], gap: float) -> list[float]:
    """Ascending places, moved as little as needed for a distance of `gap`."""

    def start(group: list[float]) -> float:
        return sum(group) / len(group) - gap * (len(group) - 1) / 2

    groups: list[list[float]] = []  # of neighbours that touch
    for place in places:
        groups.append([place])
        while len(groups) > 1 and start(groups[-1]) < start(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [start(group) + n * gap for group in groups for n in range(len(group))]


# --- transfer and model ---


def _transfer(plt: Any, data: Data) -> Any:
    """Time and memory of every operation and level: median and range over layouts and indices."""
    groups: dict[str, list[Data]] = {}
    for case in data["cases"]:
        groups.setdefault(f"{case['operation']} {case['level']}", []).append(case["rows"])
    size = (12, 1 + 0.8 * len(groups))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    _dots(axes, data["labels"], groups)
    return figure


def _model(plt: Any, data: Data) -> Any:
    """Time and memory of every case, and the stages of the whole model."""
    groups = {f"{case['operation']}\n{case['title']}": [case["rows"]] for case in data["cases"]}
    figure, axes = plt.subplot_mosaic(
        [["time", "memory"], ["stages", "stages"]],
        figsize=(12, 9),
        layout="constrained",
        height_ratios=(1.6, 1),
    )
    axes["memory"].sharey(axes["time"])
    axes["memory"].tick_params(axis="y", labelleft=False)
    _dots([axes["time"], axes["memory"]], data["labels"], groups)
    _bars(axes["stages"], data)
    return figure


def _dots(axes: Any, labels: dict[str, str], groups: dict[str, list[Data]]) -> None:
    """Time and memory: the median over the rows of a group, and a line over their range."""
    for axis, (field, title), scale in zip(axes, (TIME, MEMORY), (1e3, 1e-6), strict=True):
        labelled = set()
        for n, name in enumerate(labels):
            colour, marker = STYLES[name]
            for y, cases in enumerate(groups.values()):
                values = [rows.get(name, {}).get(field) for rows in cases]
                values = sorted(max(x, LEAST[field]) * scale for x in values if x is not None)
                if not values:
                    continue
                at = y + 0.8 * ((n + 0.5) / len(labels) - 0.5)
                axis.plot([values[0], values[-1]], [at, at], color=colour, linewidth=2.5)
                axis.plot(median(values), at, color=colour, marker=marker, markersize=6)
                if name not in labelled:
                    text = _offset(8, 0, "left", colour)
                    axis.annotate(labels[name], (values[-1], at), va="center", **text)
                    labelled.add(name)
        axis.set_xscale("log")
        axis.set_title(title.format("ms"), loc="left", fontsize=11)
        _rows_of(axis)
    axes[0].set_yticks(range(len(groups)), groups)
    axes[0].invert_yaxis()


def _rows_of(axis: Any) -> None:
    axis.grid(visible=False, axis="y")
    axis.tick_params(axis="y", length=0, labelcolor="black")


def _bars(axis: Any, data: Data) -> None:
    """The stages of the whole model, as shares of the slowest of a case."""
    ticks: list[str] = []
    for case in data["cases"]:
        stages = {
            label: case["rows"][name]["stages_s"]
            for name, label in data["labels"].items()
            if "stages_s" in case["rows"].get(name, {})
        }
        longest = max((sum(taken.values()) for taken in stages.values()), default=1.0)
        for label, taken in stages.items():
            left, at = 0.0, len(ticks)
            for stage, seconds in taken.items():
                share = 100 * seconds / longest
                colours = {"color": STAGES[stage], "edgecolor": "white"}
                axis.barh(at, share, left=left, **colours)
                if share > 6:
                    text = {"ha": "center", "va": "center", "fontsize": 8, "color": "black"}
                    axis.text(left + share / 2, at, f"{stage}\n{seconds:.3g} s", **text)
                left += share
            ticks.append(f"{case['operation']}, {label}")
    for stage, colour in STAGES.items():
        axis.barh(0, 0, color=colour, label=stage)
    axis.legend(ncols=len(STAGES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axis.set_yticks(range(len(ticks)), ticks)
    _rows_of(axis)
    axis.invert_yaxis()
    axis.set_title("Stages, % of the slowest", loc="left", fontsize=11)


def main(argv: list[str] | None = None) -> int:
    """Draw every file; 2 if one cannot be drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE")
    add("--out", type=Path, default=Path("docs/images"), metavar="FOLDER")
    args = parser.parse_args(argv)
    for path in args.files:
        try:
            data = json.loads(path.read_text())
            draw(data, args.out / f"{path.stem}.png")
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
