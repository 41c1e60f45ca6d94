"""The benchmark of the whole module: its gates, its rows, its stages."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ttsr_fast import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import model
import model_runs
import report
import text
from gate import WrongResult
from model_runs import Subject
from sizes import Size

PAIR = Size((4, 5), (16, 20))
SHORT = ["--device", "cpu", "--quick", "--seconds", "0.001", "--no-memory"]
IMAGES = ["--pair", "4x5:16x20", "--patch", "4x4", "--batch", "2"]
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmarks set it for the libraries they load


# --- the gates ---


@each("size", [Size((13, 17), (14, 12)), Size((6, 20), (9, 21)), Size((5, 4), (7, 6))], ids=str)
def test_windows_hold_what_the_oracle_gives(monkeypatch: pytest.MonkeyPatch, size: Size) -> None:
    monkeypatch.setattr(model, "SIDE", 8)
    maps, _ = model_runs.make_features(size)
    whole = reference.search_transfer(*(x.double() for x in maps))
    parts = model.windows(maps)
    for place, truth in parts:
        for x, y, stride in zip(whole, truth, model.STRIDES, strict=True):
            torch.testing.assert_close(model.cut(x, place, stride), y, rtol=0, atol=1e-12)
    corners = {tuple(first for first, _ in parts[0][0]), tuple(last for _, last in parts[-1][0])}
    assert corners == {(0, 0), size.query}

    result = reference.search_transfer(*maps)
    assert model.check_windows(parts, result)["checked_queries"] >= 20
    result[2][0, 0, 0, 0] += 1
    with pytest.raises(WrongResult, match="T_lv2 is off by"):
        model.check_windows(parts, result)


@each("operation", model.MODEL)
def test_model_is_held_to_float64(operation: str) -> None:
    truth = Subject("reference", operation, PAIR, dtype=torch.float64).run()
    check = model.model_check(operation, truth)
    result = Subject("torch", operation, PAIR).run()
    assert check(result)["max_relative_error"] < 1e-2
    with pytest.raises(WrongResult, match=r"(sr|loss) is off by"):
        check((result[0] + 1e-2, *result[1:]))
    with pytest.raises(WrongResult, match="is off by"):
        check((*result[:-1], 1.1 * result[-1]))


def test_training_step_trains() -> None:
    subject = Subject("torch", "training step", replace(PAIR, batch=2))
    losses = [subject.run()[0].item() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_stages_are_those_of_the_operation() -> None:
    for name in ("torch", "reference"):
        forward = Subject(name, "TTSR", PAIR).stages()
        assert list(forward) == ["LTE", "search", "transfer", "MainNet"]
        subject = Subject(name, "training step", PAIR)
        assert list(subject.stages()) == [*forward, "backward", "Adam"]
        assert all(seconds >= 0 for seconds in forward.values())
        assert not subject.model.MainNet._forward_hooks, "hooks are taken off again"


# --- the run ---


def test_run_writes_results_a_plot_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PAIRS", 1000)
    monkeypatch.delenv("COLUMNS", raising=False)
    options = [*SHORT, *IMAGES, "--backends", "torch", "reference", "--out", str(tmp_path)]
    assert model.main([*options, "--sizes", "7x8", "2*4x5"]) == 0
    data = json.loads((tmp_path / "model.json").read_text())
    cases = {(case["operation"], case["title"]): case["rows"] for case in data["cases"]}
    assert list(cases) == [
        ("SearchTransfer", "2 of 4x5"),
        ("with gradients", "2 of 4x5"),
        ("SearchTransfer", "7x8"),
        ("TTSR", "LR 4x5, reference 16x20"),
        ("training step", "LR 2 of 4x4"),
    ]
    assert all(row["status"] == "ok" for rows in cases.values() for row in rows.values())
    checked = [rows["torch"].get("checked_queries") for rows in cases.values()]
    assert checked == [None, None, 3 * 56, None, None]
    with Image.open(tmp_path / "model.png") as image:
        image.verify()
    printed = capsys.readouterr().out
    assert "Drop-in and original form" in printed
    for operation, title in cases:  # a pipe has no width
        assert f"\n{operation}, {title} " in printed

    assert report.main([str(tmp_path / "model.json")]) == 0
    printed = capsys.readouterr().out
    assert "|  | size | torch | original | faster | error | checked |" in printed
    assert "|  |  | LTE | search | transfer | MainNet | backward | Adam |" in printed
    rows = cases["SearchTransfer", "7x8"]
    faster = rows["reference"]["median_s"] / rows["torch"]["median_s"]
    assert f"| {text.digits(faster)} x |" in printed


def test_wrong_result_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(model_runs.SearchTransfer):
        def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
            score, *textures = super().forward(*maps)
            return score + 1e-3, *textures

    monkeypatch.setattr(model_runs, "SearchTransfer", Wrong)
    options = [*SHORT, *IMAGES, "--backends", "torch", "--out", str(tmp_path)]
    assert model.main([*options, "--sizes", "4x5"]) == 1
    row = json.loads((tmp_path / "model.json").read_text())["cases"][0]["rows"]["torch"]
    assert (row["status"], row["wrong"]) == ("failed", True) and "median_s" not in row


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    args = model.parse(SHORT)
    huge = Size.parse("270x480")
    monkeypatch.setattr(model.memory, "available_bytes", lambda device: 64 << 30)
    reason = model.why_not("reference", "SearchTransfer", huge, [], args)
    assert reason == "does not fit (needs 69.6 GB)"
    assert model.why_not("cpp", "SearchTransfer", huge, [], args) is None

    case = {"operation": "SearchTransfer", "pairs": 100}
    before = [case | {"rows": {name: {"median_s": 7.0} for name in model_runs.VARIANTS}}]
    size = Size((1, 10), (1, 100))
    reason = model.why_not("torch", "SearchTransfer", size, before, args)
    assert reason == "skipped (estimated 70.0 s)"
    assert model.why_not("torch", "with gradients", size, before, args) is None
    assert model.why_not("cpp", "SearchTransfer", size, before, args) is None


@each(
    "options, message",
    [
        (["--batch", "0"], "must be positive"),
        (["--pair", "300x300:1200x1200"], "--pair is too large"),
        (["--backends", "default-graph"], "it needs a GPU"),
    ],
)
def test_what_makes_no_sense(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        model.parse(["--device", "cpu", *options])
    assert message in capsys.readouterr().err
