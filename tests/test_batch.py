"""Several images and folders on one command line: what is read, what results are called."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_cli import LOW, REF, assert_refused, folder, names, noise, run  # noqa: F401
from ttsr_fast.cli.record import NAME
from ttsr_fast.datasets import namesake
from ttsr_fast.images import Image, read_image
from ttsr_fast.model import TTSR, save_model
from ttsr_fast.upscaling import upscale
from ttsr_fast.visualize import draw_match

OPTIONS = ("--ref", "ref.png", "--phases", "1")
each = pytest.mark.parametrize


@pytest.fixture
def several(folder):  # noqa: F811  # the fixture above
    """Two images, and a folder of two more."""
    Path("lows").mkdir()
    for number in range(2):
        Image(noise(4, 5, 3, seed=number)).save(f"{number}.png")
        Image(noise(5, 4, 3, seed=number)).save(f"lows/a{number}.png")
    return folder


def assert_right(result, low):
    expected = upscale(low, "ref.png", phases=1).image.pixels
    np.testing.assert_array_equal(read_image(result).pixels, expected)


def test_images_and_folders_go_into_one(several):
    again = several / "lows" / ".." / "0.png"
    result = run("upscale", "0.png", "1.png", "lows", again, *OPTIONS, "-o", "out/deep")
    assert (result.exit_code, result.stderr) == (0, "")
    paths = ["0_x4.png", "1_x4.png", "a0_x4.png", "a1_x4.png"]
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        f"out/deep/{name}" for name in paths
    ]
    assert sorted(path.name for path in Path("out/deep").iterdir()) == [NAME, *paths]
    for name in paths:
        low = Path("lows" if name[0] == "a" else ".", name.replace("_x4", ""))
        assert_right(Path("out/deep", name), low)


def test_each_goes_beside_its_image_where_nothing_else_is_said(several):
    before = names(several)
    assert run("upscale", "0.png", "1.png", "lows", *OPTIONS, "--quiet").exit_code == 0
    made = ["0_x4.png", "1_x4.png", "lows_x4/a0_x4.png", "lows_x4/a1_x4.png"]
    assert names(several) == sorted([*before, *made])
    again = run("upscale", "0.png", "0_x4.png", "1.png", "1_x4.png", "lows", *OPTIONS, "--resume")
    lines = [f"{n}_x4.png is left out: it is a result of an earlier run\n" for n in range(2)]
    lines.append("kept 4 of 4 results, which are up to date\n")
    assert (again.exit_code, again.output) == (0, "".join(lines)), "the others are kept"
    assert names(several) == sorted([*before, *made])
    only = run("upscale", "0_x4.png", "1_x4.png", *OPTIONS, "--quiet")
    assert_refused(only, "LR must name images, got only results")
    assert run("upscale", "lows", "lows_x4", *OPTIONS, "--quiet").exit_code == 0
    assert names(several) == sorted([*before, *made]), "no folder for images that are left out"
    assert run("upscale", "0_x4.png", *OPTIONS, "--quiet").exit_code == 0, "by itself it may be one"


def test_one_failure_among_several(several):
    result = run("upscale", "0.png", "broken.png", "1.png", *OPTIONS, "-o", "out")
    assert result.exit_code == 1 and len(result.stdout.splitlines()) == 2
    assert result.stderr.startswith("error: cannot read broken.png: ")
    assert result.stderr.endswith("error: 1 of 3 images failed\n")
    assert names(Path("out")) == ["0_x4.png", "1_x4.png"]


@each("output", ["low.png", "new.png"])
def test_a_file_is_no_place_for_several(several, output):
    before = names(several)
    message = f"--output must be a folder for several images, got {output}"
    assert_refused(run("upscale", "0.png", "1.png", *OPTIONS, "-o", output), message)
    assert names(several) == before


@each("order", [("lows", "lows/a0.png"), ("lows/a0.png", "lows")])
def test_an_image_that_is_named_goes_beside_itself(several, order):
    assert run("upscale", *order, *OPTIONS, "--quiet").exit_code == 0
    assert Path("lows/a0_x4.png").exists() and names(Path("lows_x4")) == ["a1_x4.png"]


def test_a_link_is_an_image_of_its_own(several):
    Path("lows/again.png").symlink_to("a0.png")
    assert run("upscale", "lows", *OPTIONS, "--quiet").exit_code == 0
    assert names(Path("lows_x4")) == ["a0_x4.png", "a1_x4.png", "again_x4.png"]


def test_a_folder_that_is_a_file_is_refused(several):
    Path("lows_x4").touch()
    message = "cannot write into lows_x4: it is no folder"
    assert_refused(run("upscale", "lows", *OPTIONS), message)


def test_plans_name_the_largest_need(several):
    Image(noise(200, 200, 3)).save("1.png")
    result = run("upscale", "0.png", "1.png", "lows", *OPTIONS, "--plan", "--max-memory", "10M")
    assert result.exit_code == 2 and result.stdout.count("detail") == 3
    enough = float(re.search(r"sizes: (.*)GiB is enough", result.stderr)[1])
    assert enough > 0.5, "the largest, and not the last"


def test_images_of_one_name_do_not_replace_one_another(several):
    Image(noise(5, 4, 3)).save("lows/0.png")
    result = run("upscale", "0.png", "lows/0.png", *OPTIONS, "-o", "out")
    assert result.exit_code == 1
    assert "cannot write out/0_x4.png: it is an input or another result" in result.stderr
    assert_right("out/0_x4.png", "0.png")


# --- folders ---


@pytest.fixture
def folders(folder):  # noqa: F811  # the fixture above
    for name in ("lows", "refs"):
        Path(name).mkdir()
    for number in range(3):
        Image(noise(4, 5, 3, seed=number)).save(f"lows/{number}.png")
        Image(noise(20, 24, 3, seed=9 + number)).save(f"refs/{number}.{('png', 'bmp')[number % 2]}")
    Path("lows/notes.txt").write_text("no image")
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


def test_an_image_takes_its_reference_from_a_folder(folders):
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


def test_two_images_are_not_written_into_one_file(folders):
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


@each("ending", [".png", ".PNG", ".Png", ".JPG", ".Tiff"])
def test_a_reference_of_the_same_name_in_any_case(tmp_path, ending):
    (tmp_path / f"a{ending}").touch()
    assert namesake(Path("lows/a.webp"), tmp_path).samefile(tmp_path / f"a{ending}")
