"""Tables and plots of the results of the benchmarks.

    python bench/report.py out/*.json                       tables in markdown
    python bench/report.py out/*.json --images docs/images  and the plots

Plots (`<stem>.png`) need matplotlib; without it a message says so.

The benchmarks themselves show their results with the same tables and plots.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import plots
import terminal
from rich.console import Console
from tables import (
    INDICES,
    Data,
    cell,
    highres_rows,
    highres_title,
    is_gpu,
    label,
    model_rows,
    reasons,
    search_columns,
    stage_rows,
    transfer_header,
    transfer_rows,
    transfer_title,
)
from text import count_text, seconds_text, size_title


def machine_text(data: Data) -> str:
    """One line on what the numbers were measured with."""
    machine = data["machine"]
    versions = {name: v for name, v in machine["versions"].items() if v and name != "numpy"}
    if is_gpu(data):
        device = data["device"]
        unit = [device["name"], f"CUDA {device['cuda']}", f"driver {device['driver']}"]
        others = ("faiss-cpu",)
    else:
        unit = [machine["cpu"], f"{machine['threads']} threads", machine["capability"]]
        others = ("triton", "flashlib")
    named = [f"{name} {version}" for name, version in versions.items() if name not in others]
    return ", ".join([*unit, *named, machine["date"][:10]])


def draw(data: Data, path: Path, console: Console) -> None:
    """The plot of a result file, where matplotlib is there to draw it."""
    if find_spec("matplotlib") is None:
        console.print(f"{path} was not drawn: matplotlib is not installed")
    else:
        plots.draw(data, path)


# --- markdown ---


def markdown(data: Data) -> str:
    """The tables of one result file.

    Raises:
        ValueError: the file holds no results that are known here.
    """
    render = {
        "search": _search_markdown,
        "transfer": _transfer_markdown,
        "model": _model_markdown,
        "highres": _highres_markdown,
    }.get(data.get("kind", ""))
    if render is None:
        raise ValueError(
            f"kind must be search, transfer, model or highres, got {data.get('kind')!r}"
        )
    return render(data)


def _rows_to_markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    ruler = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))


def _search_markdown(data: Data) -> str:
    names = list(data["sizes"][0]["rows"])
    labels = [data["sizes"][0]["rows"][name]["label"] for name in names]
    header = ["queries in keys", "pairs", *labels]
    rows = [
        [
            size_title(entry),
            count_text(entry["pairs"]),
            *(cell(entry["rows"][name], "<br>") for name in names),
        ]
        for entry in data["sizes"]
    ]
    if is_gpu(data):  # more candidates than sizes: a row for each
        header, *rows = (list(cells) for cells in zip(header, *rows, strict=True))
    sweep = _rows_to_markdown(header, rows)
    entry = max(data["sizes"], key=_worth_detail)
    columns = search_columns(data, everything=False)
    detail = _rows_to_markdown(
        ["", *(name for name, _ in columns)],
        [
            [label(row), *(cell(row) for _, cell in columns)]
            for row in entry["rows"].values()
            if row["status"] == "ok"
        ],
    )
    return (
        f"Search, {data['channels']} channels, float32; median time and peak memory above inputs "
        f"and results. {machine_text(data)}.\n\n{sweep}\n\n"
        f"At {size_title(entry)}, where one product over pixels takes "
        f"{seconds_text(entry['pixel_gemm_s'])}:\n\n{detail}\n"
    )


def _worth_detail(entry: Data) -> tuple[bool, int]:
    """The largest size at which the whole matrix of scores still fits."""
    return entry["rows"].get("unfold", {}).get("status") == "ok", entry["pairs"]


def _transfer_markdown(data: Data) -> str:
    header, left = transfer_header(data)
    return (
        f"{transfer_title(data)}; median ms with indices {'/'.join(INDICES)} "
        f"and peak memory above inputs and results. {machine_text(data)}, copy at "
        f"{data['copy_bytes_per_s'] / 1e9:.1f} GB/s.\n\n"
        f"{_rows_to_markdown(header, transfer_rows(data, '<br>'), left)}\n"
    )


def _model_markdown(data: Data) -> str:
    header, left, rows = model_rows(data, "<br>")
    stages = stage_rows(data)
    return (
        "Drop-in and original form, float32; median time and peak memory above inputs and results. "
        f"{machine_text(data)}.\n\n{_rows_to_markdown(header, rows, left)}\n\n"
        + "".join(f"- {reason}\n" for reason in reasons(data))
        + f"\nStages of the whole model:\n\n{_rows_to_markdown(stages[0], stages[2], stages[1])}\n"
    )


def _highres_markdown(data: Data) -> str:
    header, left, rows = highres_rows(data)
    table = _rows_to_markdown(header, rows, left)
    return f"{highres_title(data)}. {machine_text(data)}.\n\n{table}\n"


def main(argv: list[str] | None = None) -> int:
    """Print the tables of every file; 2 if one cannot be read."""
    parser = terminal.parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="write the plots there")
    args = parser.parse_args(argv)
    for path in args.files:
        try:
            data = json.loads(path.read_text())
            print(markdown(data))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
        if args.images is not None and data["kind"] != "highres":
            draw(data, args.images / f"{path.stem}.png", Console(stderr=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
