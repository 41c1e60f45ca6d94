"""Several images on one command line."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_cli import LOW, REF, assert_refused, folder, names, noise, run  # noqa: F401
from ttsr_fast.cli.record import NAME
from ttsr_fast.images import Image, read_image
from ttsr_fast.upscaling import upscale

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
