"""Checkpoints under other names: every bit, every kind of file, what is refused."""

import os
import re
import resource
import signal

import pytest
import torch
from typer.testing import CliRunner

from ttsr_fast.cli.commands import app
from ttsr_fast.model import TTSR, convert_checkpoint, load_model
from ttsr_fast.model.checkpoint import read_tensors, to_mmagic

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return dict(TTSR((1, 2, 1, 1), 4).state_dict())


@pytest.fixture
def folder(tmp_path, monkeypatch, state):
    """The current folder, with official weights, and things that are none."""
    monkeypatch.chdir(tmp_path)
    torch.save(state, "official.pt")
    torch.save({"a": torch.zeros(3)}, "foreign.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def bits(x):
    return x.contiguous().view(torch.uint8)


def assert_same_bits(found, expected):
    assert list(found) == list(expected)
    for name, x in expected.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert torch.equal(bits(found[name]), bits(x)), name


@each("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_round_trip_keeps_every_bit(folder, state, kind):
    """Also of numbers that only look alike: NaN, infinities, minus zero, denormals."""
    state = {name: x.to(kind, copy=True) for name, x in state.items()}
    odd = [float("nan"), float("inf"), -0.0, torch.finfo(kind).smallest_normal / 2]
    state["MainNet.conv12.bias"][:4] = torch.tensor(odd).to(kind)
    torch.save(state, "a.pt")
    steps = (
        ("a.pt", "b.pth", "--to", "mmagic"),
        ("b.pth", "c.safetensors"),
        ("c.safetensors", "d.pt"),
    )
    for step in steps:
        assert run(*step, "--quiet").output == ""
    content = torch.load("b.pth", weights_only=True)
    assert content.keys() == {"state_dict"}
    assert_same_bits(content["state_dict"], to_mmagic(state))
    assert_same_bits(torch.load("d.pt", weights_only=True), state)


def test_the_result_is_a_model(folder, state):
    result = run("official.pt", "model.safetensors")
    assert re.fullmatch(r"model\.safetensors \(\d+\.\d MB\)\n", result.output)
    for name, x in load_model("model.safetensors").state_dict().items():
        assert torch.equal(x, state[name])


def test_prefixes_go_and_types_may_differ(folder, state):
    mixed = {f"module.{name}": x.half() if "LTE" in name else x for name, x in state.items()}
    torch.save(mixed, "a.pt")
    assert convert_checkpoint("a.pt", "b.pt") == []
    expected = {name.removeprefix("module."): x for name, x in mixed.items()}
    assert_same_bits(torch.load("b.pt", weights_only=True), expected)


def test_what_is_dropped_is_said(folder, state):
    others = {
        "extractor_copy.slice1.0.bias": torch.zeros(64),
        "discriminator.body.0.bias": torch.zeros(32),
        "discriminator.body.2.bias": torch.zeros(32),
        "step_counter": torch.tensor(7),
    }
    torch.save({"meta": {"iter": 7}, "state_dict": others | to_mmagic(state)}, "training.pth")
    assert convert_checkpoint("training.pth", "a.pt") == list(others)
    said = run("training.pth", "b.pth", "--to", "mmagic").output.splitlines()[1]
    assert said == "left out 4 tensors: discriminator, extractor_copy, step_counter"
    assert_same_bits(torch.load("a.pt", weights_only=True), state)
    assert_same_bits(read_tensors("b.pth"), to_mmagic(state))


def test_parts_of_one_storage_are_written_by_themselves(folder, state):
    """A file where all tensors are views of one, which safetensors would refuse."""
    flat = torch.cat([x.flatten() for x in state.values()])
    parts = flat.split([x.numel() for x in state.values()])
    views = {n: p.view(x.shape) for (n, x), p in zip(state.items(), parts, strict=True)}
    torch.save(views, "views.pt")
    convert_checkpoint("views.pt", "a.safetensors")
    convert_checkpoint("a.safetensors", "b.pt")
    assert_same_bits(torch.load("b.pt", weights_only=True), state)


def test_half_rounds(folder, state):
    assert run("official.pt", "half.safetensors", "--half").exit_code == 0
    halves = {name: x.half() for name, x in state.items()}
    convert_checkpoint("half.safetensors", "half.pt")
    assert_same_bits(torch.load("half.pt", weights_only=True), halves)
    state = {**state, "MainNet.conv12.bias": torch.full((16,), 7e4)}
    torch.save(state, "large.pt")
    assert_refused(run("large.pt", "no.pt", "--half"), "MainNet.conv12.bias holds 70000, .*float16")


def assert_refused(result, message):
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


@each(
    ("arguments", "message"),
    [
        (("none.pt", "a.pt"), "cannot read none.pt: no such file"),
        (("none.pt", "official.pt"), "cannot read none.pt: no such file"),
        (("text.pth", "a.pt"), "cannot read text.pth: it is damaged, is no checkpoint, or .*"),
        (("foreign.pth", "a.pt"), r"foreign.pth is not a TTSR checkpoint: \d+ missing .*"),
        (("official.pt", "a.bin"), "path must end in .safetensors, .pt or .pth, got a.bin"),
        (("official.pt", "none/a.pt"), "path must lie in an existing folder, got none/a.pt"),
        (
            ("official.pt", "a.safetensors", "--to", "mmagic"),
            "mmagic reads .pth files, got a.saf.*",
        ),
        (("official.pt", "a.pt", "--to", "masa"), "--to must be one of official, mmagic, got masa"),
        (("official.pt", "official.pt"), "the result must be another file than official.pt"),
        (("official.pt", "link.pt"), "the result must be another file than official.pt"),
    ],
    ids=str,
)
def test_bad_input_is_refused_and_nothing_is_written(folder, arguments, message):
    os.link("official.pt", "link.pt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert_refused(run(*arguments), message)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@each("name", ["out.pt", "out.safetensors"])
def test_a_file_that_cannot_be_written_leaves_the_older(folder, name):
    """The kernel refuses to write more than 16 KiB, as it would on a full disk."""
    (folder / name).write_text("older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    try:
        result = run("official.pt", name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert_refused(result, f"cannot write {name}: File too large; the one before it is still there")
    assert (folder / name).read_text() == "older"
    assert len(list(folder.iterdir())) == 4
