"""Terminal output of the benchmarks: command line, progress bar, and tables that fit any width."""

import argparse
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from text import GAP, groups, width

PIPE_WIDTH = 1000  # characters; rich assumes 80


class _Help(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # names of backends have hyphens


def parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, formatter_class=_Help)


def console() -> Console:
    """Standard output. Tables in a pipe or a file have their full width."""
    found = Console()
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def progress_bar(console: Console) -> Progress:
    """A bar that disappears when it is done, on terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@dataclass(frozen=True)
class Table:
    """A table without cut cells.

    Too wide for the terminal, it folds labels and headings between words. If this is not enough,
    the columns of values form several tables, each with all labels.

    Attributes:
        title: the text above.
        header: headings of all columns.
        labels: number of columns, from the left, that name a row.
        rows: cells of all columns.
        notes: lines below.
        bold: number of rows, from the top, in bold type.
    """

    title: str
    header: Sequence[str]
    labels: int
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    bold: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\n{self.title}", style="table.title")
        columns = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        labels, values = columns[: self.labels], columns[self.labels :]
        parts = [values]
        if sum(width(column) + GAP for column in columns) - GAP > options.max_width:
            values = [[_folded(heading, cells), *cells] for heading, *cells in values]
            least = sum(width(_words(column)) + GAP for column in labels)
            parts = list(groups(values, options.max_width - least))
        for n, part in enumerate(parts):
            if n > 0:
                yield Text()
            yield self._part(labels, part, empty_rows=n == 0)
        yield from map(Text, self.notes)

    def _part(
        self, labels: list[list[str]], values: Sequence[Sequence[str]], empty_rows: bool
    ) -> rich.table.Table:
        table = rich.table.Table(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True
        )
        for column in labels:
            table.add_column(Text(column[0]), min_width=width(_words(column)))
        for column in values:
            table.add_column(Text(column[0]), justify="right", no_wrap=True)
        rows = list(zip(*labels, *values, strict=True))[1:]
        for n, cells in enumerate(rows):
            if empty_rows or any(cells[self.labels :]):
                table.add_row(*map(Text, cells), style="bold" if n < self.bold else "")
        return table


def _words(column: list[str]) -> list[str]:
    return " ".join(column).split()


def _folded(heading: str, cells: list[str]) -> str:
    """A heading in one or two lines, no wider than the cells if possible."""
    for size in range(width([*cells, *heading.split()]), len(heading)):
        if len(lines := textwrap.wrap(heading, size, break_on_hyphens=False)) <= 2:
            return "\n".join(lines)
    return heading
