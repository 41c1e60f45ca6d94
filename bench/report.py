"""Tables of the results of the benchmarks, on a terminal or in Markdown.

python bench/report.py bench/results/*.json   in Markdown
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median, mode
from typing import Any

Data = dict[str, Any]
INDICES = ("random", "coherent", "all to one")
ORIGINAL = "reference"  # the candidate that a drop-in is compared with
WITHOUT = "peak memory above inputs and results"
GAP = "  "  # between the columns of a table


def seconds_text(seconds: float) -> str:
    """Three significant digits and a unit."""
    return _scaled(seconds, "µs", **{"s": 1.0, "ms": 1e-3, "µs": 1e-6})


def range_text(low: float, high: float) -> str:
    return f"{seconds_text(low)} to {seconds_text(high)}"


def bytes_text(count: float | None) -> str:
    """Decimal units."""
    return "not measured" if count is None else _scaled(count, "kB", GB=1e9, MB=1e6, kB=1e3)


def count_text(count: float) -> str:
    """Thousands, millions and billions."""
    return _scaled(count, "", G=1e9, M=1e6, k=1e3).strip()


def flop_text(rate: float) -> str:
    """FLOP per second."""
    return _scaled(rate, "GFLOP/s", **{"TFLOP/s": 1e12, "GFLOP/s": 1e9})


def _scaled(x: float, least: str, **units: float) -> str:
    """A number in the largest unit below it, or in the least."""
    unit = next((unit for unit, scale in units.items() if x >= scale), least)
    return f"{digits(x / units.get(unit, 1.0))} {unit}"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def size_title(entry: dict[str, Any], usual: int | None = None) -> str:
    """`100x100`, `100x100 in 108x96` where the grids differ, `9 of 40x40` for a batch.

    With `, C = 64` after it for 64 channels where `usual` is another number.
    """
    query, key = ("x".join(map(str, entry[side])) for side in ("query", "key"))
    grids = query if query == key else f"{query} in {key}"
    if entry.get("batch", 1) != 1:
        grids = f"{entry['batch']} of {grids}"
    channels = entry.get("channels") if usual else None
    return grids if channels in (None, usual) else f"{grids}, C = {channels}"


@dataclass(frozen=True)
class Table:
    """A table without cut cells; cells may have several lines."""

    title: str
    header: Sequence[str]
    labels: int  # number of columns, from the left, that name a row
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        rule = ["---"] * self.labels + ["---:"] * (len(self.header) - self.labels)
        rows = (" | ".join(row).replace("\n", "<br>") for row in (self.header, rule, *self.rows))
        table = "\n".join(f"| {row} |" for row in rows)
        notes = "".join(f"- {note}\n" for note in self.notes)
        return f"{self.title}:\n\n{table}\n" + (f"\n{notes}" if notes else "")

    def lines(self, limit: int) -> Iterator[str]:
        """Lines of a terminal. Columns that do not fit form further tables, each with all labels.

        A cell of several lines takes several lines of the table.
        """
        yield from textwrap.wrap(self.title, limit)
        columns = zip(self.header, *self.rows, strict=True)
        widths = [max(len(x) for cell in column for x in cell.split("\n")) for column in columns]
        parts: list[list[int]] = []  # columns of each table
        for column in range(self.labels, len(widths)):
            room = limit - widths[column]
            if not parts or sum(widths[n] + len(GAP) for n in parts[-1]) > room:
                parts.append(list(range(self.labels)))
            parts[-1].append(column)
        for part in parts:
            for row in (self.header, *self.rows):
                for line in zip_longest(*(row[n].split("\n") for n in part), fillvalue=""):
                    cells = (
                        text.ljust(widths[n]) if n < self.labels else text.rjust(widths[n])
                        for n, text in zip(part, line, strict=True)
                    )
                    yield GAP.join(cells).rstrip()
        yield from self.notes


# --- results ---


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
    if data.get("kind") not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {data.get('kind')!r}")
    return KINDS[data["kind"]](data, full)


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
        unit += [f"kernels for {isa}" for isa in [machine.get("instruction_set")] if isa]
        others = ("triton",)
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
    """All sizes in one table, and one size, or with `full` every size, in detail."""
    labels, usual = data["labels"], mode(channels_of(case) for case in data["cases"])
    cases = sorted(data["cases"], key=lambda case: (-channels_of(case), case["pairs"]))
    rows = [["queries in keys", "pairs", *labels.values()]]
    for case in cases:
        cells = (cell(case["rows"].get(name)) for name in labels)
        rows.append([size_title(case, usual), count_text(case["pairs"]), *cells])
    if is_gpu(data):  # more candidates than sizes: a row for each
        rows = [list(cells) for cells in zip(*rows, strict=True)]
    title = f"Search, {usual} channels, float32; median time and {WITHOUT}"
    sweep = Table(f"{title}. {machine_text(data)}", rows[0], 1, rows[1:])
    # The largest size at which the whole matrix of scores still fits.
    most = [case for case in cases if channels_of(case) == usual]
    fitting = [c for c in most if c["rows"].get("unfold", {}).get("status") == "ok"] or most
    details = cases if full else fitting[-1:]
    return [sweep, *(_size(data, case, size_title(case, usual), full) for case in details)]


def channels_of(case: Data) -> int:
    return case.get("channels", 256)


def _size(data: Data, case: Data, size: str, full: bool) -> Table:
    columns = _columns(is_gpu(data), full)
    gemms = case["gemm_flop_per_s"]
    rates = {name.split()[0]: rate for name, rate in gemms.items()}
    rows = []
    for _, name, row in measured([case], data["labels"]):
        label = data["labels"][name]
        choice = row.get("instruction_set") or row.get("algorithm") or ""
        label += f" ({choice})" * (choice not in label)
        shares = {operands: row["issued_flop_per_s"] / rate for operands, rate in rates.items()}
        rows.append([label, *(text({**row, "shares": shares}) for text in columns.values())])
    operands = case.get("pixel_gemm_operands", "float32")
    pixels = "one product over pixels" + f" in {operands}" * (operands != "float32")
    device = data["device" if is_gpu(data) else "machine"]
    title = f"At {size}, where {pixels} takes {seconds_text(case['pixel_gemm_s'])}"
    title += f", on {device.get('name') or device['cpu']}"
    notes = [f"matrix product of {name}: {flop_text(rate)}" for name, rate in gemms.items()]
    notes += [f"checked: {case['checked']}"] if "checked" in case else []
    return Table(title, ["", *columns], 1, rows, [*notes, *reasons(data, [case])] if full else ())


def _columns(gpu: bool, full: bool) -> dict[str, Callable[[Data], str]]:
    """Cells of a row by heading; without `full` only what the table of all sizes leaves out."""
    columns: dict[str, tuple[bool, Callable[[Data], str]]] = {
        "time": (full, lambda row: seconds_text(row["median_s"])),
        "20 to 80 %": (full, lambda row: range_text(row["low_s"], row["high_s"])),
        "ps per pair": (gpu, lambda row: f"{1e12 / row['pairs_per_s']:.2f}"),
        "pairs/s": (not gpu, lambda row: count_text(row["pairs_per_s"])),
        "of 9 products": (gpu or not full, lambda row: flop_text(row["effective_flop_per_s"])),
        "issued": (gpu or full, lambda row: flop_text(row["issued_flop_per_s"])),
        "of GEMM": (gpu, lambda row: f"{row['gemm_share']:.0%}"),
        "of fp32 GEMM": (not gpu, partial(_share, "float32")),
        "of bf16 GEMM": (not gpu, partial(_share, "bfloat16")),
        "memory": (full, lambda row: bytes_text(row["peak_bytes"])),
        "error": (True, lambda row: f"{row['max_abs_error']:.0e}"),
        "same key": (True, lambda row: f"{row['index_agreement']:.2%}"),
    }
    return {name: text for name, (shown, text) in columns.items() if shown}


def _share(operands: str, row: Data) -> str:
    return f"{row['shares'][operands]:.0%}" if operands in row["shares"] else ""


def _transfer(data: Data, full: bool) -> list[Table]:
    """One row per operation, level and layout, with the times of all indices."""
    cases, labels = data["cases"], data["labels"]
    groups: dict[tuple[str, str, str], list[Data]] = {}
    for case in cases:
        place = (case["operation"], case["level"], case["layout"])
        groups.setdefault(place, []).append(case["rows"])
    first, label = next(iter(labels.items()))
    rows = []
    for place, group in sorted(groups.items(), key=lambda item: item[0][0] == "adjoint"):
        cells = (short_cell([rows[name] for rows in group if name in rows]) for name in labels)
        shares = (x[first]["copy_share"] for x in group if "copy_share" in x.get(first, {}))
        rows.append([*place, *cells, "/".join(f"{100 * share:.0f}" for share in shares)])
    copy = median(case["copy_bytes_per_s"] for case in cases) / 1e9
    title = (
        f"Transfer, {size_title(cases[0])}, float32; median ms with indices "
        f"{'/'.join(INDICES)} and {WITHOUT}. {machine_text(data)}, copy at {copy:.1f} GB/s"
    )
    header = ["", "level", "layout", *labels.values(), f"{label}, % of copy"]
    return [Table(title, header, 3, rows, reasons(data, cases))]


def _model(data: Data, full: bool) -> list[Table]:
    """A row for every case, and the stages of the whole model."""
    labels, rows, staged, stages = data["labels"], [], [], {}
    for case in data["cases"]:
        found = {name: row for _, name, row in measured([case], labels)}
        given = (case["rows"].get(name) for name in labels)
        cells = (cell(x) if x and "median_s" in x else short_cell([x] if x else []) for x in given)
        times = [found.get(name, {}).get("median_s") for name in (ORIGINAL, next(iter(labels)))]
        faster = "" if None in times else f"{digits(times[0] / times[1])} x"
        error = max((row["max_relative_error"] for row in found.values()), default=0)
        checked = "/".join({str(row.get("checked_queries", "all")) for row in found.values()})
        losses = (f", {row['loss_db']:.4f} dB" for row in found.values() if "loss_db" in row)
        place = (case["operation"], case["title"])
        rows.append([*place, *cells, faster, f"{error:.0e}" + "".join(losses), checked])
        for name in [name for name in found if "stages_s" in found[name]]:
            staged.append((", ".join(place), labels[name], found[name]["stages_s"]))
            stages |= found[name]["stages_s"]
    title = f"Drop-in and original form, float32; median time and {WITHOUT}. {machine_text(data)}"
    header = ["", "size", *labels.values(), "faster", "error", "checked"]
    whole = Table(title, header, 2, rows, reasons(data, data["cases"]))
    rows = [
        [*place, *(seconds_text(taken[x]) if x in taken else "" for x in stages)]
        for *place, taken in staged
    ]
    return [whole, Table("Stages of the whole model", ["", "", *stages], 2, rows)]


def _highres(data: Data, full: bool) -> list[Table]:
    """Whole runs of the command."""
    (case,) = data["cases"]
    height, width = case["size"]
    title = (
        f"From {width // 4}x{height // 4} to {width}x{height} with a reference of that size, for "
        f"which the original form makes a matrix of {bytes_text(case['original_bytes'])}"
    )
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
        rows = []
        for _, name, row in measured([case], data["labels"]):
            times = [seconds_text(row["median_s"]), range_text(row["low_s"], row["high_s"])]
            memory = [bytes_text(row["key_bytes"]), bytes_text(row["peak_bytes"])]
            rate = count_text(case["pairs"] / row["median_s"])
            rows.append([data["labels"][name], *times, rate, *memory])
        header = ["", "time", "20 to 80 %", "pairs/s", "key", "memory"]
        title = f"Search over processes, {size_title(case)}, {case['channels']} channels"
        found.append(Table(title, header, 1, rows, reasons(data, [case])))
    return found


KINDS = {
    "search": _search,
    "transfer": _transfer,
    "model": _model,
    "highres": _highres,
    "sharded": _sharded,
}


def main(argv: list[str] | None = None) -> int:
    """Print the tables of every file; 2 if one cannot be read."""
    parser = argparse.ArgumentParser(description="Tables of results of benchmarks in Markdown.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    for path in parser.parse_args(argv).files:
        try:
            print(markdown(json.loads(path.read_text())))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"{path}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
