"""Interrupted and resumed trainings: signals, kills, full disks, checkpoints that do not fit."""

import errno
import os
import re
import signal
import time

import pytest
import torch
from typer.testing import CliRunner

from tests.trainings import (
    FULL,
    configuration,
    not_finite_in_the_last,
    photographs,
    program,
    start,
)
from ttsr_fast.cli.commands import app
from ttsr_fast.model import TTSR, load_model
from ttsr_fast.training import trainer as trainer_module
from ttsr_fast.training.checkpoints import BEST, LAST
from ttsr_fast.training.config import load_config
from ttsr_fast.training.items import FILES
from ttsr_fast.training.monitor import Validation
from ttsr_fast.training.trainer import MODELS, Trainer, train

each = pytest.mark.parametrize
LIMIT = 60.0  # seconds
LONG = ("num_epochs=2", "save_steps=3", "crops_per_photo=8", "num_workers=1")  # 16 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("data") / "photographs")


class Stop(Exception):
    """Stands for a kill in this process."""


def stop_at(step):
    def progress(state):
        if state.step == step and state.done:
            raise Stop

    return progress


def assert_same_state(folder, other):
    """Equal last checkpoints, apart from the names of folders."""
    x, y = (torch.load(path / LAST, weights_only=True) for path in (folder, other))
    x["config"]["run"]["out"] = y["config"]["run"]["out"]
    assert_equal(x, y)
    for name in MODELS:
        if (folder / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes()


def assert_equal(x, y, where="state"):
    assert type(x) is type(y), where
    if isinstance(x, dict):
        assert x.keys() == y.keys(), where
        for key in x:
            assert_equal(x[key], y[key], f"{where}.{key}")
    elif isinstance(x, list | tuple):
        assert len(x) == len(y), where
        for number, (a, b) in enumerate(zip(x, y, strict=True)):
            assert_equal(a, b, f"{where}[{number}]")
    elif isinstance(x, torch.Tensor):
        assert torch.equal(x, y), where
    else:
        assert x == y, where


# --- resuming ---------------------------------------------------------------------------------


@each(
    ("settings", "steps"),
    [(("num_epochs=2",), 2), (("num_epochs=2",), 3), ((*FULL, "num_epochs=1"), 4)],
    ids=["in mid-epoch", "after an epoch", "all losses"],
)
def test_an_interrupted_training_resumes_bit_exactly(data, tmp_path, settings, steps):
    """With steps lost since the last checkpoint, and with both networks."""
    settings = (*settings, "save_steps=2")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(configuration(data, whole, *settings))
    with pytest.raises(Stop):
        train(configuration(data, parts, *settings), progress=stop_at(steps + 1))
    torch.manual_seed(99)  # as in another process
    state = train(configuration(data, parts, *settings), resume=True)
    assert (state.step, state.signal) == (state.total, 0)
    assert_same_state(parts, whole)


def test_a_longer_training_resumes_from_a_shorter_one(data, tmp_path):
    settings = ("ema=0.9", "decay=1", "tpl_w=1")
    train(configuration(data, tmp_path / "long", *settings, "num_epochs=2"))
    train(configuration(data, tmp_path / "short", *settings, "num_epochs=1"))
    again = configuration(data, tmp_path / "again", *settings, "num_epochs=2")
    train(again, resume=tmp_path / "short" / LAST)
    assert_same_state(tmp_path / "again", tmp_path / "long")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A training without interruption."""
    out = tmp_path_factory.mktemp("whole")
    train(configuration(data, out, *LONG))
    return out


def test_a_killed_program_resumes_bit_exactly(data, tmp_path, whole):
    """SIGKILL in the middle of an epoch, with a loader process."""
    killed = tmp_path / "killed"
    process = start(program(data, killed, settings=LONG))
    wait_for(killed / LAST, process)
    process.kill()
    process.communicate(timeout=LIMIT)
    assert torch.load(killed / LAST, weights_only=True)["done"] > 0
    assert not (killed / MODELS[0]).exists()
    train(configuration(data, killed, *LONG), resume=True)
    assert_same_state(killed, whole)


def test_a_terminated_program_saves_and_resumes_bit_exactly(data, tmp_path, whole):
    ended = tmp_path / "ended"
    process = start(program(data, ended, settings=LONG))
    wait_for(ended / LAST, process)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does, its loader too
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 143, errors
    step = torch.load(ended / LAST, weights_only=True)["step"]
    command = f"ttsr-fast train --out {ended} --resume"
    message = f"error: SIGTERM after step {step}, which is saved: resume with {command}"
    assert errors.splitlines()[-1] == message
    assert step < 16
    assert "model.safetensors" not in output
    load_model(ended / MODELS[0])  # the current generator
    state = train(configuration(data, ended, *LONG), resume=True)
    assert state.step == 16
    assert_same_state(ended, whole)


@each("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_end(data, tmp_path, number):
    handler = signal.getsignal(number)

    def progress(state):
        if state.step == 2:
            os.kill(os.getpid(), number)

    state = train(configuration(data, tmp_path / "out"), progress=progress)
    assert (state.signal, state.step) == (number, 2)
    assert torch.load(tmp_path / "out" / LAST, weights_only=True)["step"] == 2
    assert signal.getsignal(number) is handler


def test_the_second_signal_ends_the_training(data, tmp_path):
    def progress(state):
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            train(
                configuration(data, tmp_path / "out"), progress=lambda s: (progress(s), progress(s))
            )
    finally:
        signal.signal(signal.SIGINT, before)


# --- results ----------------------------------------------------------------------------------


def test_last_and_best_are_kept(data, tmp_path, monkeypatch):
    scores = iter((11.0, 13.0, 12.0))
    monkeypatch.setattr(
        "ttsr_fast.training.trainer.validate", lambda *_, **__: Validation(next(scores), 10.0)
    )
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    state = train(configuration(data, out, "num_epochs=3", f"validation={data}"))
    epochs = {x: torch.load(out / x, weights_only=True)["epoch"] for x in (LAST, BEST)}
    assert epochs == {LAST: 3, BEST: 2}
    assert (state.best, state.validation.psnr) == (13, 12)
    assert (out / "notes.txt").read_text() == "mine"
    names = {path.name for path in out.iterdir()}
    assert names == {LAST, BEST, MODELS[0], "training.yaml", FILES, "logs", "notes.txt"}


def test_checkpoints_and_exports_are_models(data, tmp_path):
    train(configuration(data, tmp_path, *FULL, "adv_w=0", "num_epochs=1"))
    saved = torch.load(tmp_path / LAST, weights_only=True)
    expected = {LAST: saved["state_dict"], MODELS[0]: saved["state_dict"]}
    average = {name: x for name, x in saved["ema"].items() if name != "n_averaged"}
    expected[MODELS[1]] = {name.removeprefix("module."): x for name, x in average.items()}
    for name, tensors in expected.items():
        assert_equal(dict(load_model(tmp_path / name).state_dict()), dict(tensors))


# --- errors -----------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_former_checkpoint(data, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    def progress(state):
        if state.step == 3:
            monkeypatch.setattr("ttsr_fast.files.os.fsync", full)

    last = re.escape(str(out / LAST))
    message = f"cannot write {last}: the disk is full; the one before it is still there$"
    with pytest.raises(OSError, match=message):
        train(configuration(data, out, "save_steps=2", "num_epochs=2"), progress=progress)
    monkeypatch.undo()
    assert torch.load(out / LAST, weights_only=True)["step"] == 2
    assert not list(out.glob(".*"))
    train(configuration(data, tmp_path / "whole", "save_steps=2", "num_epochs=2"))
    train(configuration(data, out, "save_steps=2", "num_epochs=2"), resume=True)
    assert_same_state(out, tmp_path / "whole")


def test_a_folder_with_a_training_is_refused(data, tmp_path):
    for name in (LAST, BEST, *MODELS, "training.yaml"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("precious")
        with pytest.raises(ValueError, match=re.escape(f"{out} holds a training already ({name})")):
            train(configuration(data, out))
        assert (out / name).read_text() == "precious"


@each(
    ("settings", "message"),
    [
        (("n_feats=8",), "model.n_feats 4, not 8"),
        (("num_res_blocks=1+1+1+2",), r"model.num_res_blocks \[1, 1, 1, 1\], not \[1, 1, 1, 2\]"),
        (("adv_w=1", "size=32"), "data.size 16, not 32; a discriminator False, not True"),
        (("ema=0.9",), r"an average of weights \(optim.ema\) False, not True"),
        (("lr_rate_lte=0",), "optim.lr_rate_lte 0.0001, not 0.0"),
        (("lr_rate=1e-4", "decay=3"), "optim.lr_rate 0.001, not 0.0001; optim.decay None, not 3"),
        (("run.seed=1",), "run.seed 0, not 1"),
        (("batch_size=3",), "data.batch_size 2, not 3"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(saved, data, tmp_path, settings, message):
    before = saved.read_bytes()
    with pytest.raises(ValueError, match=f"{saved} is of another training, with {message}$"):
        train(configuration(data, tmp_path / "new", *settings), resume=saved)
    assert saved.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_other_data_in_mid_epoch_are_refused(saved, data, tmp_path):
    config = configuration(data, tmp_path / "new", "crops_per_photo=4")
    message = "was saved within an epoch of 6 items, and now there are 8"
    with pytest.raises(ValueError, match=message):
        train(config, resume=saved)


def test_other_files_are_no_checkpoints(data, tmp_path):
    config = configuration(data, tmp_path / "new")
    torch.save(TTSR((1, 1, 1, 1), 4).state_dict(), tmp_path / "model.pt")
    (tmp_path / "text.pt").write_text("text")
    torch.save({"format": Stop}, tmp_path / "code.pt")
    for name, kind, message in (
        ("model.pt", ValueError, "is no checkpoint of a training; .* name it as model.weights"),
        ("text.pt", RuntimeError, "it is damaged, is no checkpoint, or holds"),
        ("code.pt", RuntimeError, "it is damaged, is no checkpoint, or holds"),
        ("nothing.pt", FileNotFoundError, "no such file"),
    ):
        with pytest.raises(kind, match=message):
            train(config, resume=tmp_path / name)


def test_a_loss_that_is_not_finite_stops_the_training(data, tmp_path, monkeypatch):
    """The step's images are saved, and the weights are unchanged."""
    out, seen = tmp_path / "out", []
    true_loss = trainer_module.reconstruction_loss

    def loss(sr, hr, kind):
        seen.append(hr)
        return true_loss(sr, hr, kind) * (float("nan") if len(seen) == 3 else 1)

    monkeypatch.setattr(trainer_module, "reconstruction_loss", loss)
    trainer = Trainer(configuration(data, out, "save_steps=2"))
    with pytest.raises(RuntimeError) as caught:
        trainer.run()
    file = out / "not-finite-step-3.pt"
    assert str(caught.value) == (
        f"loss rec is nan and loss total is nan in step 3, and the training stops; {file} holds "
        "the images of the step"
    )
    inputs = torch.load(file, weights_only=True)
    assert inputs.keys() == {"lr", "lrsr", "hr", "ref", "refsr", "key_mask"}
    assert torch.equal(inputs["hr"], seen[2])
    saved = torch.load(out / LAST, weights_only=True)
    assert saved["step"] == 2
    assert_equal(dict(saved["state_dict"]), dict(trainer.networks.ttsr.state_dict()))


def test_one_process_that_is_not_finite_stops_all(two, data, tmp_path):
    answers = two.run(not_finite_in_the_last, configuration(data, tmp_path / "out"))
    messages = [str(answer) for answer in answers]
    assert all("loss rec is nan and loss total is nan in step 1" in text for text in messages)
    assert "another process has the images" in messages[0]
    assert "not-finite-step-1-process-1.pt holds the images" in messages[1]


# --- the command ------------------------------------------------------------------------------


@each(
    ("arguments", "message"),
    [
        (["tiny"], "run.out is needed: .*"),
        (["tiny", "--out", "{out}"], "data.root is needed: .*"),
        (["tiny", "--out", "{out}", "--data", "{out}/nothing"], "cannot read .*: no such .*"),
        (["tiny", "--set", "n_feat=4"], r"unknown key n_feat, did you mean model.n_feats\?"),
        (["tiny", "--set", "n_feats=5"], "model.n_feats must be even and positive, got 5"),
        (["huge"], "no preset .* huge"),
        (["tiny", "--out", "{out}", "--data", "{data}", "--set", "batch_size=99"], ".* 16 items"),
        (
            ["ttsr", "--out", "{out}", "--data", "{data}", "--set", "layout=photographs"],
            "loss.per_w needs .*no weights of VGG19: .*",
        ),
    ],
)
def test_bad_input_is_one_line(data, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["train", *(x.format(out=out, data=data) for x in arguments)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr
    assert not out.exists()


def test_show_prints_the_settings(data, tmp_path):
    arguments = ["train", "tiny", "--data", str(data), "--set", "n_feats=8", "--show"]
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    (tmp_path / "shown.yaml").write_text(result.stdout)
    expected = load_config("tiny", ["n_feats=8"])
    expected.data.root = str(data)
    assert load_config(tmp_path / "shown.yaml") == expected


def test_the_command_trains_and_resumes(data, tmp_path):
    out = tmp_path / "out"
    arguments = program(data, out, settings=("num_epochs=1", f"validation={data}"))[3:]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    quality = r"\d+.\d\d dB, bicubic \d+.\d\d dB"
    epoch = rf"epoch 1  rec 0.\d+  total 0.\d+  \d+.\d images/s, {quality}\n"
    done = rf"{out}/model.safetensors \(3 steps, .* s, {quality}\)\n"
    assert re.fullmatch(epoch + done, result.stdout)
    again = ["train", "--out", str(out), "--resume", "--set", "num_epochs=2", "--quiet"]
    result = CliRunner().invoke(app, again)
    assert (result.exit_code, result.stdout) == (0, "")
    assert torch.load(out / LAST, weights_only=True)["step"] == 6


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """A checkpoint in the middle of an epoch."""
    out = tmp_path_factory.mktemp("saved")
    with pytest.raises(Stop):
        train(configuration(data, out, "save_steps=2"), progress=stop_at(3))
    return out / LAST


def wait_for(path, process):
    end = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
