"""`ttsr-fast train`: training of a generator."""

import json
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ttsr_fast.cli.common import Quiet, errors_in_one_line, flag, say, terminal_bar
from ttsr_fast.cli.signals import exit_at_signals
from ttsr_fast.files import shown
from ttsr_fast.training.config import PRESETS, SETTINGS, Config, load_config, to_yaml
from ttsr_fast.training.settings import explained
from ttsr_fast.training.signals import SIGNALS, Ended, signals_raise

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ttsr_fast.training.trainer import State

_KEYS = """\
Keys for --set and for FILE.yaml, with defaults that presets may change: --show prints the values.
The name of the part may be left out: batch_size is data.batch_size.
"""


def _print_help(context: typer.Context, requested: bool) -> None:
    """Print the help of the command and the keys of every part."""
    if not requested or context.resilient_parsing:
        return
    typer.echo(f"{context.get_help()}\n")
    formatter = context.make_formatter()
    formatter.write_text(_KEYS)
    for part, help, keys in explained(Config()):
        with formatter.section(f"{part} ({help})"):
            formatter.write_dl([(f"{key.name}={_in_yaml(key.value)}", key.help) for key in keys])
    typer.echo(formatter.getvalue(), nl=False)
    raise typer.Exit


def _in_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def train_command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar=f"{'|'.join(PRESETS)}|FILE.yaml",
            help="Preset or configuration.",
            show_default="ttsr; with --resume the one of the training",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Training images (data.root).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="For all results (run.out)."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key (below); repeatable."),
    ] = None,
    resume: Annotated[
        bool,
        flag("--resume", help="Resume from the last checkpoint in --out, or start there."),
    ] = False,
    show: Annotated[
        bool,
        flag("--show", help="Print the configuration as YAML with comments, and stop."),
    ] = False,
    quiet: Quiet = False,
    help: Annotated[
        bool,
        flag(
            "--help",
            "-h",
            is_eager=True,
            expose_value=False,
            callback=_print_help,
            help="Show this message and exit.",
        ),
    ] = False,
) -> None:
    """Train a generator.

    Presets: ttsr and ttsr-rec as published, tiny for minutes on a CPU.

    With several GPUs or nodes: accelerate launch -m ttsr_fast train ...

    Ctrl-C and SIGTERM let the step end and save a checkpoint, from which --resume continues.

    --resume in a folder without a training starts one: a job can always run the same command.

    Exit codes: 0 done, 143 ended by SIGTERM, 130 by Ctrl-C, 2 error.
    """
    display = _Display(resume, out)
    try:
        with errors_in_one_line(), signals_raise():
            with exit_at_signals(display.ended_by, *SIGNALS):
                config = _config(source, data, out, settings or [], resume)
            if show:
                typer.echo(to_yaml(config), nl=False)
                return
            _train(config, resume, quiet, display)
    except Ended as ended:
        say(display.ended_by(str(ended)), err=True)
        raise typer.Exit(128 + ended.signal) from None


def _train(config: Config, resume: bool, quiet: bool, display: "_Display") -> None:
    start = time.perf_counter()
    with exit_at_signals(display.ended_by, *SIGNALS):
        from torch import distributed

        from ttsr_fast.training.checkpoints import BEST, LAST
        from ttsr_fast.training.trainer import MODELS, train

    display.out = out = None if config.run.out is None else Path(config.run.out)
    verbose = not quiet and os.environ.get("RANK", "0") == "0"
    if resume and out is not None and not any((out / x).exists() for x in (SETTINGS, LAST, BEST)):
        resume = False
        if verbose:
            say(f"nothing to resume in {out}: the training starts from the beginning", err=True)
    with _progress(display, quiet):
        state = train(config, resume=resume, progress=display)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    if state.signal:
        display.step, display.saved = state.step, True
        raise Ended(state.signal)
    if display.step is None and verbose:
        say(f"nothing to resume in {out}: all {state.step} steps are done", err=True)
    if display.step is not None and not quiet:
        model, average = MODELS
        took = f"{state.step} steps, {time.perf_counter() - start:.1f} s"
        best = model if config.optim.ema is None else average
        say(f"{out}/{best} ({took}{_quality(state)})")
        if best == average:
            say(f"{out}/{model} (weights of the last step; for upscale and eval use {average})")


def _config(
    source: str | None, data: Path | None, out: Path | None, settings: list[str], resume: bool
) -> Config:
    if source is None and resume:
        start = f"to start a training, name a preset ({', '.join(PRESETS)}) or a file as well"
        if out is None:
            raise ValueError(f"--resume needs --out, the folder of the training; {start}")
        if not (out / SETTINGS).is_file():
            raise ValueError(f"nothing to resume: there is no {out / SETTINGS}; {start}")
        source = str(out / SETTINGS)
    paths = {"data.root": data, "run.out": out}
    values = {key: str(path) for key, path in paths.items() if path is not None}
    return load_config("ttsr" if source is None else source, settings, values=values)


class _Display:
    """Progress of a training: a bar, or a line for every epoch.

    Args:
        resume: the command has `--resume`.
        out: folder of the training.

    Attributes:
        bar: None without a terminal.
        lines: lines are shown.
        step: of the last state, None before the first one and outside the main process.
        saved: the step is in the last checkpoint.
    """

    def __init__(self, resume: bool, out: Path | None) -> None:
        self.out, self._resume = out, resume
        self.bar: Progress | None = None
        self.lines = self.saved = False
        self.step: int | None = None
        self._task: TaskID | None = None

    def ended_by(self, name: str) -> str:
        """Line with the signal's name, the last step, and the command to continue."""
        return f"error: {name} {self._position}"

    @property
    def _position(self) -> str:
        begun = self.out is not None and (self.out / SETTINGS).exists()
        if self.step is None and (self._resume or not begun):
            return "before the first step: nothing is lost, run the same command again"
        if self.step is None:
            return f"before the first step: nothing is lost, start with {self._command}"
        if self.saved:
            return f"after step {self.step}, which is saved: resume with {self._command}"
        return f"after step {self.step}: resume from the last checkpoint with {self._command}"

    @property
    def _command(self) -> str:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            return "the same command and --resume"
        return f"ttsr-fast train --out {shlex.quote(shown(str(self.out)))} --resume"

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
            say(text)


@contextmanager
def _progress(display: _Display, quiet: bool) -> Iterator[None]:
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import TextColumn as Text

    columns = (Text("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with terminal_bar(*columns, quiet=quiet) as display.bar:
        display.lines = display.bar is None and not quiet
        yield


def _quality(state: "State") -> str:
    if state.validation is None:
        return ""
    return f", {state.validation.psnr:.2f} dB, bicubic {state.validation.bicubic:.2f} dB"
