"""Signals before the first step and after the last: one line, an exit code, nothing lost."""

import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.trainings import ROOT, photographs, program
from ttsr_fast.cli.commands import app
from ttsr_fast.training import checkpoints, trainer
from ttsr_fast.training.signals import SIGNALS, Ended, signals_raise

each = pytest.mark.parametrize
BEFORE = "before the first step: nothing is lost, run the same command again"
# The program; it sends itself a signal when it imports a module.
INTERRUPTED = """
import os, sys
module, number = sys.argv[1], int(sys.argv[2])
sys.argv[:3] = ["ttsr-fast"]
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
from ttsr_fast.cli import main
main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


def advice(out):
    return f"resume from the last checkpoint with ttsr-fast train --out {out} --resume"


def test_signals_raise_and_handlers_come_back():
    handlers = [signal.getsignal(number) for number in SIGNALS]
    for number in SIGNALS:
        with pytest.raises(Ended) as caught, signals_raise():
            os.kill(os.getpid(), number)
        assert (caught.value.signal, str(caught.value)) == (number, signal.Signals(number).name)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


STAGES = [(trainer, x) for x in ("training_items", "make_accelerator", "Networks", "claimed")]


@each(("module", "name"), [*STAGES, (checkpoints, "write_bytes")])
@each("number", SIGNALS)
def test_before_the_first_step(data, tmp_path, monkeypatch, module, name, number):
    def end(*arguments, **options):
        os.kill(os.getpid(), number)
        raise AssertionError("the signal had no effect")

    monkeypatch.setattr(module, name, end)
    result = CliRunner().invoke(app, program(data, tmp_path / "out")[3:])
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert result.stderr == f"error: {signal.Signals(number).name} {BEFORE}\n"
    assert not (tmp_path / "out").exists()


def test_between_settings_and_first_step(data, tmp_path, monkeypatch):
    """The folder then holds a training, which needs --resume."""
    monkeypatch.setattr(trainer, "Log", lambda *_: os.kill(os.getpid(), 15))
    out = tmp_path / "out"
    command = f"ttsr-fast train --out {out} --resume"
    message = f"error: SIGTERM before the first step: nothing is lost, start with {command}\n"
    assert CliRunner().invoke(app, program(data, out)[3:]).stderr == message
    again = f"error: SIGTERM {BEFORE}\n"
    assert CliRunner().invoke(app, program(data, out, "--resume")[3:]).stderr.endswith(again)


@each("module", ["omegaconf", "torch", "accelerate"])
@each("number", SIGNALS)
def test_while_importing(data, tmp_path, module, number):
    arguments = program(data, tmp_path / "out")[3:]
    command = [sys.executable, "-c", INTERRUPTED, module, str(int(number)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    name = signal.Signals(number).name
    expected = (128 + number, "", f"error: {name} {BEFORE}\n")
    assert (result.returncode, result.stdout, result.stderr) == expected


def test_after_the_last_step(data, tmp_path, monkeypatch):
    """The checkpoint is saved; --resume writes the missing model."""
    out = tmp_path / "out"
    export = trainer.Trainer._export
    monkeypatch.setattr(trainer.Trainer, "_export", lambda self: os.kill(os.getpid(), 15))
    result = CliRunner().invoke(app, program(data, out, "--quiet")[3:])
    message = f"error: SIGTERM after step 3: {advice(out)}\n"
    assert (result.exit_code, result.stderr) == (143, message)
    monkeypatch.setattr(trainer.Trainer, "_export", export)
    result = CliRunner().invoke(app, program(data, out, "--quiet", "--resume")[3:])
    assert (result.exit_code, result.stderr) == (0, "")
    assert (out / trainer.MODELS[0]).exists()


def test_the_second_signal_is_one_line(data, tmp_path, monkeypatch):
    log_step = trainer.Trainer._log_step

    def twice(self):
        log_step(self)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "_log_step", twice)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, program(data, out)[3:])
    message = f"error: SIGINT after step 1: {advice(out)}\n"
    assert (result.exit_code, result.stderr) == (130, message)
