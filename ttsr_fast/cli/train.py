"""`ttsr-fast train`: a generator learnt from pictures."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch import distributed

from ttsr_fast.cli.common import Quiet, errors_in_one_line, fail, say
from ttsr_fast.training.config import PRESETS, SETTINGS, Config, load_config, to_yaml

if TYPE_CHECKING:
    from ttsr_fast.training.trainer import State


def train_command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar=f"[{'|'.join(PRESETS)}|FILE.yaml]",
            help="What to do.",
            show_default="ttsr; with --resume as it began",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Pictures to learn from (data.root).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for all results (run.out).")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key; may be given often."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Show all that is set, as YAML, and stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a generator, as published (ttsr, ttsr-rec) or in minutes on a CPU (tiny).

    With several GPUs or nodes: accelerate launch -m ttsr_fast train ...

    SIGTERM and Ctrl-C let the step end and save; --resume goes on from there.

    Exit codes: 0 all done, 143 ended by SIGTERM, 130 by Ctrl-C, 2 an error.
    """
    start = time.perf_counter()
    with errors_in_one_line():
        config = _config(source, data, out, settings or [], resume)
        if show:
            typer.echo(to_yaml(config), nl=False)
            return
        from ttsr_fast.training.trainer import MODELS, train  # with all of accelerate

        with _progress(quiet) as tell:
            state = train(config, resume=resume, progress=tell)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if state.signal:
        name = signal.Signals(state.signal).name
        fail(f"{name} after step {state.step}: --resume goes on from there", 128 + state.signal)
    if tell.called and not quiet:
        took = f"{state.step} steps, {time.perf_counter() - start:.1f} s"
        say(f"{config.run.out}/{MODELS[0]} ({took}{_quality(state)})")


def _config(
    source: str | None, data: Path | None, out: Path | None, settings: list[str], resume: bool
) -> Config:
    if source is None and resume and out is not None and (out / SETTINGS).is_file():
        source = str(out / SETTINGS)
    paths = {"data.root": data, "run.out": out}
    values = {key: str(path) for key, path in paths.items() if path is not None}
    return load_config("ttsr" if source is None else source, settings, values=values)


class _Teller:
    """Shows a state on the bar, or, where there is no terminal, a line for every epoch.

    Attributes:
        called: whether there was any; in all processes but the main one there is not.
    """

    def __init__(self, bar: Progress | None, lines: bool) -> None:
        self.called = False
        self._bar, self._lines = bar, lines
        self._task: TaskID | None = None

    def __call__(self, state: "State") -> None:
        self.called = True
        losses = "  ".join(f"{name} {value:.4f}" for name, value in state.losses.items())
        epoch = state.epoch + (state.done > 0)
        text = f"epoch {epoch}  {losses}  {state.images_per_second:.1f} images/s{_quality(state)}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=state.total, completed=state.step - 1)
            self._bar.update(self._task, description=text, completed=state.step)
        elif self._lines and state.done == 0:
            typer.echo(text)


@contextmanager
def _progress(quiet: bool) -> Iterator[_Teller]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _Teller(None, not quiet)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Teller(bar, False)


def _quality(state: "State") -> str:
    if state.validation is None:
        return ""
    return f", {state.validation.psnr:.2f} dB, bicubic {state.validation.bicubic:.2f} dB"
