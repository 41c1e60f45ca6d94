"""References for many images: features made once, kept on disk, verified when read."""

import copy
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.test_upscale import LOW, REF, smooth
from tests.test_upscaling_ttsr import REFS
from ttsr_fast.images import to_grey
from ttsr_fast.model import TTSR
from ttsr_fast.upscaling import feature_cache, ttsr, upscale
from ttsr_fast.upscaling.bank import ReferenceBank
from ttsr_fast.upscaling.execution import Execution
from ttsr_fast.upscaling.plan import plan_upscale

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTSR((1, 1, 1, 1), 4)


@pytest.fixture
def made(monkeypatch):
    """The references whose features are made, as long as the test runs."""
    calls = []
    make = ttsr.reference_features
    monkeypatch.setattr(
        "ttsr_fast.upscaling.bank.reference_features",
        lambda model, ref, *rest: calls.append(list(ref.shape[2:])) or make(model, ref, *rest),
    )
    return calls


def result(model, refs, cache=None, low=LOW, **options):
    return upscale(low, ReferenceBank(refs, cache=cache), model=model, **options)


def assert_equal(a, b):
    np.testing.assert_array_equal(a.image.pixels, b.image.pixels)
    assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def test_features_are_made_once(model, made):
    bank = ReferenceBank(REFS)
    first, second = (upscale(low, bank, model=model) for low in (LOW, LOW[2:, 1:]))
    assert made == [[40, 52], [24, 60], [12, 12]]
    assert_equal(second, upscale(LOW[2:, 1:], REFS, model=model))
    upscale(LOW[..., 0], bank, model=model)  # with the references made grey
    assert made[6:] == made[:3]
    assert first.image.pixels.shape == (36, 48, 3)


# --- on disk ---


@each("amp", [None, "bf16"])
def test_every_image_is_the_same_with_and_without_a_cache(model, made, tmp_path, amp):
    banks = [ReferenceBank(REFS, cache=tmp_path / "new" / "cache") for _ in range(2)]
    for seed in range(6):
        low = smooth(18, 22, seed=seed)
        expected = upscale(low, REFS, model=model, amp=amp)
        for bank in banks:
            assert_equal(upscale(low, bank, model=model, amp=amp), expected)
    assert len(made) == 6 * 3 + 3, "the second bank reads what the first has written"
    fresh, read = (next(iter(bank._features.values())) for bank in banks)
    for a, b in zip(fresh, read, strict=True):
        for x, y in zip((a.key, *a.values), (b.key, *b.values), strict=True):
            assert (x.stride(), x.dtype) == (y.stride(), y.dtype)
            assert torch.equal(x, y)


def other_model():
    torch.manual_seed(3)
    return TTSR((1, 1, 1, 1), 4)


@each("change", ["weights", "grey", "pixels", "dtype", "amp", "threads", "small windows"])
def test_features_are_of_what_they_were_made_from(model, made, tmp_path, set_threads, change):
    result(model, REF, tmp_path)
    ref, low, options = REF, LOW, {}
    if change == "weights":
        model = other_model()
    elif change == "grey":
        low = LOW[..., 0]
    elif change == "pixels":
        ref = REF.copy()
        ref[0, 0, 0] ^= 1
    elif change == "dtype":
        model = copy.deepcopy(model).double()
    elif change == "amp":
        options = {"amp": "bf16"}
    elif change == "threads":
        set_threads(torch.get_num_threads() + 1)
    else:
        options = {"tile": 5}
    result(model, ref, tmp_path, low, **options)
    assert len(made) == 2
    result(model, ref, tmp_path, low, **options)
    assert len(made) == 2


def test_other_networks_share_features(model, made, tmp_path):
    """They depend on the texture extractor alone, on pixels, and not on how these are stored."""
    result(model, REF, tmp_path)
    wider = TTSR((1, 1, 1, 1), 8)
    wider.LTE.load_state_dict(model.LTE.state_dict())
    result(wider, np.ascontiguousarray(REF), tmp_path, smooth(11, 8))
    assert len(made) == 1
    result(model, to_grey(REF), tmp_path)
    result(model, REF, tmp_path, LOW[..., 0])
    assert len(made) == 2


def test_files_are_safetensors_that_others_may_read(model, tmp_path):
    before = os.umask(0o027)
    try:
        result(model, REF, tmp_path)
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640
    tensors = safetensors.torch.load_file(path)
    assert {name: list(x.shape) for name, x in tensors.items()} == {
        "key": [1, 10, 13, 256],
        "lv1": [1, 40, 52, 64],
        "lv2": [1, 20, 26, 128],
        "lv3": [1, 10, 13, 256],
        "sha256": [1, 32],
    }
    features = ReferenceBank(REF)
    plan = plan_upscale((9, 12), [(40, 52)], model=model)
    ((key, values),) = features.features(model, plan, Execution(), grey=False)
    for name, x in zip(("key", "lv1", "lv2", "lv3"), (key, *values), strict=True):
        assert torch.equal(tensors[name].permute(0, 3, 1, 2), x)


def flipped(content, at):
    changed = bytearray(content)
    changed[at] ^= 0x40
    return bytes(changed)


def rewritten(content, change):
    """A file of changed tensors with the metadata of this one."""
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    tensors = {name: change(x) for name, x in safetensors.torch.load(content).items()}
    return safetensors.torch.save(tensors, metadata)


HARM = {
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2],
    "too long": lambda content: content + b"\0",
    "no file of features": lambda content: b"\xff" * len(content),
    "a bit of the header": lambda content: flipped(content, 100),
    "a bit of the values": lambda content: flipped(content, len(content) // 2),
    "a bit of the digest": lambda content: flipped(content, -1),
    "NaN": lambda content: rewritten(content, lambda x: x * float("nan")),
    "8 channels": lambda content: rewritten(content, lambda x: x[..., :8].contiguous()),
    "float16": lambda content: rewritten(content, torch.Tensor.half),
    "int32": lambda content: rewritten(content, torch.Tensor.int),
}


@each("harm", [*HARM, "another reference's"])
def test_files_that_cannot_be_used_are_made_again_once(model, made, tmp_path, caplog, harm):
    refs = REFS[:2]
    expected = result(model, refs, tmp_path)
    one, other = tmp_path.iterdir()
    good = one.read_bytes()
    bad = other.read_bytes() if harm == "another reference's" else HARM[harm](good)
    assert bad != good
    one.write_bytes(bad)
    assert_equal(result(model, refs, tmp_path), expected)
    assert len(made) == 3
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the cache file {one} is made again: ")
    assert one.read_bytes() == good
    assert_equal(result(model, refs, tmp_path), expected)
    assert (len(made), len(caplog.records)) == (3, 1), "it is whole again"
    assert sorted(tmp_path.iterdir()) == sorted([one, other])


def test_a_file_that_shrinks_while_it_is_read_is_made_again(model, made, tmp_path, monkeypatch):
    expected = result(model, REF, tmp_path)
    (path,) = tmp_path.iterdir()
    memory_of = feature_cache._bytes

    def shrink(x):
        os.truncate(path, 5000)
        return memory_of(x)

    monkeypatch.setattr(feature_cache, "_bytes", shrink)
    assert_equal(result(model, REF, tmp_path), expected)
    assert len(made) == 2


def test_features_in_memory_survive_their_file(model, tmp_path):
    """A mapped file that shrinks would end the process."""
    result(model, REF, tmp_path)
    bank = ReferenceBank(REF, cache=tmp_path)
    expected = upscale(LOW, bank, model=model)
    (path,) = tmp_path.iterdir()
    os.truncate(path, 0)
    assert_equal(upscale(LOW, bank, model=model), expected)


def test_a_folder_that_cannot_be_written_is_named_once(model, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    expected = upscale(LOW, REFS, model=model)
    for _ in range(2):
        assert_equal(result(model, REFS, tmp_path), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"features are not kept in {tmp_path}: cannot write ")
    assert record.getMessage().endswith("the disk is full")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(OSError, match=f"cannot make the cache folder {cache}: "):
            ReferenceBank(REF, cache=cache)


def test_several_writers_of_a_file_are_fine(model, tmp_path):
    expected = upscale(LOW, REF, model=model)
    found, errors = [], []

    def work():
        try:
            found.append(result(model, REF, tmp_path))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for one in found:
        assert_equal(one, expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_needs_no_safetensors(tmp_path):
    program = """
import sys
sys.modules["safetensors"] = None
import numpy, torch
from ttsr_fast import ReferenceBank, upscale
from ttsr_fast.model import TTSR
image = numpy.zeros((16, 16, 3), numpy.uint8)
for _ in range(2):
    upscale(image[:4, :4], ReferenceBank(image, cache=sys.argv[1]), model=TTSR((0, 0, 0, 0), 2))
"""
    root = str(Path(__file__).parent.parent)
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, env={"PYTHONPATH": root}
    )
    assert len(list(tmp_path.iterdir())) == 2, "random weights of their own"
