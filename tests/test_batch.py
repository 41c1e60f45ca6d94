"""Several images on one command line."""

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
    result = run("upscale", "0.png", "1.png", "lows", "0.png", *OPTIONS, "-o", "out/deep")
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
    assert (again.exit_code, again.output) == (0, ""), "results are no inputs, and are kept"
    assert names(several) == sorted([*before, *made])
    assert_refused(run("upscale", "0_x4.png", "1_x4.png", *OPTIONS), "LR must name images, got .*")
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


def test_images_of_one_name_do_not_replace_one_another(several):
    Image(noise(5, 4, 3)).save("lows/0.png")
    result = run("upscale", "0.png", "lows/0.png", *OPTIONS, "-o", "out")
    assert result.exit_code == 1
    assert "cannot write out/0_x4.png: it is an input or another result" in result.stderr
    assert_right("out/0_x4.png", "0.png")
