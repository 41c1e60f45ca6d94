"""Numbers and sizes as the tables write them, and what fits beside what."""

from collections.abc import Iterator, Sequence
from typing import Any

UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
GAP = 2  # spaces between the columns of a table


def seconds_text(seconds: float) -> str:
    """Three significant digits and a unit."""
    unit = next((unit for unit, scale in UNITS.items() if seconds >= scale), "µs")
    return f"{digits(seconds / UNITS[unit])} {unit}"


def range_text(low: float, high: float) -> str:
    """Two times in the unit of the first."""
    number, unit = seconds_text(low).split()
    return f"{number} to {digits(high / UNITS[unit])}"


def bytes_text(count: float | None) -> str:
    """Decimal units, as memory is sold."""
    if count is None:
        return "not measured"
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{digits(count / 1e3)} kB"


def count_text(count: float) -> str:
    """Thousands, millions and billions."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{digits(count / scale)} {unit}"
    return digits(count)


def flop_text(rate: float) -> str:
    """FLOP per second."""
    return f"{digits(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{digits(rate / 1e9)} GFLOP/s"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def size_title(entry: dict[str, Any]) -> str:
    """`100x100`, `100x100 in 108x96` where the grids differ, `9 of 40x40` for a batch."""
    query, key = ("x".join(map(str, entry[side])) for side in ("query", "key"))
    grids = query if query == key else f"{query} in {key}"
    return grids if entry.get("batch", 1) == 1 else f"{entry['batch']} of {grids}"


def width(column: Sequence[str]) -> int:
    return max((len(line) for cell in column for line in cell.split("\n")), default=0)


def groups(columns: Sequence[Sequence[str]], limit: int) -> Iterator[list[Sequence[str]]]:
    """Consecutive columns that fit into `limit` characters, at least one at a time."""
    found: list[Sequence[str]] = []
    for column in columns:
        if found and sum(width(x) + GAP for x in [*found, column]) - GAP > limit:
            yield found
            found = []
        found = [*found, column]
    if found:
        yield found
