"""Tables of results on the terminal, and the rows that they share with those in markdown."""

from collections.abc import Callable
from typing import Any

from terminal import Table
from text import (
    bytes_text,
    count_text,
    digits,
    flop_text,
    range_text,
    seconds_text,
    size_title,
)

Data = dict[str, Any]
INDICES = ("random", "coherent", "all to one")
OPERATIONS = ("gather_fold", "adjoint", "SearchTransfer", "with gradients")
ORIGINAL = "reference"  # the name of what a drop-in is compared with


def is_gpu(data: Data) -> bool:
    return data.get("device", {}).get("type") == "cuda"


def cell(row: Data, separator: str) -> str:
    """Time and memory, or why there is none."""
    if row["status"] == "ok":
        return f"{seconds_text(row['median_s'])}{separator}{bytes_text(row['peak_bytes'])}"
    return f"FAILED: {row['reason']}" if row["status"] == "failed" else row["reason"]


def search_table(data: Data, entry: Data) -> Table:
    """All there is to say about one size of a search sweep."""
    gemms = entry.get("gemms") or {"float32": entry["gemm_flop_per_s"]["float32"]}
    rates = ", ".join(f"{name} at {flop_text(rate)}" for name, rate in gemms.items())
    lines = [
        f"matrix products of this run: {rates}",
        f"one over pixels, {entry.get('pixel_gemm_operands', 'float32')}: "
        f"{seconds_text(entry['pixel_gemm_s'])}",
    ]
    columns = search_columns(data, everything=True)
    measured = [row for row in entry["rows"].values() if row["status"] == "ok"]
    lines += [
        f"{row['label']}: {cell(row, '')}" for row in entry["rows"].values() if row not in measured
    ]
    return Table(
        f"{size_title(entry)}, {data['channels']} channels, {count_text(entry['pairs'])} pairs",
        ["", *(name for name, _ in columns)],
        1,
        [[label(row), *(text(row) for _, text in columns)] for row in measured],
        lines,
        bold=sum(row["backend"] is not None for row in measured),
    )


def label(row: Data) -> str:
    """With the algorithm, where a backend chose one."""
    algorithm = row.get("algorithm")
    chosen = algorithm and algorithm not in row["label"]
    return f"{row['label']} ({algorithm})" if chosen else row["label"]


def search_columns(data: Data, everything: bool) -> list[tuple[str, Callable[[Data], str]]]:
    """Headings and cells of what is known of a candidate; time and memory too if `everything`."""
    timed = [
        ("time", lambda row: seconds_text(row["median_s"])),
        ("20 to 80 %", lambda row: range_text(row["low_s"], row["high_s"])),
    ]
    rates = [("pairs/s", lambda row: count_text(row["pairs_per_s"]))]
    if is_gpu(data):
        rates = [("ps per pair", lambda row: f"{row['ps_per_pair']:.2f}")]
    if is_gpu(data) or not everything:
        rates.append(("of 9 products", lambda row: flop_text(row["effective_flop_per_s"])))
    if is_gpu(data):
        rates.append(("issued", lambda row: flop_text(row["issued_flop_per_s"])))
    rates.append(("of GEMM", lambda row: f"{row['gemm_share']:.0%}"))
    memory = [("memory", lambda row: bytes_text(row["peak_bytes"]))]
    accuracy = [
        ("error", lambda row: f"{row['max_abs_error']:.0e}"),
        ("same key", lambda row: f"{row['index_agreement']:.2%}"),
    ]
    return [*timed, *rates, *memory, *accuracy] if everything else [*rates, *accuracy]


def transfer_table(data: Data) -> Table:
    """Time and memory of every case of a transfer run."""
    copy = data["copy_bytes_per_s"] / 1e9
    title = f"{transfer_title(data)}; ms with indices {'/'.join(INDICES)}"
    lines = [f"a copy runs at {copy:.1f} GB/s", *reasons(data)]
    return Table(title, *transfer_header(data), transfer_rows(data, "\n"), lines)


def reasons(data: Data) -> list[str]:
    """Why some of the rows have no measurement, each reason once."""
    found = {
        f"{data['labels'][name]}: {cell(row, '')}"
        for case in data["cases"]
        for name, row in case["rows"].items()
        if row["status"] != "ok"
    }
    return sorted(found)


def transfer_title(data: Data) -> str:
    return f"Transfer, {size_title(data)}, {data.get('dtype', 'float32')}"


def transfer_header(data: Data) -> tuple[list[str], int]:
    """Column names, and how many of them describe the case."""
    first = next(iter(data["labels"].values()))
    return ["", "level", "layout", *data["labels"].values(), f"{first}, % of copy"], 3


def transfer_rows(data: Data, separator: str) -> list[list[str]]:
    """One row per operation, level and layout; the times of the indices side by side."""
    groups: dict[tuple[str, str, str], list[Data]] = {}
    for case in data["cases"]:
        place = (case["operation"], case.get("level", ""), case.get("layout", ""))
        groups.setdefault(place, []).append(case["rows"])
    first = next(iter(data["labels"]))
    rows = []
    for place in sorted(groups, key=lambda place: OPERATIONS.index(place[0])):
        group = groups[place]
        cells = [
            _group_cell([rows[name] for rows in group if name in rows], separator)
            for name in data["labels"]
        ]
        shares = [x.get(first, {}).get("copy_share") for x in group]
        shares = [f"{100 * share:.0f}" for share in shares if share is not None]
        rows.append([*place, *cells, "/".join(shares)])
    return rows


def _group_cell(rows: list[Data], separator: str) -> str:
    """Times side by side and the largest memory, or that a result was wrong."""
    if any(row["status"] == "failed" for row in rows):
        return "FAILED"
    if not any("median_s" in row for row in rows):
        return "-" if rows else ""
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes") is not None]
    times = "/".join(digits(row["median_s"] * 1e3) if "median_s" in row else "-" for row in rows)
    return f"{times}{separator}{bytes_text(max(peaks, default=None))}"


def model_tables(data: Data) -> list[Table]:
    """Time and memory of every case of a model run, and the stages of the whole model."""
    header, left, rows = model_rows(data, "\n")
    header = ["", *header[left:]]
    rows = [[", ".join(row[:left]), *row[left:]] for row in rows]
    return [
        Table("Drop-in and original form", header, 1, rows, reasons(data)),
        Table("Stages", *stage_rows(data)),
    ]


def model_rows(data: Data, separator: str) -> tuple[list[str], int, list[list[str]]]:
    """Header, how many columns of it describe the case, and a row for every case."""
    header = ["", "size", *data["labels"].values(), "faster", "error", "checked"]
    rows = []
    for case in data["cases"]:
        found = [case["rows"][name] for name in data["labels"] if name in case["rows"]]
        cells = {
            name: cell(row, separator) if row["status"] == "ok" else _group_cell([row], separator)
            for name, row in case["rows"].items()
        }
        right = [row for row in found if row["status"] == "ok"]
        checked = {row.get("checked_queries", "all") for row in right}
        rows.append(
            [
                case["operation"],
                case["title"],
                *(cells.get(name, "") for name in data["labels"]),
                _ratio(case["rows"], next(iter(data["labels"]))),
                f"{max((row['max_relative_error'] for row in right), default=0):.0e}",
                "/".join(map(str, checked)),
            ]
        )
    return header, 2, rows


def _ratio(rows: Data, name: str) -> str:
    """How many times faster than the original form a variant is, where both ran."""
    times = [rows.get(x, {}).get("median_s") for x in (ORIGINAL, name)]
    return "" if None in times else f"{digits(times[0] / times[1])} x"


def stage_rows(data: Data) -> tuple[list[str], int, list[list[str]]]:
    """The same for the stages of the whole model."""
    measured = [
        (case, label, case["rows"][name]["stages_s"])
        for case in data["cases"]
        for name, label in data["labels"].items()
        if "stages_s" in case["rows"].get(name, {})
    ]
    names = list(dict.fromkeys(stage for _, _, stages in measured for stage in stages))
    rows = [
        [
            f"{case['operation']}, {case['title']}",
            label,
            *(seconds_text(stages[name]) if name in stages else "" for name in names),
        ]
        for case, label, stages in measured
    ]
    return ["", "", *names], 2, rows


def highres_table(data: Data) -> Table:
    """Time and memory of whole runs of the command."""
    return Table(highres_title(data), *highres_rows(data))


def highres_title(data: Data) -> str:
    height, width = data["size"]
    return (
        f"From {width // 4}x{height // 4} to {width}x{height} with a reference of that size, for "
        f"which the original form makes a matrix of {bytes_text(data['original_bytes'])}"
    )


def highres_rows(data: Data) -> tuple[list[str], int, list[list[str]]]:
    header = ["method", "limit", "time", "peak memory of the process", "equal", "within 1/255"]
    rows = []
    for row in data["rows"]:
        cells = [row.get("reason", ""), "", "", ""]
        if row["status"] == "ok":
            shares = [f"{row[name]:.4%}" if name in row else "" for name in ("equal", "close")]
            cells = [seconds_text(row["seconds"]), bytes_text(row["peak_bytes"]), *shares]
        at_once = "none, at once" if row["method"] == "ttsr" else ""
        rows.append([row["method"], row["limit"] or at_once, *cells])
    return header, 2, rows
