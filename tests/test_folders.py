"""Folders of pictures and of references: what is read, what it is called, what is left out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_cli import LOW, REF, assert_refused, folder, names, noise, run  # noqa: F401
from ttsr_fast.datasets import namesake
from ttsr_fast.images import Image, read_image
from ttsr_fast.model import TTSR, save_model
from ttsr_fast.upscaling import upscale
from ttsr_fast.visualize import draw_match


@pytest.fixture
def folders(folder):  # noqa: F811  # the fixture above
    for name in ("lows", "refs"):
        Path(name).mkdir()
    for number in range(3):
        Image(noise(4, 5, 3, seed=number)).save(f"lows/{number}.png")
        Image(noise(20, 24, 3, seed=9 + number)).save(f"refs/{number}.{('png', 'bmp')[number % 2]}")
    Path("lows/notes.txt").write_text("no picture")
    return folder


def test_a_folder_takes_references_of_the_same_name(folders):
    result = run("upscale", "lows", "--pairs", "refs")
    assert (result.exit_code, result.stderr) == (0, "")
    assert names(folders / "lows_x4") == [f"{number}_x4.png" for number in range(3)]
    for number, ref in enumerate(("0.png", "1.bmp", "2.png")):
        expected = upscale(f"lows/{number}.png", f"refs/{ref}").image.pixels
        np.testing.assert_array_equal(read_image(f"lows_x4/{number}_x4.png").pixels, expected)


def test_a_folder_takes_one_reference_for_all(folders):
    result = run("upscale", "lows", "--ref", "ref.png", "-o", "new/out", "--suffix", "")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 3
    for number in range(3):
        expected = upscale(f"lows/{number}.png", REF).image.pixels
        np.testing.assert_array_equal(read_image(f"new/out/{number}.png").pixels, expected)


def test_a_picture_takes_its_reference_from_a_folder(folders):
    assert run("upscale", "lows/1.png", "--pairs", "refs", "-o", "out.png").exit_code == 0
    expected = upscale("lows/1.png", "refs/1.bmp").image.pixels
    np.testing.assert_array_equal(read_image("out.png").pixels, expected)


def test_every_patch_takes_the_best_of_all_references(folders):
    """Of a folder, frame 10 after frame 9, and of files."""
    for number in (9, 10):
        Image(noise(16, 20, 3, seed=number)).save(f"refs/{number}.png")
    result = run("upscale", "low.png", "--ref", "refs", "--ref", "ref.png")
    assert (result.exit_code, result.stderr) == (0, "")
    order = ["0.png", "1.bmp", "2.png", "9.png", "10.png"]
    expected = upscale(LOW, [*(f"refs/{name}" for name in order), REF])
    np.testing.assert_array_equal(read_image("low_x4.png").pixels, expected.image.pixels)
    assert len(expected.reference.unique()) > 1

    assert run("match", "low.png", "--ref", "refs", "-o", "sheet.png").exit_code == 0
    refs = [read_image(f"refs/{name}") for name in order]
    sheet = draw_match(Image(LOW), refs, *upscale(LOW, refs))
    np.testing.assert_array_equal(read_image("sheet.png").pixels, sheet.pixels)


def test_features_of_references_are_kept_in_a_folder(folders):
    torch.manual_seed(1)
    model = TTSR((1, 0, 0, 1), 4)
    save_model(model, "tiny.pth")
    options = ("--ref", "refs", "--weights", "tiny.pth", "--cache", "features", "--tile", "3")
    for _ in range(2):
        assert run("upscale", "lows", *options).exit_code == 0
        assert len(list(Path("features").iterdir())) == 3
        refs = ["refs/0.png", "refs/1.bmp", "refs/2.png"]
        expected = upscale("lows/1.png", refs, model=model).image.pixels
        found = read_image("lows_x4/1_x4.png").pixels
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_plan_is_shown_and_nothing_else_done(folders):
    save_model(TTSR((1, 0, 0, 1), 4), "tiny.pth")
    before = names(folders)
    result = run("upscale", "lows", "--ref", "refs", "--weights", "tiny.pth", "--plan")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "lows/0.png (5 x 4)"
    assert [line.split("  ")[1] for line in lines[1:]] == [
        "limit",
        "features are kept on",
        "searched are",
        "LTE",
        "search",
        "MainNet",
    ]
    assert run("upscale", "low.png", "--ref", "ref.png", "--plan").stdout.count("detail ") == 1
    assert names(folders) == before
    options = ("--weights", "tiny.pth", "--plan", "--max-memory", "1M")
    result = run("upscale", "low.png", "--ref", "ref.png", *options)
    assert result.exit_code == 2 and result.stdout.startswith("low.png (7 x 6)\n  limit ")
    assert re.fullmatch(r"error: max_memory 1 MiB is too little .* is enough\n", result.stderr)


def test_failures_do_not_stop_a_folder(folders):
    Path("lows/0.png").write_bytes(b"damaged")
    Path("refs/1.bmp").unlink()
    result = run("upscale", "lows", "--pairs", "refs")
    assert result.exit_code == 1
    assert re.fullmatch(r"lows_x4/2_x4.png \(20 x 16, .*\)\n", result.stdout)
    assert result.stderr.splitlines() == [
        "error: cannot read lows/0.png: it is no PNG, TIFF, JPEG, WebP or BMP, or damaged",
        "error: lows/1.png has 0 references in refs, one is expected",
        "error: 2 of 3 images failed",
    ]
    assert names(folders / "lows_x4") == ["2_x4.png"]


def test_two_pictures_are_not_written_into_one_file(folders):
    Image(LOW).save("lows/0.bmp")
    result = run("upscale", "lows", "--ref", "ref.png", "--ext", "png", "--quiet")
    assert_refused(
        result,
        "cannot write lows_x4/0_x4.png: it is an input or another result\n"
        "error: 1 of 4 images failed",
        code=1,
    )


def test_a_folder_cannot_go_into_a_file(folders):
    assert_refused(run("upscale", "lows", "--ref", "refs", "-o", "low.png/out"), ".*low.png.*")


@pytest.mark.parametrize("ending", [".png", ".PNG", ".Png", ".JPG", ".Tiff"])
def test_a_reference_of_the_same_name_in_any_case(tmp_path, ending):
    (tmp_path / f"a{ending}").touch()
    assert namesake(Path("lows/a.webp"), tmp_path).samefile(tmp_path / f"a{ending}")
