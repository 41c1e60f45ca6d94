"""Pairs on disk: every layout, what is missing, and 8-bit RGB of every kind of image."""

import os
import re

import numpy as np
import pytest
from PIL import Image as pillow

from tests.image_samples import noise
from ttsr_fast.datasets import Pair, degrade, find_pairs, read_rgb
from ttsr_fast.images import Image

each = pytest.mark.parametrize


@pytest.fixture
def make(tmp_path):
    """Writes tiny images, paths separated by blanks, and returns their folder."""

    def write(paths):
        for path in map(tmp_path.joinpath, paths.split()):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"never opened")
        return tmp_path

    return write


def relative(pairs, root):
    """`name: hr reference ...`, a line for each pair."""
    names = [
        [str(path.relative_to(root)) for path in (pair.hr, *pair.references)] for pair in pairs
    ]
    return [f"{pair.name}: {' '.join(paths)}" for pair, paths in zip(pairs, names, strict=True)]


# --- layouts --------------------------------------------------------------------------------------


@each("inside", ["", "train"])
def test_cufed(make, inside):
    root = make("train/input/10.png train/input/9.png train/ref/9.png train/ref/10.jpg")
    assert relative(find_pairs(root / inside, "cufed"), root) == [
        "9: train/input/9.png train/ref/9.png",
        "10: train/input/10.png train/ref/10.jpg",
    ]


@each("inside", ["", "test", "test/CUFED5"])
@each(("references", "numbers"), [(None, [1]), (3, [3]), ((5, 1), [5, 1]), (range(1, 6), "12345")])
def test_cufed5(make, inside, references, numbers):
    root = make(" ".join(f"test/CUFED5/{n}_{k}.png" for n in ("000", "012") for k in range(6)))
    folder = "test/CUFED5"
    expected = [
        f"{n}: {folder}/{n}_0.png " + " ".join(f"{folder}/{n}_{k}.png" for k in numbers)
        for n in ("000", "012")
    ]
    pairs = find_pairs(root / inside, "cufed5", references=references)
    assert relative(pairs, root) == expected


@each(("references", "numbers"), [(None, [2, 10, 11]), (1, [2]), ([3, 1], [11, 2])])
def test_sun80(make, references, numbers):
    """Folders of references are called as the image is, suffix and all; 10 comes after 2."""
    low, high = "Sun_Hays_SR_groundtruth", "Sun_Hays_SR_scenematches"
    root = make(f"{low}/a.jpg " + " ".join(f"{high}/a.jpg/{n}.jpg" for n in (10, 2, 11)))
    pairs = find_pairs(root, "sun80", references=references)
    assert relative(pairs, root) == [
        f"a: {low}/a.jpg " + " ".join(f"{high}/a.jpg/{n}.jpg" for n in numbers)
    ]


@each("layout", ["urban100", "manga109"])
@each(
    ("paths", "names"),
    [
        ("b.png a.png", ["a: a.png", "b: b.png"]),
        ("HR/a.png LR/a.png", ["a: HR/a.png"]),
        ("image_SRF_4/a_HR.png image_SRF_4/a_LR.png", ["a_HR: image_SRF_4/a_HR.png"]),
    ],
)
def test_without_references(make, layout, paths, names):
    root = make(paths)
    assert relative(find_pairs(root, layout), root) == names


def test_a_list_gives_references(make):
    root = make("a.png b.png c.png")
    (root / "list.txt").write_text("b.png  a.png c.png\n\na.png b.png\nc.png a.png\nother.png x\n")
    pairs = find_pairs(root, "urban100", references=root / "list.txt")
    assert relative(pairs, root) == [
        "a: a.png b.png",
        "b: b.png a.png c.png",
        "c: c.png a.png",
    ]


def test_folders(make):
    """An image of that name, or a folder of that name, with the suffix or without."""
    root = make("hr/a.png hr/b.png hr/c.png ref/a.jpg ref/b/2.png ref/b/1.png ref/c.png/x.png")
    pairs = find_pairs(root / "hr", "folders", references=str(root / "ref"))
    assert relative(pairs, root) == [
        "a: hr/a.png ref/a.jpg",
        "b: hr/b.png ref/b/1.png ref/b/2.png",
        "c: hr/c.png ref/c.png/x.png",
    ]


def test_names_are_unlike_each_other(make):
    root = make("a.png a.jpg b.png")
    assert [pair.name for pair in find_pairs(root, "urban100")] == ["a.jpg", "a.png", "b"]


# --- what is missing ------------------------------------------------------------------------------


@each(
    ("paths", "layout", "references", "message"),
    [
        ("a.png", "div2k", None, "layout must be one of cufed, .*, folders, got 'div2k'"),
        ("a.png", "cufed", None, ".* holds no folder train/input or input"),
        ("input/a.png", "cufed", None, "cannot read .*ref: no such folder"),
        ("input/a.png ref/b.png", "cufed", None, ".*/a.png has 0 references in .*ref, one .*"),
        ("input/a.png ref/a.png", "cufed", 1, "references is not for layout 'cufed', got 1"),
        (
            "input/a.png input/b.png input/c.png ref/b.png",
            "cufed",
            None,
            ".*/a.png has 0 references in .*, one is expected .the first of 2 such images.",
        ),
        ("input/x.txt ref/a.png", "cufed", None, ".*input holds no images .*"),
        ("1_1.png", "cufed5", None, ".* holds no images named NNN_0"),
        ("1_0.png 1_1.png", "cufed5", (1, 2), ".*1_0.png has no reference 1_2, or several .*"),
        ("1_0.png 1_1.png", "cufed5", 6, "references must be among 1 to 5, got 6"),
        ("1_0.png 1_1.png", "cufed5", 0, "references must be numbers from 1 on, got 0"),
        ("1_0.png 1_1.png", "cufed5", (), "references must be numbers from 1 on, got ().*"),
        ("1_0.png 1_1.png", "cufed5", "1", "references must be numbers from 1 on, got '1'"),
        ("1_0.png 1_1.png", "cufed5", True, "references must be numbers from 1 on, got True"),
        ("a.jpg", "sun80", None, "cannot read .*Sun_Hays_SR_scenematches: no such folder"),
        ("a.png", "manga109", 1, "references must be a text file or None, got 1"),
        ("a.png", "folders", None, "references must be the folder of references, got None"),
        ("a.png", "folders", "nowhere", "cannot read nowhere: no such folder"),
        ("a.png", "folders", __file__, "cannot read .*: it is no folder"),
    ],
)
def test_what_is_missing_is_said_in_one_line(make, paths, layout, references, message):
    root = make(paths)
    with pytest.raises((OSError, TypeError, ValueError)) as raised:
        find_pairs(root, layout, references=references)
    assert re.fullmatch(message, str(raised.value))


def test_a_wrong_number_of_references(make):
    root = make(
        "Sun_Hays_SR_groundtruth/a.jpg Sun_Hays_SR_groundtruth/b.jpg "
        "Sun_Hays_SR_scenematches/a.jpg/1.jpg Sun_Hays_SR_scenematches/b.jpg/1.jpg "
        "Sun_Hays_SR_scenematches/b.jpg/2.jpg"
    )
    with pytest.raises(ValueError, match="a.jpg has 1 references, and no number 2$"):
        find_pairs(root, "sun80", references=2)


@each(
    ("text", "message"),
    [
        ("b.png a.png", "a.png has no reference in .*list.txt$"),
        ("a.png\nb.png a.png", "a.png has no reference in .*list.txt$"),
        ("a.png x.png\nb.png y.png", "not there: .*x.png .the first of 2 such images.$"),
    ],
)
def test_a_list_that_does_not_fit(make, text, message):
    root = make("a.png b.png")
    (root / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        find_pairs(root, "manga109", references=root / "list.txt")


@each("end", ["\n", "\r\n", "\r"])
@each("mark", ["", "\ufeff"])
def test_a_list_is_utf_8_with_any_line_end(make, mark, end):
    """Wide blanks and other separators of Unicode may be part of a name."""
    names = ("a.png", "b.png", "c\u3000d.png", "e\x0bf\u2028.png")
    root = make("")
    for name in names:
        (root / name).write_bytes(b"")
    lines = [f"{name}  {names[0]}\t{names[2]}" for name in names]
    (root / "list.txt").write_bytes((mark + end.join(lines) + 2 * end).encode())
    pairs = find_pairs(root, "urban100", references=root / "list.txt")
    assert [pair.hr.name for pair in pairs] == sorted(names)
    assert {pair.references for pair in pairs} == {(root / names[0], root / names[2])}


@each(
    ("content", "message"),
    [
        (b"a.png b.png\r\nb.png \xff.png", "list.txt must be a text in UTF-8, line 2 is not$"),
        ("a.png b.png".encode("utf-16"), "list.txt must be a text in UTF-8, line 1 is not$"),
        (b"a.png /etc/b.png", "list.txt, line 1: /etc/b.png leads out of the folder$"),
        (b"\na.png ../b.png", "list.txt, line 2: ../b.png leads out of the folder$"),
        (b"a.png b.png\n\na.png a.png", "list.txt, line 3: a.png has a line before$"),
        (b"a.png sub/../../b.png", "line 1: sub/../../b.png leads out of the folder$"),
        (b"a.png \x1b[2J.png\nb.png a.png", r"a reference that is not there: .*/\\x1b\[2J.png$"),
    ],
)
def test_a_list_stays_in_its_folder(make, content, message):
    root = make("a.png b.png")
    (root / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_pairs(root, "urban100", references=root / "list.txt")


def test_a_list_is_a_plain_file_of_some_size(make):
    root = make("a.png")
    with open(root / "list.txt", "wb") as file:
        file.truncate(2**40)
    os.mkfifo(root / "pipe.txt")
    for name, error, message in (
        ("list.txt", ValueError, "must have at most 16777216 bytes"),
        ("pipe.txt", OSError, "no such file, or no regular one"),
        ("none.txt", FileNotFoundError, "cannot read .*none.txt: no such file"),
    ):
        with pytest.raises(error, match=message):
            find_pairs(root, "urban100", references=root / name)


def test_no_such_root(tmp_path):
    for layout in ("cufed", "cufed5", "sun80", "urban100", "manga109", "folders"):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
            find_pairs(tmp_path / "nowhere", layout)


# --- pixels ---------------------------------------------------------------------------------------


def test_every_image_is_read_as_8_bit_rgb(tmp_path):
    file = tmp_path / "a.png"
    colour, grey, deep = noise(3, 5, 3), noise(3, 5, 1), noise(3, 5, 3, dtype=np.uint16)
    deep[0, 0] = 0, 65535, 128
    for pixels, expected in (
        (colour, colour),
        (grey, grey.repeat(3, 2)),
        (deep, (deep / 257).round().astype(np.uint8)),
    ):
        for alpha in (None, pixels[..., 0]):
            Image(pixels, alpha).save(file)
            np.testing.assert_array_equal(read_rgb(file), expected, strict=True)


@each("size", [(8, 12), (9, 14), (12, 15)])
def test_degradation_is_pillows_bicubic_down_and_up(size):
    pixels = noise(*size, 3)
    quarter = pillow.fromarray(pixels).resize((size[1] // 4, size[0] // 4), pillow.BICUBIC)
    low, blurred = degrade(pixels)
    np.testing.assert_array_equal(low, np.asarray(quarter), strict=True)
    np.testing.assert_array_equal(
        blurred, np.asarray(quarter.resize(size[::-1], pillow.BICUBIC)), strict=True
    )


def test_a_pair_is_a_tuple():
    assert Pair("a", "hr", ()) == ("a", "hr", ())
