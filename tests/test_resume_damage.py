"""Damaged and missing checkpoints: messages, and the checkpoint to resume from."""

import os

import pytest
import torch
from typer.testing import CliRunner

from tests.test_resume import assert_same_state
from tests.trainings import configuration, photographs, program
from ttsr_fast.cli.commands import app
from ttsr_fast.training.checkpoints import BEST, LAST
from ttsr_fast.training.config import SETTINGS
from ttsr_fast.training.trainer import MODELS, Trainer, train

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


def settings(data):
    return ("num_epochs=2", f"validation={data}")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training of two epochs with validation images."""
    out = tmp_path_factory.mktemp("whole")
    train(configuration(data, out, *settings(data)))
    return out


@pytest.fixture
def half(data, tmp_path):
    """The same training after its first epoch, with a last and a best checkpoint."""
    out = tmp_path / "half"
    train(configuration(data, out, *settings(data), "num_epochs=1"))
    return out


def flipped(path):
    """Content with one flipped bit in the weights."""
    saved = torch.load(path, weights_only=True)["state_dict"]["MainNet.conv12.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(saved.numpy().tobytes()) + 5] ^= 64
    return bytes(content)


def replace(path, content):
    """Write a new file: another name may share the old one."""
    path.unlink()
    path.write_bytes(content)


DAMAGES = [flipped, lambda path: path.read_bytes()[:-100], lambda path: b""]


@each("damage", DAMAGES, ids=["bit", "torn", "empty"])
def test_a_damaged_checkpoint_names_the_whole_one(data, half, whole, damage):
    replace(half / LAST, damage(half / LAST))
    before = {path: path.read_bytes() for path in half.iterdir() if path.is_file()}
    arguments = ["train", "--out", str(half), "--resume", "-q", "--set", "num_epochs=2"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: cannot read {half / LAST}: it is damaged")
    assert line.endswith(
        f"; {BEST} is whole (after epoch 1): remove {LAST}, and --resume continues from there"
    )
    assert {path: path.read_bytes() for path in half.iterdir() if path.is_file()} == before
    (half / LAST).unlink()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert_same_state(half, whole)


def test_without_a_whole_checkpoint_the_folder_is_refused(data, half):
    for name in (LAST, BEST):
        replace(half / name, b"torn")
    with pytest.raises(RuntimeError, match=rf"no whole {BEST} either: start again in another fold"):
        train(configuration(data, half, *settings(data)), resume=True)
    (half / BEST).unlink()
    with pytest.raises(RuntimeError, match=rf"no whole {BEST} either: start again in another fold"):
        train(configuration(data, half, *settings(data)), resume=True)
    (half / LAST).unlink()  # only the model is left
    with pytest.raises(ValueError, match=rf"holds a training already \({MODELS[0]}\)"):
        train(configuration(data, half, *settings(data)), resume=True)


def test_the_best_takes_the_place_of_a_last_that_is_gone(data, half, whole, caplog):
    (half / LAST).unlink()
    state = train(configuration(data, half, *settings(data)), resume=True)
    assert (state.epoch, state.step) == (2, 6)
    assert f"{half / LAST} is gone: resuming from {BEST}" in caplog.messages
    assert_same_state(half, whole)


def test_a_checkpoint_of_another_folder_replaces_no_training(data, half, whole):
    before = (half / LAST).read_bytes()
    for name in (LAST, BEST, SETTINGS):
        with pytest.raises(ValueError, match=r"holds a training already \("):
            train(configuration(data, half, *settings(data)), resume=whole / LAST)
        (half / name).rename(half.parent / name)
    assert (half.parent / LAST).read_bytes() == before


def test_resuming_from_the_best_is_possible(data, half, whole):
    train(configuration(data, half, *settings(data)), resume=half / BEST)
    assert_same_state(half, whole)


@each(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "is no whole checkpoint of a training: step"),
        (lambda s: s.update(config=3), "is no whole checkpoint of a training: config"),
        (lambda s: s["config"].pop("loss"), "is no whole checkpoint of a training: config"),
        (lambda s: s.update(best="x"), "is no whole checkpoint of a training: best"),
        (lambda s: s["config"].update(run={}), "is of another training, with run.seed None, not 0"),
        (lambda s: s["rng"].pop("torch"), "does not hold the state of this training: 'torch'"),
        (
            lambda s: s["state_dict"].popitem(),
            "does not hold the state of this training: Error.* in loading state_dict",
        ),
        (
            lambda s: s["optimizer"].update(param_groups=[]),
            "does not hold the state of this training: loaded state dict has a different number",
        ),
        (
            lambda s: s.update(more=torch.zeros(1).expand(2**60)),
            "is no whole checkpoint of a training: its tensors lack values",
        ),
    ],
)
def test_missing_and_wrong_content_is_named(data, half, change, message):
    saved = torch.load(half / LAST, weights_only=True)
    change(saved)
    (half / LAST).unlink()
    torch.save(saved, half / LAST)
    with pytest.raises(ValueError, match=message) as caught:
        train(configuration(data, half, *settings(data)), resume=True)
    assert str(caught.value).startswith(str(half / LAST))
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_replace_no_checkpoint(data, tmp_path, monkeypatch):
    """A finite loss can have a gradient that overflows."""
    log_step = Trainer._log_step

    def overflow(self):
        log_step(self)
        if self.state.step == 3:
            self.networks.ttsr.MainNet.conv12.bias.data[1] = float("inf")

    monkeypatch.setattr(Trainer, "_log_step", overflow)
    message = "^weight MainNet.conv12.bias is not finite after step 3, and the training stops; "
    with pytest.raises(RuntimeError, match=message):
        train(configuration(data, tmp_path, "save_steps=2"))
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 2
    assert not (tmp_path / MODELS[0]).exists()


# --- nothing to resume -------------------------------------------------------------------------


def test_resume_in_a_new_folder_starts_with_a_message(data, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, program(data, out, "--resume")[3:])
    message = f"nothing to resume in {out}: the training starts from the beginning\n"
    assert (result.exit_code, result.stderr) == (0, message)
    assert (out / MODELS[0]).exists()
    quiet = program(data, tmp_path / "quiet", "--resume", "--quiet")[3:]
    result = CliRunner().invoke(app, quiet)
    assert (result.exit_code, result.output) == (0, "")


def test_the_start_is_logged(data, tmp_path, caplog):
    train(configuration(data, tmp_path), resume=True)
    assert f"{tmp_path} holds no checkpoint yet: starting from the beginning" in caplog.messages


@each("arguments", [[], ["--out", "nowhere"]])
def test_resume_of_nothing_needs_a_preset(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", "--resume", *arguments])
    missing = (
        "nothing to resume: there is no nowhere/training.yaml"
        if arguments
        else "--resume needs --out, the folder of the training"
    )
    message = (
        f"{missing}; to start a training, name a preset (tiny, ttsr, ttsr-rec) or a file as well"
    )
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    assert os.listdir(tmp_path) == []
