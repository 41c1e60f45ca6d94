"""Files of a training: their record, and messages about changes."""

import json
import os
import shutil

import pytest
import torch

from tests.trainings import configuration, photographs
from ttsr_fast.datasets import Pair
from ttsr_fast.images import Image, read_image
from ttsr_fast.training.checkpoints import LAST
from ttsr_fast.training.config import SETTINGS, load_config
from ttsr_fast.training.data import PairDataset
from ttsr_fast.training.items import FILES, File, data_files, difference, summary, write_list
from ttsr_fast.training.photographs import Photographs
from ttsr_fast.training.trainer import train

each = pytest.mark.parametrize


@pytest.fixture
def pairs(tmp_path):
    """Two images, one with two references, in separate folders."""
    for name in ("hr/a.png", "hr/b.png", "ref/a/1.png", "ref/a/2.png", "ref/b.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(len(name)))
    root = tmp_path / "ref"
    return [
        Pair("a", tmp_path / "hr/a.png", (root / "a/1.png", root / "a/2.png")),
        Pair("b", tmp_path / "hr/b.png", (root / "b.png",)),
    ]


def test_files_are_named_within_their_folder(pairs):
    assert data_files(PairDataset(pairs)) == [
        File("a.png", 8),
        File("references/a/1.png", 11),
        File("references/a/2.png", 11),
        File("b.png", 8),
        File("references/b.png", 9),
    ]
    paths = [pair.hr for pair in pairs]
    assert data_files(Photographs(paths)) == [File("a.png", 8), File("b.png", 8)]
    paths[0].unlink()
    os.symlink("nowhere", paths[0])
    assert data_files(PairDataset([Pair("a", path, ()) for path in paths])) == [
        File("a.png", None),
        File("b.png", 8),
    ]


BEFORE = [File("a", 1), File("b", 2), File("c", 3)]


@each(
    ("files", "expected"),
    [
        (BEFORE, ""),
        (BEFORE[:2], "1 gone (c)"),
        ([*BEFORE, File("d", 4)], "1 new (d)"),
        ([File("a", 9), *BEFORE[1:]], "1 of another size (a)"),
        (
            [File("a", None), File("é\udcff", 1)],
            "2 gone (b, c), 1 new (é\\xff), 1 of another size (a)",
        ),
        ([File(x, 0) for x in "defgh"], "3 gone (a, b, c), 5 new (d, e, f, ...)"),
        (BEFORE[::-1], "the same files in another order"),
    ],
)
def test_changes_in_words(tmp_path, files, expected):
    write_list(BEFORE, tmp_path)
    assert difference(files, summary(BEFORE), tmp_path) == expected
    assert json.loads((tmp_path / FILES).read_text()) == [list(file) for file in BEFORE]


@each("content", [None, b"{", b"[[1]]", b"3", b'[["a",1]]'])
def test_without_the_list_the_message_has_numbers(tmp_path, content):
    if content is not None:
        (tmp_path / FILES).write_bytes(content)
    assert difference(BEFORE, summary(BEFORE), tmp_path) == ""
    assert difference(BEFORE[:2], summary(BEFORE), tmp_path) == "3 files then, 2 now"


# --- in a training -----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return photographs(tmp_path / "photographs", 3)


def larger(path):
    pixels = read_image(path).pixels
    Image(pixels.repeat(2, 0)).save(path)


@each(
    ("change", "words"),
    [
        (lambda data: (data / "2.png").unlink(), r"1 gone \(2.png\)"),
        (lambda data: shutil.copy(data / "2.png", data / "3.png"), r"1 new \(3.png\)"),
        (lambda data: larger(data / "1.png"), r"1 of another size \(1.png\)"),
    ],
    ids=["gone", "new", "size"],
)
def test_a_training_resumes_with_the_same_files_only(data, tmp_path, caplog, change, words):
    out = tmp_path / "out"
    train(configuration(data, out))
    listed = (out / FILES).read_bytes()
    change(data)
    config = configuration(data, out, "num_epochs=2")
    message = rf"{LAST} was saved with other training files: {words}; put the old ones back, or "
    with pytest.raises(ValueError, match=message):
        train(config, resume=True)
    assert (out / FILES).read_bytes() == listed
    config.data.on_change = "accept"
    state = train(config, resume=True)
    assert state.epoch == 2
    assert any("the training files have changed: 1 " in text for text in caplog.messages)
    assert load_config(out / SETTINGS).data.on_change == "raise", "accepted for one run only"
    assert train(configuration(data, out, "num_epochs=3"), resume=True).epoch == 3


def test_data_may_move(data, tmp_path):
    out = tmp_path / "out"
    train(configuration(data, out))
    moved = data.rename(tmp_path / "elsewhere")
    assert train(configuration(moved, out, "num_epochs=2"), resume=True).epoch == 2


def test_checkpoints_without_a_record_load(data, tmp_path):
    out = tmp_path / "out"
    train(configuration(data, out))
    saved = torch.load(out / LAST, weights_only=True)
    assert saved["files"]["count"] == 3
    del saved["files"]
    torch.save(saved, out / LAST)
    (data / "2.png").unlink()
    assert train(configuration(data, out, "num_epochs=2"), resume=True).epoch == 2
