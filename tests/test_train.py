"""`ttsr-fast train`: help and last lines."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.trainings import ROOT, photographs, program
from ttsr_fast.cli.commands import app
from ttsr_fast.training.config import Config
from ttsr_fast.training.settings import explained
from ttsr_fast.training.trainer import MODELS

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


def test_the_file_to_use_is_printed(data, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, program(data, out, settings=("ema=0.9",))[3:])
    average, last = result.stdout.splitlines()[-2:]
    assert re.fullmatch(rf"{out}/model-ema.safetensors \(3 steps, .* s\)", average)
    advice = "(weights of the last step; for upscale and eval use model-ema.safetensors)"
    assert last == f"{out}/model.safetensors {advice}"
    assert {path.name for path in out.glob("*.safetensors")} == set(MODELS)
    before = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    again = CliRunner().invoke(app, ["train", "--out", str(out), "--resume"])
    assert (again.exit_code, again.stdout) == (0, "")
    assert again.stderr.endswith(f"nothing to resume in {out}: all 3 steps are done\n")
    after = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*"))}
    lock = out / "training.lock"
    assert {**after, lock: 0, out: 0} == {**before, lock: 0, out: 0}, "nothing is written"


@each("columns", ["80", "160"])
def test_help_explains_every_key(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = CliRunner().invoke(app, ["train", "--help"])
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.strip() for line in result.stdout.splitlines()]
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    text = " ".join(" ".join(rows).split())
    assert "<bool> Resume" not in text
    for _, _, keys in explained(Config()):
        for key in keys:
            assert any(row.startswith(f"{key.name}=") for row in rows)
            assert key.help in text


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
sys.argv[:2] = ["ttsr-fast"]
from ttsr_fast.cli import main
main()
"""


@each(
    ("package", "purpose"),
    [
        ("accelerate", "training needs accelerate"),
        ("omegaconf", "a configuration needs OmegaConf"),
        ("yaml", "a configuration needs PyYAML"),
    ],
)
def test_a_missing_package_is_one_line(data, tmp_path, package, purpose):
    command = [sys.executable, "-c", WITHOUT, package, *program(data, tmp_path / "out")[3:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    message = f"error: {purpose}: pip install 'ttsr-fast[train]'\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)
