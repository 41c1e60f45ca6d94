"""`ttsr-fast train`: a generator learnt from pictures."""

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
from ttsr_fast.training.interruption import Ended, signals_raise

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
        bool,
        typer.Option("--resume", help="Go on from the last checkpoint in --out, or begin there."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Show all that is set, as YAML, and stop.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train a generator, as published (ttsr, ttsr-rec) or in minutes on a CPU (tiny).

    With several GPUs or nodes: accelerate launch -m ttsr_fast train ...

    SIGTERM and Ctrl-C let the step end and save; --resume goes on from there. Where no training is
    yet, --resume begins one, so that a job can always be started by the same command.

    Exit codes: 0 all done, 143 ended by SIGTERM, 130 by Ctrl-C, 2 an error.
    """
    tell = _Teller()
    try:
        with signals_raise(), errors_in_one_line():
            config = _config(source, data, out, settings or [], resume)
            if show:
                typer.echo(to_yaml(config), nl=False)
                return
            _train(config, resume, quiet, tell)
    except Ended as ended:
        fail(f"{ended} {tell.place}", 128 + ended.signal)


def _train(config: Config, resume: bool, quiet: bool, tell: "_Teller") -> None:
    start = time.perf_counter()
    from ttsr_fast.training.trainer import MODELS, train  # with all of accelerate

    with _progress(tell, quiet):
        state = train(config, resume=resume, progress=tell)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if state.signal:
        tell.step, tell.saved = state.step, True
        raise Ended(state.signal)
    if tell.step is not None and not quiet:
        took = f"{state.step} steps, {time.perf_counter() - start:.1f} s"
        say(f"{config.run.out}/{MODELS[0]} ({took}{_quality(state)})")


def _config(
    source: str | None, data: Path | None, out: Path | None, settings: list[str], resume: bool
) -> Config:
    if source is None and resume:
        if out is None or not (out / SETTINGS).is_file():
            missing = "there is no --out" if out is None else f"there is no {out / SETTINGS}"
            raise ValueError(f"cannot resume: {missing}; to begin, name a preset or a file as well")
        source = str(out / SETTINGS)
    paths = {"data.root": data, "run.out": out}
    values = {key: str(path) for key, path in paths.items() if path is not None}
    return load_config("ttsr" if source is None else source, settings, values=values)


class _Teller:
    """Shows a state on a bar, or a line for every epoch.

    Attributes:
        bar: None where there is no terminal.
        lines: whether lines are shown.
        step: of the last state, None before there was any; in all processes but the main one there
            is none.
        saved: whether the step is in the last checkpoint.
    """

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.lines = self.saved = False
        self.step: int | None = None
        self._task: TaskID | None = None

    @property
    def place(self) -> str:
        """Place of the training at a signal, and advice."""
        if self.step is None:
            return "before the first step: nothing is lost"
        where = "there" if self.saved else "the last checkpoint"
        return f"after step {self.step}: --resume goes on from {where}"

    def __call__(self, state: "State") -> None:
        self.step = state.step
        losses = "  ".join(f"{name} {value:.4f}" for name, value in state.losses.items())
        epoch = state.epoch + (state.done > 0)
        text = f"epoch {epoch}  {losses}  {state.images_per_second:.1f} images/s{_quality(state)}"
        if self.bar is not None:
            if self._task is None:
                self._task = self.bar.add_task("", total=state.total, completed=state.step - 1)
            self.bar.update(self._task, description=text, completed=state.step)
        elif self.lines and state.done == 0:
            typer.echo(text)


@contextmanager
def _progress(tell: _Teller, quiet: bool) -> Iterator[None]:
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        tell.lines = not quiet
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        tell.bar = bar
        yield


def _quality(state: "State") -> str:
    if state.validation is None:
        return ""
    return f", {state.validation.psnr:.2f} dB, bicubic {state.validation.bicubic:.2f} dB"
