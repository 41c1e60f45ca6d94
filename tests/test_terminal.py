"""What a person sees: the screen of a terminal after a command, and while it runs."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pyte
import pytest

from tests.test_cli import folder  # noqa: F401
from tests.trainings import ROOT

each = pytest.mark.parametrize
COMMAND = [sys.executable, "-m", "ttsr_fast"]


def screens(*arguments, columns=80, **environment):
    """The lines on a terminal after every change, blank ones left out."""
    screen = pyte.Screen(columns, 40)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    settings = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, **settings, **environment},
    )
    os.close(theirs)
    seen = []
    try:
        while data := os.read(ours, 2**16):
            stream.feed(data)
            seen.append([line.rstrip() for line in screen.display if line.strip()])
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return seen


@each("columns", [80, 160])
@each("environment", [{}, {"NO_COLOR": "1"}], ids=["colours", "none"])
def test_a_bar_leaves_nothing_but_the_results(folder, columns, environment):  # noqa: F811
    Path("lows").mkdir()
    for name in ("[red]a.png", "b.png"):
        Path("lows", name).write_bytes(Path("low.png").read_bytes())
    options = ("--ref", "ref.png", "--phases", "1")
    seen = screens("upscale", "lows", *options, columns=columns, **environment)
    first, second = seen[-1]
    assert first.startswith("lows_x4/[red]a_x4.png (28 x 24, ")
    assert second.startswith("lows_x4/b_x4.png (28 x 24, ")
    bars = [line for lines in seen for line in lines if "/2 0:00:" in line]
    assert bars and max(map(len, bars)) <= columns
    assert any("━" in line for line in bars) == (not environment)


def test_one_image_begins_with_an_empty_bar(folder):  # noqa: F811
    seen = screens("upscale", "low.png", "--ref", "ref.png", "--phases", "1", NO_COLOR="1")
    assert [line.split()[0] for line in seen[-1]] == ["low_x4.png"]
    bars = [lines[0] for lines in seen if lines and "0:00:0" in lines[0]]
    assert bars and "━" not in bars[0]


@each("command", ["upscale", "train"])
@each("columns", [80, 160])
def test_help_fits(command, columns):
    (*_, lines) = screens(command, "--help", columns=columns)
    assert max(map(len, lines)) <= columns and not any("<bool>" in line for line in lines)
