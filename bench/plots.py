"""The figures of the benchmarks, for a README: colour-blind safe, labelled at the lines."""

from pathlib import Path
from statistics import median
from typing import Any

Data = dict[str, Any]

# Okabe and Ito's palette; the same colour for a candidate in every figure. What has no style is in
# the tables alone.
STYLES = {
    "cpp-fp32": ("#0072B2", "o"),
    "cpp-bf16": ("#56B4E9", "s"),
    "triton-fp32": ("#0072B2", "o"),
    "triton-fp16x3": ("#0072B2", "D"),
    "triton-tf32": ("#56B4E9", "v"),
    "triton-fp16": ("#56B4E9", "s"),
    "triton-bf16": ("#56B4E9", "P"),
    "torch-fp32": ("#009E73", "^"),
    "unfold": ("#D55E00", "D"),
    "unfold-tf32": ("#D55E00", "v"),
    "unfold-fp16": ("#D55E00", "s"),
    "chunked": ("#E69F00", "v"),
    "compile": ("#E69F00", "X"),
    "faiss": ("#CC79A7", "P"),
    "flashlib": ("#CC79A7", "s"),
    "keops": ("#777777", "X"),
    "cpp": ("#0072B2", "o"),
    "torch": ("#009E73", "^"),
    "reference": ("#D55E00", "D"),
    "grid_sample": ("#CC79A7", "P"),
    "index_add": ("#777777", "v"),
    "default": ("#0072B2", "o"),
    "default-graph": ("#0072B2", "D"),
    "fp16x3": ("#56B4E9", "s"),
    "fp16x3-graph": ("#56B4E9", "D"),
    "cpp-graph": ("#0072B2", "D"),
}
STAGES = {  # Tol's light palette, that black can be read on
    "LTE": "#77AADD",
    "search": "#EE8866",
    "transfer": "#EEDD88",
    "MainNet": "#BBCC33",
    "backward": "#99DDFF",
    "Adam": "#DDDDDD",
}
GREY = "#666666"
LEAST = {"median_s": 0.0, "peak_bytes": 1e5}  # drawn: less is within the error of the measurement


def draw(data: Data, path: Path) -> None:
    """The figure of a result file, whichever benchmark wrote it."""
    {"search": search, "transfer": transfer, "model": model}[data["kind"]](data, path)


def save(figure: Any, path: Path, dpi: int = 160) -> None:
    """Write a figure through a temporary file in the same folder."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=dpi, format="png")
    plt.close(figure)
    temporary.replace(path)


def pyplot() -> Any:
    """Imported where it is used: every process that measures memory would pay for it otherwise."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "axes.axisbelow": True,
            "xtick.color": GREY,
            "ytick.color": GREY,
        }
    )
    return plt


def search(data: Data, path: Path) -> None:
    """Time and memory against the number of pairs."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    labels = {
        name: row["label"] for name, row in data["sizes"][0]["rows"].items() if name in STYLES
    }
    device = data.get("device", data["machine"])
    for axis, field, scale, title in (
        (axes[0], "median_s", 1.0, "Time, s"),
        (axes[1], "peak_bytes", 1e-6, "Memory above inputs and results, MB"),
    ):
        lines = []
        for name, label in labels.items():
            points = [
                (entry["pairs"], max(entry["rows"][name][field], LEAST[field]) * scale)
                for entry in data["sizes"]
                if entry["rows"][name].get(field) is not None
            ]
            if points:
                colour, marker = STYLES[name]
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5)
                lines.append((*points[-1], label, colour))
        if field == "median_s":
            bound = [(entry["pairs"], entry["pixel_gemm_s"]) for entry in data["sizes"]]
            axis.plot(*zip(*bound, strict=True), color="black", linestyle=":", linewidth=1.2)
            operands = data["sizes"][-1].get("pixel_gemm_operands", "float32")
            text = "pixel GEMM alone" + ("" if operands == "float32" else f", {operands}")
            lines.append((*bound[-1], text, "black"))
        axis.set(xscale="log", yscale="log", xlabel="pairs of query and key position")
        axis.set_title(title, loc="left", fontsize=11)
        axis.margins(y=0.08)
        limit = device["memory_bytes"] / 4
        axis.axvline(limit, color=GREY, linestyle="--", linewidth=1)
        figure.draw_without_rendering()
        first, last = (data["sizes"][n]["pairs"] for n in (0, -1))
        for x in {line[0] for line in lines}:
            left = first < x < last and field == "median_s"  # where the space right of it is taken
            _label_ends(axis, [line for line in lines if line[0] == x], left)
    place = "GPU" if device.get("type") == "cuda" else "machine"
    axes[0].annotate(
        f"the matrix of all scores\nexceeds this {place}'s {limit * 4e-9:.0f} GB",
        (limit, 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        color=GREY,
        fontsize=8.5,
    )
    save(figure, path)


def _label_ends(axis: Any, lines: list[tuple[float, float, str, str]], left: bool) -> None:
    """Labels at the ends of lines: moved apart until none overlaps, right of them or above left."""
    from matplotlib.patheffects import withStroke

    height = axis.get_window_extent().height / axis.figure.dpi * 72  # points
    lines = sorted(lines, key=lambda line: line[1])
    to_axis = axis.transData + axis.transAxes.inverted()
    ends = [to_axis.transform(line[:2])[1] * height for line in lines]
    places = spread(ends, 12.0)
    raise_by = ends[-1] + 4 - places[0] if left else 0.0  # all of them above the highest line
    for (x, y, label, colour), end, place in zip(lines, ends, places, strict=True):
        axis.annotate(
            label,
            (x, y),
            xytext=(-8 if left else 8, place + raise_by - end),
            textcoords="offset points",
            color=colour,
            ha="right" if left else "left",
            va="center",
            fontsize=9,
            annotation_clip=False,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def spread(places: list[float], gap: float) -> list[float]:
    """Ascending places moved as little as is needed to lie `gap` apart."""
    groups: list[list[float]] = []  # of neighbours that touch
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _bottom(groups[-1], gap) < _top(groups[-2], gap) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_bottom(group, gap) + n * gap for group in groups for n in range(len(group))]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def transfer(data: Data, path: Path) -> None:
    """Time and memory of every operation and level: median and range over layouts and indices."""
    groups: dict[str, list[Data]] = {}
    for case in data["cases"]:
        title = f"{case['operation']} {case.get('level', '')}".strip()
        groups.setdefault(title, []).append(case["rows"])
    titles = sorted(groups, key=lambda title: title.startswith(("SearchTransfer", "with")))
    size = (12, 1 + 0.8 * len(groups))
    figure, axes = pyplot().subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    _dots(axes, data["labels"], {title: groups[title] for title in titles})
    save(figure, path)


def model(data: Data, path: Path) -> None:
    """Time and memory of every case, and the stages that the whole model's time goes into."""
    groups = {f"{case['operation']}\n{case['title']}": [case["rows"]] for case in data["cases"]}
    figure, axes = pyplot().subplot_mosaic(
        [["time", "memory"], ["stages", "stages"]],
        figsize=(12, 9),
        layout="constrained",
        height_ratios=(1.6, 1),
    )
    axes["memory"].sharey(axes["time"])
    axes["memory"].tick_params(axis="y", labelleft=False)
    _dots([axes["time"], axes["memory"]], data["labels"], groups)
    _bars(axes["stages"], data)
    save(figure, path)


def _dots(axes: Any, labels: dict[str, str], groups: dict[str, list[Data]]) -> None:
    """Medians of what the rows of a group hold, a line over their range; time, then memory."""
    for axis, field, scale, heading in (
        (axes[0], "median_s", 1e3, "Time, ms"),
        (axes[1], "peak_bytes", 1e-6, "Memory above inputs and results, MB"),
    ):
        for n, (name, label) in enumerate(labels.items()):
            colour, marker = STYLES[name]
            for y, cases in enumerate(groups.values()):
                values = [rows.get(name, {}).get(field) for rows in cases]
                values = sorted(max(x, LEAST[field]) * scale for x in values if x is not None)
                if not values:
                    continue
                at = y + 0.8 * ((n + 0.5) / len(labels) - 0.5)
                axis.plot([values[0], values[-1]], [at, at], color=colour, linewidth=2.5)
                axis.plot(median(values), at, color=colour, marker=marker, markersize=6)
                if label is not None:
                    axis.annotate(
                        label,
                        (values[-1], at),
                        xytext=(8, 0),
                        textcoords="offset points",
                        color=colour,
                        va="center",
                        fontsize=9,
                    )
                    label = None
        axis.set_xscale("log")
        axis.set_title(heading, loc="left", fontsize=11)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0, labelcolor="black")
    axes[0].set_yticks(range(len(groups)), groups)
    axes[0].invert_yaxis()


def _bars(axis: Any, data: Data) -> None:
    """The stages of the whole model, one after another, as shares of the slowest of a case."""
    ticks: list[str] = []
    for case in data["cases"]:
        stages = {
            label: case["rows"][name]["stages_s"]
            for name, label in data["labels"].items()
            if "stages_s" in case["rows"].get(name, {})
        }
        longest = max((sum(taken.values()) for taken in stages.values()), default=1.0)
        for label, taken in stages.items():
            left = 0.0
            for stage, seconds in taken.items():
                share, at = 100 * seconds / longest, len(ticks)
                axis.barh(at, share, left=left, color=STAGES[stage], edgecolor="white")
                if share > 6:
                    text = f"{stage}\n{seconds:.3g} s"
                    axis.annotate(
                        text, (left + share / 2, at), ha="center", va="center", fontsize=8
                    )
                left += share
            ticks.append(f"{case['operation']}, {label}")
    for stage, colour in STAGES.items():
        axis.barh(0, 0, color=colour, label=stage)
    axis.legend(ncols=len(STAGES), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axis.set_yticks(range(len(ticks)), ticks)
    axis.tick_params(axis="y", length=0, labelcolor="black")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_title("Stages, % of the slowest", loc="left", fontsize=11)
