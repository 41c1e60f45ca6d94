"""Shared parts of the commands: options, progress bar, output in harmless lines.

Nothing here loads PyTorch or NumPy, since `--help` needs this module.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

from ttsr_fast.choices import AMP, BACKENDS, METHODS, PHASES, PRECISIONS
from ttsr_fast.cli.signals import at_start, exit_at_signals
from ttsr_fast.files import shown

if TYPE_CHECKING:
    from ttsr_fast.images import Image

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install 'ttsr-fast[cli]'") from error

SOME_FAILED, BAD_INPUT = 1, 2  # exit codes
INTERRUPTED = 130  # 128 and the number of SIGINT
ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)


def one_of(choices: Sequence[Any], help: str, default: str) -> Any:
    """An option that takes one of `choices`, or None."""

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        if value is not None and value not in choices:
            fail(f"--{parameter.name} must be one of {', '.join(map(str, choices))}, got {value}")
        return value

    metavar = "|".join(map(str, choices))
    return typer.Option(callback=check, metavar=metavar, help=help, show_default=default)


def flag(*names: str, **options: Any) -> Any:
    """An option without a value."""
    return typer.Option(*names, metavar="", **options)


Weights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A TTSR checkpoint: official, mmagic's or .safetensors."),
]
References = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="PATH", help="Reference image, or a folder of them; may be given several times."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="4GiB, 512M, ...: memory that the process may take.",
        show_default="what is free",
    ),
]
Method = Annotated[
    str | None,
    one_of(METHODS, "detail needs no weights.", "ttsr with --weights, otherwise detail"),
]
Phases = Annotated[
    int | None,
    one_of(PHASES, "For detail: how finely to search. 4 finds most, in 4 times the time.", "2"),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="cpu, cuda, cuda:1, mps, ...", show_default="the GPU if there is one"
    ),
]
Backend = Annotated[str | None, one_of(BACKENDS, "What runs the search.", "the fastest that can")]
Precision = Annotated[str | None, one_of(PRECISIONS, "What speed may cost in accuracy.", "fp32")]
Amp = Annotated[
    str | None,
    one_of(AMP, "For ttsr: convolutions in this type, not the search.", "the model's"),
]


def _without_warnings(context: typer.Context, quiet: bool) -> bool:
    logger = logging.getLogger("ttsr_fast")
    if quiet:
        context.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[
    bool,
    flag("--quiet", "-q", help="Say nothing but errors.", callback=_without_warnings),
]


def report(path: Path, image: "Image", start: float, quiet: bool) -> None:
    """Print a result. An error of standard output does not end the work."""
    height, width = image.size
    if quiet:
        return
    try:
        say(f"{shown(path)} ({width} x {height}, {time.perf_counter() - start:.1f} s)")
    except OSError:
        _discard(sys.stdout)


_bars: list[Progress] = []  # on the terminal now


@contextmanager
def terminal_bar(*columns: ProgressColumn, quiet: bool) -> Iterator[Progress | None]:
    """Progress bar on the terminal of stderr, removed at the end; None where that is no terminal.

    `say` prints above it meanwhile. Without colours a bar looks full from the start, so it is left
    out.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    if console.no_color:
        columns = tuple(column for column in columns if not isinstance(column, BarColumn))
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        _bars.append(bar)
        try:
            yield bar
        finally:
            _bars.remove(bar)


@contextmanager
def progress_bar(
    what: str, total: int, quiet: bool
) -> Iterator[tuple[Callable[[], None], Callable[[str], Callable[[str, int, int], None]]]]:
    """Progress bar of the images; for one image alone, of the steps of its stage.

    Yields a function to call after each image, and a factory of `progress` callbacks for `upscale`
    by the name of the image.
    """
    text = TextColumn("{task.description}", markup=False)  # `[red]` may be part of a name
    count = [MofNCompleteColumn()] if total > 1 else []
    columns = (SpinnerColumn(), text, BarColumn(), *count, TimeElapsedColumn())
    with terminal_bar(*columns, quiet=quiet) as bar:
        if bar is None:
            yield lambda: None, lambda name: lambda stage, done, of: None
            return
        task = bar.add_task(what, total=total)

        def progress_of(name: str) -> Callable[[str, int, int], None]:
            def on_progress(stage: str, done: int, of: int) -> None:
                text = f"{shown(name)}: {stage} {done}/{of}"
                if total > 1:
                    bar.update(task, description=text)
                else:
                    bar.update(task, description=text, completed=done, total=of)

            return on_progress

        yield lambda: bar.advance(task), progress_of


@contextmanager
def errors_in_one_line(where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End the command with one line for an error, or for Ctrl-C with the place `where`."""
    at_start.close()
    try:
        yield
    except ERRORS as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        fail(f"interrupted{where()}", INTERRUPTED)


def loading(where: Callable[[], str] = lambda: "") -> AbstractContextManager[None]:
    """Ctrl-C ends the process while modules are imported, with the line of `errors_in_one_line`."""
    return exit_at_signals(lambda name: f"error: interrupted{where()}", signal.SIGINT)


def one_line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    say(f"error: {message}", err=True)
    raise typer.Exit(code)


def say(line: str, *, err: bool = False) -> None:
    """Print one line with control characters escaped. A closed stream or pipe is ignored."""
    stream = sys.stderr if err else sys.stdout
    if stream is None:
        return
    if _bars and stream.isatty():
        _bars[-1].console.print(Text(fitting(line, stream)), soft_wrap=True)
        return
    try:
        typer.echo(fitting(line, stream), err=err)
    except BrokenPipeError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Discard all further output of a stream."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), stream.fileno())


def fitting(text: str, stream: TextIO) -> str:
    """One line of characters that a terminal prints and the stream encodes."""
    encoding = stream.encoding or "utf-8"
    return shown(text).encode(encoding, "backslashreplace").decode(encoding)


class OneLineHandler(logging.Handler):
    """Log messages in the form of the commands' errors."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}", err=True)
