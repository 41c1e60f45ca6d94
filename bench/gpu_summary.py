"""The summary of `gpu_check.py`: a line for each step, then its numbers in tables."""

import shutil
from collections.abc import Iterator
from typing import Any

from text import Table

LINES = 100
COLUMNS = min(110, shutil.get_terminal_size((110, LINES)).columns)
FAILURES = 5  # lines on the failures of a step
Data = dict[str, Any]


def step_line(step: Data) -> str:
    text = f"{step['name']:<10} {step['status']:<12} {step['seconds']:6.1f} s  {step['detail']}"
    return text[:COLUMNS]


def summary(document: Data) -> str:
    """At most `LINES` lines of `COLUMNS` characters; the file of results has the rest."""
    lines = [f"{document['title']}, {document['date']}"]
    for step in document["steps"]:
        lines.append(step_line(step))
        lines += [f"    {text}" for text in step["lines"][:FAILURES]]
    lines += document["results"].get("versions", {}).get("lines", [])
    tables: dict[str, dict[tuple[str, str], str]] = {}
    for result in document["results"].values():
        for title, row, column, text in cells_of(result):
            tables.setdefault(title, {})[row, column] = text
    for title, cells in tables.items():
        rows, columns = (list(dict.fromkeys(place[n] for place in cells)) for n in (0, 1))
        body = [[row, *(cells.get((row, column), "-") for column in columns)] for row in rows]
        lines += Table(title, ["", *columns], 1, body).lines(COLUMNS)
    if len(lines) > LINES:
        left = len(lines) - LINES + 1
        lines[LINES - 1 :] = [f"... and {left} lines more, which are in the file of results"]
    return "\n".join(line[:COLUMNS] for line in lines)


def cells_of(result: Data) -> Iterator[tuple[str, str, str, str]]:
    """Table, row, column and text of the cells of a step's result."""
    for cell in result.get("cells", ()):
        yield cell["table"], cell["row"], cell["column"], cell["cell"]
    for case in result.get("cases", ()):
        for name, row in case["rows"].items():
            label, text = result["labels"][name], time_text(row)
            if result["kind"] == "search":
                yield "search, ms and ps per pair", label, case["title"], text
            elif result["kind"] == "transfer":
                place = f"{case['operation']} {case['layout']} {label}"
                yield "transfer, three levels, ms", place, case["index"], text
            else:
                yield "model, ms", f"{case['operation']}, {case['title']}", label, text


def time_text(row: Data) -> str:
    if row["status"] != "ok":
        return "WRONG" if row.get("wrong") else row["status"]
    rate = f" {row['ps_per_pair']:.2f} {row['algorithm'] or ''}" if "ps_per_pair" in row else ""
    return f"{1e3 * row['median_s']:.3f}{rate}".rstrip()
