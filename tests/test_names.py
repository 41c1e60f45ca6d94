"""Names of files: which are images, in what order, with what characters, and which are one file."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli import assert_refused, folder, names, noise, run  # noqa: F401
from ttsr_fast.datasets import check_other_file, images_in, namesake, result_path
from ttsr_fast.images import Image


def touch(where, *files):
    for name in files:
        (where / name).write_bytes(b"")


def test_what_is_no_image_is_left_out(tmp_path):
    """What macOS leaves beside images, hidden files, folders, pipes and links to nothing."""
    touch(tmp_path, "a.png", "._a.png", ".DS_Store", ".hidden.jpg", "notes.txt", "b.PNG")
    (tmp_path / "old.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "link.png").symlink_to("a.png")
    assert [path.name for path in images_in(tmp_path)] == ["a.png", "b.PNG", "link.png"]
    with pytest.raises(ValueError, match="old.png holds no images .png, "):
        images_in(tmp_path / "old.png")


def test_the_order_is_natural_for_digits_of_every_script(tmp_path):
    """A digit that is none of a number, such as a superscript, is a character as others."""
    stems = [
        "2",
        "2\u00b2",
        "02",
        "9",
        "10",
        "\u0661\u0661",
        "12",
        "a\u2460",
        "a\u00b2",
        "b2",
        "b10",
    ]
    touch(tmp_path, *(f"{stem}.png" for stem in stems))
    found = [path.stem for path in images_in(tmp_path)]
    assert sorted(found) == sorted(stems)
    assert set(found[:3]) == {"2", "02", "2\u00b2"}
    assert found[3:7] == ["9", "10", "\u0661\u0661", "12"]
    assert found[-2:] == ["b2", "b10"]


NAMES = [
    "a\nb",
    "\x1b[2Ja",
    "\udcff",
    "\U0001f600\u200d",
    "[red]a",
    "-a",
    "=1",
    "a" * 248,
    " a ",
    "\\",
]


def test_any_character_may_be_part_of_a_name(folder):  # noqa: F811
    Path("lows").mkdir()
    Path("refs").mkdir()
    for n, name in enumerate(NAMES):
        Image(noise(3, 4, 3, seed=n)).save(f"lows/{name}.png")
        Image(noise(12, 16, 3, seed=n)).save(f"refs/{name}.png")
    result = run("upscale", "lows", "--pairs", "refs", "--phases", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    assert names(folder / "lows_x4") == sorted(f"{name}_x4.png" for name in NAMES)
    lines = result.stdout.splitlines()
    assert len(lines) == len(NAMES)
    assert all(line.isprintable() for line in lines)
    assert any(line.startswith(r"lows_x4/\x1b[2Ja_x4.png (16 x 12") for line in lines)

    for name in NAMES:
        Path(f"lows/{name}.png").write_bytes(b"")
    result = run("upscale", "lows", "--pairs", "refs", "--phases", "1")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == len(NAMES) + 1
    assert all(line.startswith("error: ") and line.isprintable() for line in lines)
    reason = "it is no PNG, TIFF, JPEG, WebP or BMP, or damaged"
    assert rf"error: cannot read lows/a\nb.png: {reason}" in lines


def test_a_result_name_that_is_too_long_is_refused_before_the_work(folder, monkeypatch):  # noqa: F811
    name = "a" * 251 + ".png"
    Path("low.png").rename(name)
    monkeypatch.setattr("ttsr_fast.cli.batch.upscale", None)
    result = run("upscale", name, "--ref", "ref.png")
    assert_refused(result, ".*File name too long.*")
    assert f"{'a' * 251}_x4.png" in result.stderr


def test_a_reference_may_have_a_suffix_in_capitals(tmp_path):
    touch(tmp_path, "a.JPG", "b.png", "b.TIF")
    assert namesake(Path("x/a.png"), tmp_path) == tmp_path / "a.JPG"
    assert namesake(Path("x/b.png"), tmp_path) == tmp_path / "b.png"
    with pytest.raises(ValueError, match="x/b.jpg has 2 references in "):
        namesake(Path("x/b.jpg"), tmp_path)


@pytest.mark.parametrize(
    ("source", "size", "result"),
    [
        ("a.webp", (2, 4096), "a_x4.png"),
        ("a.webp", (2, 4095), "a_x4.webp"),
        ("a.jpg", (16376, 1), "a_x4.png"),
        ("a.jpg", (16375, 1), "a_x4.jpg"),
    ],
)
def test_auto_takes_png_where_the_result_is_too_large(source, size, result):
    low = Image(np.zeros((*size, 3), np.uint8))
    assert result_path(Path(source), low, None, "_x4", "auto") == Path(result)


def test_another_name_of_a_file_is_the_file(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "soft.png").symlink_to("a.png")
    (tmp_path / "hard.png").hardlink_to(tmp_path / "a.png")
    files = [tmp_path / "none.png", tmp_path / "a.png"]
    for name in ("a.png", "soft.png", "hard.png", "sub/../a.png"):
        with pytest.raises(ValueError, match=f"^cannot write .*/{name}: it is an input$"):
            check_other_file(tmp_path / name, files)
    for name in ("b.png", "none.png", "new.png"):
        check_other_file(tmp_path / name, files)
