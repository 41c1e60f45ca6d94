"""Files of tensors: damage is noticed, sizes are checked first, writes are whole."""

import errno
import time
import zipfile

import pytest
import torch

from ttsr_fast.model import TTSR, load_model, save_model, tensor_files
from ttsr_fast.model.checkpoint import convert_checkpoint, read_tensors

each = pytest.mark.parametrize
BIAS = "MainNet.conv12.bias"
DAMAGED = "cannot read {path}: it is damaged"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TTSR((1, 1, 1, 1), 4)


@pytest.fixture
def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def flip(path, values, bit):
    """One bit of the first of these float32 values, wherever they are in the file."""
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@each("suffix", [".pt", ".safetensors"])
@each("bit", [0, 12, 31])
def test_a_flipped_bit_is_noticed(model, state, tmp_path, suffix, bit):
    path = tmp_path / f"model{suffix}"
    save_model(model, path)
    flip(path, state["MainNet.conv12.weight"].flatten(), bit)
    for read in (load_model, read_tensors, lambda p: convert_checkpoint(p, tmp_path / "a.pt")):
        with pytest.raises(RuntimeError) as caught:
            read(path)
        assert str(caught.value).startswith(f"cannot read {path}: it is damaged (the checksum of ")
    assert not (tmp_path / "a.pt").exists()


def test_files_without_checksums_load(model, state, tmp_path):
    """From safetensors itself, from torch's older format, and where torch was set to write none."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "c.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    for path in tmp_path.iterdir():
        loaded = load_model(path).state_dict()
        assert all(torch.equal(loaded[name], x) for name, x in state.items()), path


def test_the_checksum_is_of_names_types_and_shapes(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(0)}
    tensor_files.save(tensors, tmp_path / "a.safetensors")
    digests = {
        tensor_files._digest(x)
        for x in (
            tensors,
            tensors | {"a": torch.zeros(3, 2)},
            tensors | {"b": torch.ones(2, dtype=torch.float16)},
            {"d" if name == "a" else name: x for name, x in tensors.items()},
        )
    }
    assert len(digests) == 4
    read = tensor_files.load(tmp_path / "a.safetensors")
    assert tensor_files._digest(read) == tensor_files._digest(tensors)


def test_a_missing_right_is_said(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / "model.pt")

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(RuntimeError, match=r"^cannot read .*model\.pt: Permission denied$"):
        load_model(tmp_path / "model.pt")


# --- shapes and values -------------------------------------------------------------------------


def wide(state, size):
    """Tensors of one value that claim to be of a model this wide."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in TTSR((1, 1, 1, 1), size).state_dict().items()}
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@each(
    ("change", "named"),
    [
        (lambda s: wide(s, 2**14), r"LTE.sub_mean.weight \[3, 3, 1, 1\]|MainNet.SFE"),
        (lambda s: s | {BIAS: torch.zeros(1).expand(2**60)}, rf"{BIAS} \[1152921504606846976\]"),
        (
            lambda s: s | {"MainNet.SFE.conv_head.weight": torch.zeros(1).expand(2**50, 3, 3, 3)},
            r"MainNet.SFE.conv_head.weight \[1125899906842624, 3, 3, 3\]",
        ),
    ],
    ids=["consistent", "bias", "width"],
)
def test_absurd_shapes_take_no_memory(state, tmp_path, change, named):
    path = tmp_path / "absurd.pt"
    torch.save(change(state), path)
    start = time.monotonic()
    for read in (load_model, lambda path: convert_checkpoint(path, tmp_path / "a.pt", half=True)):
        with pytest.raises(ValueError, match=rf"absurd\.pt holds \d+ bytes .* more \(.*({named})"):
            read(path)
    assert time.monotonic() - start < 10


def test_one_storage_for_many_tensors_is_refused(state, tmp_path):
    """Every tensor is backed by the file, and all together are not."""
    storage = torch.zeros(max(x.numel() for x in state.values()))
    shared = {name: storage[: x.numel()].view(x.shape) for name, x in state.items()}
    torch.save(shared, tmp_path / "shared.pt")
    with pytest.raises(ValueError, match=r"shared\.pt holds \d+ bytes of tensors, and its shapes"):
        load_model(tmp_path / "shared.pt")


def rewritten(path, change, **options):
    """An archive of torch with other records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in change(records).items():
            archive.writestr(name, content)


def test_compressed_records_are_no_bomb(tmp_path):
    path = tmp_path / "bomb.pt"
    torch.save({"a": torch.zeros(2**20)}, path)
    rewritten(path, lambda records: records, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**14
    message = DAMAGED.format(path=path) + r" \(its records are larger than the file\)$"
    with pytest.raises(RuntimeError, match=message):
        read_tensors(path)


def test_a_size_that_the_file_does_not_have_is_refused(tmp_path):
    path = tmp_path / "claim.pt"
    torch.save({"a": torch.zeros(1000)}, path)

    def claim(records):
        name = next(name for name in records if name.endswith("data.pkl"))
        old, new = b"M" + (1000).to_bytes(2, "little"), b"J" + (2**30).to_bytes(4, "little")
        assert records[name].count(old) == 2
        return records | {name: records[name].replace(old, new)}

    rewritten(path, claim)
    with pytest.raises(RuntimeError, match=DAMAGED.format(path=path)):
        read_tensors(path)


@each("odd", [torch.eye(2).to_sparse(), torch.empty(3, device="meta")], ids=["sparse", "meta"])
def test_tensors_without_plain_values_are_refused(tmp_path, odd):
    torch.save({"good": torch.ones(1), "bad": odd}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt must hold dense tensors with values.*\(bad\)$"):
        read_tensors(tmp_path / "odd.pt")


@each("suffix", [".pt", ".safetensors"])
@each("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(state, tmp_path, suffix, value):
    path = tmp_path / f"bad{suffix}"
    state[BIAS][3] = value
    tensor_files.save(state, path)
    with pytest.raises(ValueError, match=rf"bad.* holds NaN or infinity in 1 tensors \({BIAS}\)$"):
        load_model(path)


def test_float64_beyond_float32_is_refused(state, tmp_path):
    state = {name: x.double() for name, x in state.items()}
    state[BIAS][0] = 1e300
    torch.save(state, tmp_path / "large.pt")
    with pytest.raises(ValueError, match=rf"holds NaN or infinity in 1 tensors \({BIAS}\)$"):
        load_model(tmp_path / "large.pt")


# --- writing -----------------------------------------------------------------------------------


@each("suffix", [".pt", ".safetensors"])
def test_a_full_disk_leaves_the_old_file(model, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"an older file")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ttsr_fast.files.os.fsync", fail)
    message = "the disk is full; the one before it is still there"
    with pytest.raises(OSError, match=rf"^cannot write {path}: {message}$"):
        save_model(model, path)
    assert path.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [path]
