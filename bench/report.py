"""Tables of the results of the benchmarks, on a terminal or in Markdown.

python bench/report.py bench/results/*.json   in Markdown
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from text import (
    Table,
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
ORIGINAL = "reference"  # the candidate that a drop-in is compared with
WITHOUT = "peak memory above inputs and results"


def is_gpu(data: Data) -> bool:
    return data.get("device", {}).get("type") == "cuda"


def markdown(data: Data) -> str:
    """The tables of one result file.

    Raises:
        ValueError: the file holds no results of a known kind.
    """
    return "\n".join(table.markdown() for table in tables(data))


def tables(data: Data, full: bool = False) -> list[Table]:
    """Tables of results; `full` for all columns and sizes."""
    kinds = {"search": _search, "transfer": _transfer, "model": _model, "highres": _highres}
    kinds["sharded"] = _sharded
    if data.get("kind") not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}, got {data.get('kind')!r}")
    return kinds[data["kind"]](data, full)


def machine_text(data: Data) -> str:
    """One line on device, versions and date."""
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


# --- cells ---


def cell(row: Data | None, separator: str = "\n") -> str:
    """Time and memory, or the reason why there is none."""
    if row is None:
        return ""
    if row["status"] == "ok":
        return f"{seconds_text(row['median_s'])}{separator}{bytes_text(row['peak_bytes'])}"
    return f"FAILED: {row['reason']}" if row["status"] == "failed" else row["reason"]


def short_cell(rows: list[Data]) -> str:
    """Times in milliseconds and the largest memory of several cases."""
    if any(row["status"] == "failed" for row in rows):
        return "FAILED"
    if not any("median_s" in row for row in rows):
        return "-" if rows else ""
    peaks = [row["peak_bytes"] for row in rows if row.get("peak_bytes") is not None]
    times = "/".join(digits(row["median_s"] * 1e3) if "median_s" in row else "-" for row in rows)
    return f"{times}\n{bytes_text(max(peaks, default=None))}"


def reasons(data: Data, cases: list[Data]) -> list[str]:
    """Reasons for missing measurements, each once."""
    found = {
        f"{data['labels'][name]}: {cell(row)}"
        for case in cases
        for name, row in case["rows"].items()
        if row["status"] != "ok"
    }
    return sorted(found)


def measured(cases: list[Data], names: Any) -> list[tuple[Data, str, Data]]:
    """Case, name and row of all measurements."""
    rows = [(case, name, case["rows"].get(name)) for case in cases for name in names]
    return [(case, name, row) for case, name, row in rows if row and row["status"] == "ok"]


# --- the kinds of results ---


def _search(data: Data, full: bool) -> list[Table]:
    """All sizes side by side, and one size, or with `full` every size, in detail."""
    cases, labels = sorted(data["cases"], key=lambda case: case["pairs"]), data["labels"]
    rows = [["queries in keys", "pairs", *labels.values()]]
    for case in cases:
        cells = (cell(case["rows"].get(name)) for name in labels)
        rows.append([size_title(case), count_text(case["pairs"]), *cells])
    if is_gpu(data):  # more candidates than sizes: a row for each
        rows = [list(cells) for cells in zip(*rows, strict=True)]
    title = f"Search, {cases[0].get('channels', 256)} channels, float32; median time and {WITHOUT}"
    sweep = Table(f"{title}. {machine_text(data)}", rows[0], 1, rows[1:])
    # The largest size at which the whole matrix of scores still fits.
    typical = max(
        cases, key=lambda c: (c["rows"].get("unfold", {}).get("status") == "ok", c["pairs"])
    )
    return [sweep, *(_size(data, case, full) for case in (cases if full else [typical]))]


def _size(data: Data, case: Data, full: bool) -> Table:
    columns = _columns(is_gpu(data), full)
    rows = []
    for _, name, row in measured([case], data["labels"]):
        label, algorithm = data["labels"][name], row.get("algorithm")
        chosen = algorithm and algorithm not in label
        label = f"{label} ({algorithm})" if chosen else label
        rows.append([label, *(text(row) for text in columns.values())])
    operands = case.get("pixel_gemm_operands", "float32")
    pixels = "one product over pixels" + ("" if operands == "float32" else f" in {operands}")
    title = f"At {size_title(case)}, where {pixels} takes {seconds_text(case['pixel_gemm_s'])}"
    gemms = case.get("gemms") or case["gemm_flop_per_s"]
    notes = [f"matrix product of {name}: {flop_text(rate)}" for name, rate in gemms.items()]
    return Table(title, ["", *columns], 1, rows, [*notes, *reasons(data, [case])] if full else ())


def _columns(gpu: bool, full: bool) -> dict[str, Callable[[Data], str]]:
    """Cells of a row by heading; without `full` only what the table of all sizes leaves out."""
    columns: dict[str, Callable[[Data], str]] = {}
    if full:
        columns["time"] = lambda row: seconds_text(row["median_s"])
        columns["20 to 80 %"] = lambda row: range_text(row["low_s"], row["high_s"])
    if gpu:
        columns["ps per pair"] = lambda row: f"{row['ps_per_pair']:.2f}"
    else:
        columns["pairs/s"] = lambda row: count_text(row["pairs_per_s"])
    if gpu or not full:
        columns["of 9 products"] = lambda row: flop_text(row["effective_flop_per_s"])
    if gpu:
        columns["issued"] = lambda row: flop_text(row["issued_flop_per_s"])
    columns["of GEMM"] = lambda row: f"{row['gemm_share']:.0%}"
    if full:
        columns["memory"] = lambda row: bytes_text(row["peak_bytes"])
    columns["error"] = lambda row: f"{row['max_abs_error']:.0e}"
    columns["same key"] = lambda row: f"{row['index_agreement']:.2%}"
    return columns


def _transfer(data: Data, full: bool) -> list[Table]:
    """One row per operation, level and layout; the times of the indices side by side."""
    groups: dict[tuple[str, str, str], list[Data]] = {}
    for case in data["cases"]:
        place = (case["operation"], case["level"], case["layout"])
        groups.setdefault(place, []).append(case["rows"])
    first, label = next(iter(data["labels"].items()))
    rows = []
    for place in sorted(groups, key=lambda place: place[0] == "adjoint"):
        group = groups[place]
        cells = [
            short_cell([rows[name] for rows in group if name in rows]) for name in data["labels"]
        ]
        shares = [x[first]["copy_share"] for x in group if "copy_share" in x.get(first, {})]
        rows.append([*place, *cells, "/".join(f"{100 * share:.0f}" for share in shares)])
    copy = median(case["copy_bytes_per_s"] for case in data["cases"]) / 1e9
    title = (
        f"Transfer, {size_title(data['cases'][0])}, {data['cases'][0]['dtype']}; median ms with "
    )
    title += (
        f"indices {'/'.join(INDICES)} and {WITHOUT}. {machine_text(data)}, copy at {copy:.1f} GB/s"
    )
    header = ["", "level", "layout", *data["labels"].values(), f"{label}, % of copy"]
    return [Table(title, header, 3, rows, reasons(data, data["cases"]))]


def _model(data: Data, full: bool) -> list[Table]:
    """A row for every case, and the stages of the whole model."""
    labels, rows = data["labels"], []
    for case in data["cases"]:
        found = [row for _, _, row in measured([case], labels)]
        cells = (
            cell(row) if row and row["status"] == "ok" else short_cell([row] if row else [])
            for row in map(case["rows"].get, labels)
        )
        times = [
            case["rows"].get(name, {}).get("median_s") for name in (ORIGINAL, next(iter(labels)))
        ]
        faster = "" if None in times else f"{digits(times[0] / times[1])} x"
        error = max((row["max_relative_error"] for row in found), default=0)
        checked = "/".join({str(row.get("checked_queries", "all")) for row in found})
        place = (case["operation"], case["title"])
        rows.append([*place, *cells, faster, f"{error:.0e}", checked])
    title = "Drop-in and original form, float32; median time and "
    header = ["", "size", *labels.values(), "faster", "error", "checked"]
    whole = Table(
        f"{title}{WITHOUT}. {machine_text(data)}", header, 2, rows, reasons(data, data["cases"])
    )
    staged = [x for x in measured(data["cases"], labels) if "stages_s" in x[2]]
    stages = list(dict.fromkeys(stage for _, _, row in staged for stage in row["stages_s"]))
    rows = []
    for case, name, row in staged:
        taken = (row["stages_s"].get(stage) for stage in stages)
        place = (f"{case['operation']}, {case['title']}", labels[name])
        rows.append([*place, *("" if s is None else seconds_text(s) for s in taken)])
    return [whole, Table("Stages of the whole model", ["", "", *stages], 2, rows)]


def _highres(data: Data, full: bool) -> list[Table]:
    """Whole runs of the command."""
    (case,) = data["cases"]
    height, width = case["size"]
    title = (
        f"From {width // 4}x{height // 4} to {width}x{height} with a reference of that size, for "
    )
    title += f"which the original form makes a matrix of {bytes_text(case['original_bytes'])}"
    rows = []
    for row in case["rows"].values():
        cells = [row.get("reason", ""), "", "", ""]
        if row["status"] == "ok":
            shares = [f"{row[name]:.4%}" if name in row else "" for name in ("equal", "close")]
            cells = [seconds_text(row["median_s"]), bytes_text(row["peak_bytes"]), *shares]
        at_once = "none, at once" if row["method"] == "ttsr" else ""
        rows.append([row["method"], row["limit"] or at_once, *cells])
    header = ["method", "limit", "time", "peak memory of the process", "equal", "within 1/255"]
    return [Table(f"{title}. {machine_text(data)}", header, 2, rows)]


def _sharded(data: Data, full: bool) -> list[Table]:
    """One process and several, size by size."""
    found = []
    for case in data["cases"]:
        rows = [
            [
                data["labels"][name],
                seconds_text(row["median_s"]),
                range_text(row["low_s"], row["high_s"]),
                count_text(case["pairs"] / row["median_s"]),
                bytes_text(row["key_bytes"]),
                bytes_text(row["peak_bytes"]),
            ]
            for _, name, row in measured([case], data["labels"])
        ]
        header = ["", "time", "20 to 80 %", "pairs/s", "key", "memory"]
        title = (
            f"{size_title(case)}, {case['channels']} channels, {count_text(case['pairs'])} pairs"
        )
        found.append(Table(title, header, 1, rows, reasons(data, [case])))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print the tables of every file; 2 if one cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for path in args.files:
        try:
            print(markdown(json.loads(path.read_text())))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
