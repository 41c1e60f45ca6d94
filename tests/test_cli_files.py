"""Files that a command must not write to, and names that reach the terminal."""

import io
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.test_cli import LOW, REF, assert_refused, folder, names, program, run  # noqa: F401
from tests.test_signals import INTERRUPTED
from tests.trainings import ROOT
from ttsr_fast.cli import common
from ttsr_fast.cli.commands import app
from ttsr_fast.images import Image, read_image

each = pytest.mark.parametrize
ODD = "\x1b]0;title\x07[red]\u202ea\nb\udcff"
SHOWN = r"\x1b]0;title\x07[red]\u202ea\nb\xff"


@pytest.fixture
def linked(folder):  # noqa: F811  # the fixture above
    Path("soft.png").symlink_to("low.png")
    Path("hard.png").hardlink_to("ref.png")
    Path("sub").mkdir()
    return folder


@each("output", ["low.png", "ref.png", "soft.png", "hard.png", "sub/../ref.png", "w.pth"])
def test_match_writes_over_none_of_its_inputs(linked, output):
    Path("w.pth").write_bytes(b"weights")
    before = {name: Path(name).read_bytes() for name in names(linked)}
    options = ("--weights", "w.pth") if output == "w.pth" else ()
    result = run("match", "low.png", "--ref", "ref.png", "-o", output, *options)
    assert_refused(result, f"cannot write {output}: it is an input")
    assert {name: Path(name).read_bytes() for name in names(linked)} == before


@each("output", ["soft.png", "hard.png", "sub/../ref.png"])
def test_upscale_writes_over_none_of_its_inputs(linked, output):
    before = {name: Path(name).read_bytes() for name in names(linked)}
    result = run("upscale", "low.png", "--ref", "ref.png", "-o", output)
    assert_refused(result, f"cannot write {output}: it is an input or another result")
    assert {name: Path(name).read_bytes() for name in names(linked)} == before


@each(
    ("options", "message"),
    [
        (("--csv", "hr/a.png"), "cannot write hr/a.png: it is an input"),
        (("--json", "hard.png"), "cannot write hard.png: it is an input"),
        (("--csv", "list.txt"), "cannot write list.txt: it is an input"),
        (("--csv", "x", "--json", "sub/../x"), "--csv and --json must be two files"),
        (("--pictures", "hr"), "cannot write hr/a.png: it is an input; take another folder"),
        (("--pictures", "drawn"), "cannot write drawn/a.png: it is an input; take another folder"),
    ],
)
def test_eval_writes_over_none_of_its_inputs(linked, options, message):
    for name in ("hr", "drawn"):
        Path(name).mkdir()
    for name in ("a", "b"):
        Image(REF).save(f"hr/{name}.png")
    Path("hard.png").unlink()
    Path("hard.png").hardlink_to("hr/b.png")
    Path("drawn/a.png").hardlink_to("hr/b.png")
    Path("list.txt").write_text("a.png b.png\nb.png a.png\n")
    before = {name: Path(name).read_bytes() for name in names(linked)}
    layout = ("--layout", "urban100", "--references", "list.txt", "--method", "bicubic")
    assert_refused(run("eval", "hr", *layout, *options), message)
    assert {name: Path(name).read_bytes() for name in names(linked)} == before


def test_a_result_too_large_for_its_format_is_png_or_refused(folder, monkeypatch):  # noqa: F811
    Image(np.zeros((1, 4096, 3), np.uint8)).save("wide.webp")
    result = run("upscale", "wide.webp", "--ref", "ref.png", "--phases", "1", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert read_image("wide_x4.png").size == (4, 16384)
    monkeypatch.setattr("ttsr_fast.cli.batch.upscale", None)  # it is not called
    result = run("upscale", "wide.webp", "--ref", "ref.png", "-o", "a.webp")
    assert_refused(result, "cannot write a.webp: WEBP holds 16383 pixels .*; use .png")


# --- names on the terminal ------------------------------------------------------------------------


def test_names_are_escaped_in_every_line_of_output(folder):  # noqa: F811
    for name in ("set", "refs"):
        Path(name).mkdir()
        Image(REF).save(f"{name}/{ODD}.png")
        Path(name, f"{ODD}2.png").write_bytes(b"")
    for command in (
        ("upscale", "set", "--ref", "ref.png", "--phases", "1"),
        ("eval", "set", "--references", "refs", "--method", "bicubic", "--skip", "--csv", "a.csv"),
    ):
        done = run(*command)
        assert done.exit_code == 1
        assert f"error: cannot read set/{SHOWN}2.png: it is no PNG, TIFF" in done.stderr
        assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
        assert SHOWN.replace("[red]", "") in done.stdout.replace("[red]", "").replace("\n", "")
    assert f"\n{SHOWN}," in Path("a.csv").read_text(encoding="utf-8")


def test_a_reference_that_is_too_small_is_named_in_one_line(folder):  # noqa: F811
    Image(REF[:11]).save(f"{ODD}.png")
    result = run("upscale", "low.png", "--ref", f"{ODD}.png")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {SHOWN}.png must have at least one patch of 12x12")
    assert result.stderr.count("\n") == 1


def test_a_warning_is_one_harmless_line(folder):  # noqa: F811
    Image(LOW, None, b"profile").save("low.png")
    command = ("upscale", "low.png", "--ref", "ref.png", "-o", f"{ODD}.bmp")
    message = "BMP holds no colour profile, which is left out; .png keeps it"
    done = program(*command)
    assert (done.returncode, done.stderr) == (0, f"warning: {SHOWN}.bmp: {message}\n")
    done = program(*command, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@each("stream", [">&-", "> /dev/full", "| true", "2>&-"])
def test_results_do_not_depend_on_who_reads_the_lines(folder, stream):  # noqa: F811
    (folder / "lows").mkdir()
    for number in range(3):
        Image(LOW).save(folder / "lows" / f"{number}.png")
    command = f"{sys.executable} -m ttsr_fast upscale lows --ref ref.png --phases 1 {stream}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(folder.glob("lows_x4/*_x4.png"))) == 3


@each("place", ["reference", "image"])
def test_a_pipe_is_refused_and_not_waited_for(folder, place):  # noqa: F811
    os.mkfifo(folder / "pipe.png")
    names = ["pipe.png", "ref.png"] if place == "image" else ["low.png", "pipe.png"]
    Image(LOW).save(folder / "low.png")
    done = program("upscale", names[0], "--ref", names[1], "-o", "out.png", "--resume")
    message = "error: cannot read pipe.png: it is no regular file\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_names_are_no_markup_in_the_bar(monkeypatch):
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(common, "Console", lambda stderr: terminal)
    with common.progress_bar("upscaling", 2, quiet=False) as (_, tell):
        tell(f"{ODD}:smile:[/]")("search", 1, 2)
    assert f"{SHOWN}:smile:[/]: search 1/2" in stream.getvalue()
    assert "\x1b]0" not in stream.getvalue()
    assert "\u202e" not in stream.getvalue()


def test_lines_fit_the_encoding_of_the_stream(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    common.say("\U0001f600 caf\xe9 \x1b[2J")
    sys.stdout.flush()
    assert raw.getvalue().decode("ascii") == rf"\U0001f600 caf\xe9 \x1b[2J{os.linesep}"


def test_tables_fit_the_encoding_of_the_stream(folder, monkeypatch):  # noqa: F811
    Path("set").mkdir()
    Image(REF).save("set/\U0001f600.png")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    command = ["eval", "set", "--layout", "urban100", "--method", "bicubic"]
    app(command, standalone_mode=False)
    sys.stdout.flush()
    assert b" \\U0001f600 " in raw.getvalue()


def test_log_messages_are_lines_of_output(capsys):
    record = logging.makeLogRecord({"levelname": "WARNING", "msg": "%s: x", "args": ("a\n\x1b",)})
    common.OneLineHandler().emit(record)
    assert capsys.readouterr() == ("", "warning: a\\n\\x1b: x\n")


@each("command", ["match", "eval"])
def test_ctrl_c_is_one_line(folder, monkeypatch, command):  # noqa: F811
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    name = {"match": "upscaling.upscale", "eval": "evaluation.evaluate"}[command]
    monkeypatch.setattr(f"ttsr_fast.{name}", interrupted)
    options = {"match": ("low.png", "--ref", "ref.png", "-o", "drawing.png")}
    options["eval"] = (".", "--references", ".", "--method", "bicubic")
    result = run(command, *options[command])
    assert (result.exit_code, result.output) == (130, "error: interrupted\n")


@each(
    ("module", "where"),
    [
        ("typer", ": nothing has been done"),
        ("torch", " before the first image"),
        ("ttsr_fast.upscaling", " before the first image"),
    ],
)
def test_ctrl_c_while_modules_are_imported(folder, module, where):  # noqa: F811
    arguments = ("upscale", "low.png", "--ref", "ref.png")
    command = [sys.executable, "-c", INTERRUPTED, module, str(int(signal.SIGINT)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    expected = (130, "", f"error: interrupted{where}\n")
    assert (result.returncode, result.stdout, result.stderr) == expected
