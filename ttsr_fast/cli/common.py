"""What the commands share: options, the bar of progress, output in harmless lines."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import torch

from ttsr_fast import backends, environment, plan
from ttsr_fast.bank import ReferenceBank
from ttsr_fast.files import shown
from ttsr_fast.folders import namesake, pictures_in
from ttsr_fast.functional import PRECISIONS
from ttsr_fast.images import Image
from ttsr_fast.model import load_model
from ttsr_fast.upscaling import AMP, METHODS, PHASES

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
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


Weights = Annotated[
    Path | None, typer.Option(help="A TTSR checkpoint: official, mmagic's or .safetensors.")
]
References = Annotated[
    list[Path] | None,
    typer.Option(help="Reference picture, or a folder of them; may be given several times."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="4GiB, 512M, ...: what the process may take.", show_default="what is free"),
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
    typer.Option(help="cpu, cuda, cuda:1, mps, ...", show_default="the GPU if there is one"),
]
Backend = Annotated[
    str | None, one_of(backends.BACKENDS, "What runs the search.", "the fastest that can")
]
Precision = Annotated[str | None, one_of(PRECISIONS, "What speed may cost in accuracy.", "fp32")]
Amp = Annotated[
    str | None,
    one_of(tuple(AMP), "For ttsr: convolutions in this type, not the search.", "the model's"),
]


def _without_warnings(context: typer.Context, quiet: bool) -> bool:
    logger = logging.getLogger("ttsr_fast")
    if quiet:
        context.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.ERROR)
    return quiet


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Say nothing but errors.", callback=_without_warnings),
]


class ReferenceOptions:
    """The references of every picture: all for each, or one of the same name."""

    def __init__(self, ref: list[Path] | None, pairs: Path | None, cache: Path | None) -> None:
        if bool(ref) == (pairs is not None):
            raise ValueError("either --ref or --pairs is needed, and not both")
        if pairs is not None and not pairs.is_dir():
            raise ValueError(f"--pairs must be a folder, got {shown(pairs)}")
        self._pairs, self._cache = pairs, cache
        self._all = [file for path in ref or () for file in pictures_in(path)]
        self._bank: ReferenceBank | None = None

    def files(self, source: Path) -> list[Path]:
        return self._all if self._pairs is None else [namesake(source, self._pairs)]

    def leave_out(self, is_result: Callable[[Path], bool]) -> None:
        """Leave out of the references for all images what earlier runs have written there."""
        left = [file for file in self._all if not is_result(file)]
        if self._all and not left:
            raise ValueError("--ref must name images, got only results")
        self._all = left

    def bank(self, source: Path) -> ReferenceBank:
        if self._pairs is not None or self._bank is None:
            files = self.files(source)
            self._bank = ReferenceBank(files if len(files) > 1 else files[0], cache=self._cache)
        return self._bank


def upscale_options(
    weights: Path | None,
    method: str | None,
    phases: int | None,
    device: str | None,
    backend: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """What `upscale` takes beside the pictures; the model is loaded and moved."""
    if method == "ttsr" and weights is None:
        raise ValueError("--method ttsr needs --weights")
    if weights is not None and (method == "detail" or phases is not None):
        raise ValueError("--weights are for --method ttsr, which takes no --phases")
    options = {"method": method, "phases": phases, "backend": backend, "precision": precision}
    where = torch.device(device_named(device))
    if backend is not None:
        backends.can_run(backend, where, raise_error=True)
    if weights is not None:
        return {**options, "model": load_model(weights).to(where)}
    return {**options, "device": where}


def device_named(name: str | None) -> str:
    known = environment.devices()
    if name is None:
        return next(iter(known[1:]), "cpu")
    if name not in known and f"{name}:0" not in known:
        raise ValueError(f"--device must be one of {', '.join(known)}, got {name}")
    return name


def report(path: Path, image: Image, start: float, quiet: bool) -> None:
    """Print a result. A reader that has gone away does not end the work."""
    if quiet or sys.stdout is None:
        return
    height, width = image.size
    try:
        say(f"{shown(path)} ({width} x {height}, {time.perf_counter() - start:.1f} s)")
    except OSError:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())


@contextmanager
def progress_bar(
    what: str, total: int, quiet: bool
) -> Iterator[tuple[Callable[[], None], Callable[[str], Callable[[str, int, int], None]]]]:
    """A bar on the terminal, gone when done; one picture alone has no measure and only pulses.

    Gives a function for every picture that is done, and one that makes, of a picture's name, what
    `upscale` tells of its progress.
    """
    text = TextColumn("{task.description}", markup=False)  # `[red]` may be part of a name
    columns = (SpinnerColumn(), text, BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what, total=total if total > 1 else None)

        def tell(name: str) -> Callable[[str, int, int], None]:
            def told(stage: str, done: int, of: int) -> None:
                progress.update(task, description=f"{shown(name)}: {stage} {done}/{of}")

            return told

        yield lambda: progress.advance(task), tell


@contextmanager
def errors_in_one_line(where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End the command with a line for an error, or for Ctrl-C, which came `where` it says."""
    try:
        yield
    except ERRORS as error:
        fail(one_line(error))
    except KeyboardInterrupt:
        fail(f"interrupted{where()}", INTERRUPTED)


def one_line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def memory_limit(text: str | None) -> int | None:
    try:
        return None if text is None else plan.parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--max-memory: {error}") from None


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    say(f"error: {message}", err=True)
    raise typer.Exit(code)


def say(line: str, *, err: bool = False) -> None:
    """Print a line, without what a terminal obeys, in the encoding of the stream if it is open."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        typer.echo(fitting(line, stream), err=err)


def fitting(text: str, stream: TextIO) -> str:
    """A text in one line, of characters that a terminal prints and the stream encodes."""
    encoding = stream.encoding or "utf-8"
    return shown(text).encode(encoding, "backslashreplace").decode(encoding)


class OneLineHandler(logging.Handler):
    """Log messages as the commands print errors."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}", err=True)
