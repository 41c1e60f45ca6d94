"""Numbers as text, and tables that fit a terminal or a page of Markdown."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
GAP = "  "  # between the columns of a table
FOLDINGS = (1000, 24, 12, 1)  # widths at which labels are folded


def seconds_text(seconds: float) -> str:
    """Three significant digits and a unit."""
    unit = next((unit for unit, scale in UNITS.items() if seconds >= scale), "µs")
    return f"{digits(seconds / UNITS[unit])} {unit}"


def range_text(low: float, high: float) -> str:
    """Two times in the unit of the first."""
    number, unit = seconds_text(low).split()
    return f"{number} to {digits(high / UNITS[unit])}"


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
    unit = next((unit for unit, scale in units.items() if x >= scale), least)
    return f"{digits(x / units.get(unit, 1.0))} {unit}"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def size_title(entry: dict[str, Any]) -> str:
    """`100x100`, `100x100 in 108x96` where the grids differ, `9 of 40x40` for a batch."""
    query, key = ("x".join(map(str, entry[side])) for side in ("query", "key"))
    grids = query if query == key else f"{query} in {key}"
    return grids if entry.get("batch", 1) == 1 else f"{entry['batch']} of {grids}"


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
        """Lines for a terminal of that width.

        Headings, and labels if needed, are folded between words. Columns of values that do not
        fit side by side form several tables, each with all labels.
        """
        yield from textwrap.wrap(self.title, limit)
        columns = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        labels, values = columns[: self.labels], columns[self.labels :]
        values = [[_folded(heading, width(cells)), *cells] for heading, *cells in values]
        foldings = [[[_folded(x, n) for x in column] for column in labels] for n in FOLDINGS]
        parts = [
            [[*found, *part] for part in _groups(values, limit - sum(map(_room, found)))]
            for found in foldings
        ]
        for n, part in enumerate(min(parts, key=len)):  # the first, where several are as short
            yield from ["", *_joined(part, self.labels)][n == 0 :]
        yield from self.notes


def width(column: Sequence[str]) -> int:
    return max((len(line) for cell in column for line in cell.split("\n")), default=0)


def _room(column: Sequence[str]) -> int:
    return width(column) + len(GAP)


def _folded(text: str, limit: int) -> str:
    """Text in lines of `limit` characters, or of its longest word."""
    limit = max(limit, width(text.split()), 1)
    return "\n".join(textwrap.wrap(text, limit, break_on_hyphens=False))


def _groups(columns: Sequence[Sequence[str]], room: int) -> Iterator[list[Sequence[str]]]:
    """Consecutive columns that fit, at least one at a time."""
    found: list[Sequence[str]] = []
    for column in columns:
        if found and sum(map(_room, [*found, column])) - len(GAP) > room:
            yield found
            found = []
        found = [*found, column]
    yield found


def _joined(columns: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows of aligned cells; `left` columns are aligned at the left."""
    lines = []
    for row in zip(*columns, strict=True):
        cells = [cell.split("\n") for cell in row]
        for n in range(max(map(len, cells))):
            texts = [cell[n] if n < len(cell) else "" for cell in cells]
            aligned = (
                text.ljust(width(column)) if at < left else text.rjust(width(column))
                for at, (text, column) in enumerate(zip(texts, columns, strict=True))
            )
            lines.append(GAP.join(aligned).rstrip())
    return lines
