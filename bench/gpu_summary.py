"""The summary of `gpu_check.py`: a line for each step, then its numbers in tables."""

import shutil
from collections.abc import Iterator
from typing import Any

from text import GAP, groups, width

LINES = 100
COLUMNS = min(110, shutil.get_terminal_size((110, LINES)).columns)
FAILURES = 5  # lines on what failed in a step
Data = dict[str, Any]
Cell = tuple[str, str, str, str]  # table, row, column, text


def step_line(step: Data) -> str:
    text = f"{step['name']:<10} {step['status']:<12} {step['seconds']:6.1f} s  {step['detail']}"
    return text[:COLUMNS]


def summary(document: Data) -> str:
    """At most `LINES` lines of `COLUMNS` characters; what is left out is in the file."""
    lines = [f"{document['title']}, {document['date']}"]
    for step in document["steps"]:
        lines.append(step_line(step))
        lines += [f"    {text}" for text in step["lines"][:FAILURES]]
    lines += document["results"].get("versions", {}).get("lines", [])
    cells = [cell for result in document["results"].values() for cell in cells_of(result)]
    for table in dict.fromkeys(cell[0] for cell in cells):
        lines += table_lines(table, [cell[1:] for cell in cells if cell[0] == table])
    if len(lines) > LINES:
        left = len(lines) - LINES + 1
        lines[LINES - 1 :] = [f"... and {left} lines more, which are in the file of results"]
    return "\n".join(line[:COLUMNS] for line in lines)


def table_lines(title: str, cells: list[tuple[str, str, str]]) -> list[str]:
    """Rows and columns in the order of their first cells, in groups of columns that fit."""
    rows, columns = (list(dict.fromkeys(cell[n] for cell in cells)) for n in (0, 1))
    texts = {cell[:2]: cell[2] for cell in cells}
    grid = [[title, *columns]] if len(title) < 36 else [["", *columns]]
    grid += [[row, *(texts.get((row, column), "-") for column in columns)] for row in rows]
    labels, *columns = map(list, zip(*grid, strict=True))
    lines = []
    for part in groups(columns, COLUMNS - width(labels) - GAP):
        for label, *numbers in zip(labels, *part, strict=True):
            line = [label.ljust(width(labels)), *map(str.rjust, numbers, map(width, part))]
            lines.append((" " * GAP).join(line).rstrip())
    return lines if grid[0][0] else [title, *lines]


def cells_of(result: Data) -> Iterator[Cell]:
    """The cells of a step's result, of whatever kind it is."""
    if "cells" in result:
        for cell in result["cells"]:
            yield cell["table"], cell["row"], cell["column"], cell["cell"]
    elif result.get("kind") == "search":
        for entry in result["sizes"]:
            size = f"{entry['batch']}*" * (entry["batch"] > 1) + "x".join(map(str, entry["query"]))
            for row in entry["rows"].values():
                text = time_text(row, 1e3)
                if row["status"] == "ok":
                    text += f" {row['ps_per_pair']:.2f} {row['algorithm'] or ''}".rstrip()
                yield "search, ms and ps per pair", row["label"], size, text
    elif result.get("kind") == "transfer":
        for case in result["cases"]:
            for name, row in case["rows"].items():
                label = result["labels"][name]
                place = f"{case['operation']} {case['layout']} {label}"
                text = time_text(row, 1e6)
                yield "transfer, three levels, us", place, case["index"], text
    elif result.get("kind") == "model":
        for case in result["cases"]:
            for name, row in case["rows"].items():
                place = f"{case['operation']}, {case['title']}"
                yield "model, ms", place, result["labels"][name], time_text(row, 1e3)


def time_text(row: Data, unit: float) -> str:
    if row["status"] == "ok":
        return f"{unit * row['median_s']:.2f}"
    return "WRONG" if row.get("wrong") else row["status"]
