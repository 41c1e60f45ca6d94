"""`ttsr-fast eval`: what it prints and writes, in one process and in two, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.processes import LIMIT
from tests.sets import save_cufed5
from ttsr_fast.cli.commands import app
from ttsr_fast.datasets import find_pairs
from ttsr_fast.evaluation import evaluate
from ttsr_fast.images import Image
from ttsr_fast.model import TTSR, save_model

ROOT = Path(__file__).parent.parent
each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTSR((1, 1, 1, 1), 4)


def run_eval(*arguments):
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
    """The current folder, with a set of pairs and weights."""
    monkeypatch.chdir(tmp_path)
    save_cufed5(tmp_path / "CUFED5")
    save_model(model, "tiny.pth")
    return tmp_path


CUFED5 = ("CUFED5", "--layout", "cufed5")


def cells(output):
    return [line.split() for line in output.splitlines() if line.strip() and "─" not in line]


def test_eval_prints_and_writes_the_table(folder, model):
    pairs = find_pairs("CUFED5", "cufed5")
    table = evaluate(model, pairs, protocol="c2")
    files = ("--csv", "a.csv", "--json", "a.json", "--pictures", "drawings")
    result = run_eval(*CUFED5, "--weights", "tiny.pth", "--protocol", "c2", *files)
    assert (result.exit_code, result.stderr) == (0, "")
    head, *rows, mean, last = cells(result.stdout)
    assert head == ["image", "PSNR", "SSIM", "references"]
    assert rows == [[r.name, f"{r.psnr:.3f}", f"{r.ssim:.4f}", *r.references] for r in table.rows]
    assert mean == ["mean", f"{table.psnr:.3f}", f"{table.ssim:.4f}"]
    assert " ".join(last).startswith("ttsr, protocol c2, references: first: 3 images, 0.")
    assert json.loads(Path("a.json").read_text())["psnr"] == table.psnr
    assert len(Path("a.csv").read_text().splitlines()) == 5
    assert len(list(Path("drawings").iterdir())) == 3


def test_eval_takes_references_and_mode(folder):
    pairs = find_pairs("CUFED5", "cufed5", references=[2, 1])
    for options, mode in (
        ((), "all"),
        (("--mode", "first"), "first"),
        (("--mode", "stack"), "stack"),
    ):
        result = run_eval(*CUFED5, "--method", "detail", "--references", "2,1", *options)
        table = evaluate("detail", pairs, references=mode)
        assert cells(result.stdout)[-2][1] == f"{table.psnr:.3f}"


def test_eval_lists_what_it_skips(folder):
    Path("CUFED5/001_0.png").write_bytes(b"")
    result = run_eval(*CUFED5, "--method", "bicubic", "--skip", "--csv", "a.csv")
    assert result.exit_code == 1
    assert "the mean leaves out 1 of 3 images, which failed" in result.stdout
    expected = r"error: cannot read CUFED5/001_0\.png: .*\nerror: 1 of 3 images failed\n"
    assert re.fullmatch(expected, result.stderr)
    assert len(Path("a.csv").read_text().splitlines()) == 5


def test_eval_says_that_results_are_equal(folder):
    Path("flat").mkdir()
    Image(np.full((48, 48, 3), 9, np.uint8)).save("flat/a.png")
    Image(np.full((48, 48, 3), 9, np.uint8)).save("flat/b.png")
    result = run_eval("flat", "--layout", "urban100", "--method", "bicubic")
    assert cells(result.stdout)[1] == ["a", "inf", "1.0000"]
    assert "the mean PSNR leaves out 2 results equal to the truth" in result.stdout


def test_quiet_says_nothing(folder):
    assert run_eval(*CUFED5, "--method", "bicubic", "--quiet").output == ""


@each(
    ("arguments", "message"),
    [
        (CUFED5, "either --weights or --method is needed, and not both"),
        ((*CUFED5, "--method", "bicubic", "--weights", "tiny.pth"), "either --weights .*"),
        (("none", "--layout", "cufed5", "--method", "bicubic"), "cannot read none: no such folder"),
        (("drawings", "--layout", "cufed5", "--method", "bicubic"), ".*drawings.*"),
        (
            (*CUFED5, "--method", "bicubic", "--references", "one"),
            "--references must be numbers.*one",
        ),
        (
            (*CUFED5, "--method", "bicubic", "--references", "3"),
            "CUFED5/000_0.png has no reference 000_3.*first of 3.*",
        ),
        (
            (*CUFED5, "--method", "bicubic", "--references", "6"),
            "references must be among 1 to 5.*",
        ),
        (
            ("CUFED5", "--method", "bicubic"),
            "--references FOLDER is needed for --layout folders",
        ),
        ((*CUFED5, "--weights", "none.pth"), "cannot read none.pth: no such file"),
        (
            (*CUFED5, "--method", "bicubic", "--csv", "no/a.csv"),
            "cannot write no/a.csv: there is.*",
        ),
        ((*CUFED5, "--method", "detail", "--max-memory", "1M"), "000: max_memory .* is enough"),
        (
            (*CUFED5, "--method", "bicubic", "--device", "tpu"),
            "--device must be one of .*, got tpu",
        ),
        ((*CUFED5, "--method", "magic"), "--method must be one of detail, bicubic, got magic"),
    ],
    ids=str,
)
def test_bad_input_is_refused(folder, arguments, message):
    Path("drawings").mkdir()
    before = sorted(folder.rglob("*"))
    result = run_eval(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert sorted(folder.rglob("*")) == before


def test_torchrun_prints_the_table_of_one_process(folder):
    """Ten images; only the line with the seconds may differ."""
    save_cufed5(folder / "CUFED5", 10, 1)
    options = (*CUFED5, "--weights", "tiny.pth", "--csv", "a.csv")
    alone = run_eval(*options).stdout.splitlines()
    content = Path("a.csv").read_text()
    Path("a.csv").unlink()
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = [sys.executable, *launch, "-m", "ttsr_fast", "eval", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    assert result.returncode == 0, result.stderr
    assert len(alone) > 12
    assert result.stdout.splitlines()[:-1] == alone[:-1]
    quality = [line.split(",")[:3] for line in Path("a.csv").read_text().splitlines()]
    assert quality == [line.split(",")[:3] for line in content.splitlines()]
