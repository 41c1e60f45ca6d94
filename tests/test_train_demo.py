"""The demonstration of a training: what it trains on, writes, and says."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from skimage.data import chelsea, coffee

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))  # as for a script of that folder

import photographs
import train_demo

QUICK = (
    "num_res_blocks=0+0+0+0",
    "n_feats=2",
    "start=random",
    "size=48",
    "batch_size=2",
    "crops_per_photo=1",
    "num_epochs=2",
)
SETTINGS = [word for setting in QUICK for word in ("--set", setting)]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Six photographs, of which the last is held out."""
    folder = tmp_path / "album"
    folder.mkdir()
    views = [(chelsea, 0), (coffee, 0), (chelsea, 40), (coffee, 40), (chelsea, 80), (coffee, 80)]
    for number, (photo, left) in enumerate(views):
        Image.fromarray(photo()[:220, left : left + 240]).save(folder / f"{number}.png")
    return folder


def run(album: Path, out: Path, *settings: str) -> int:
    return train_demo.main(["--photos", str(album), "--out", str(out), *SETTINGS, *settings])


def test_it_trains_measures_and_draws(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(album, out) == 1  # two steps do not beat bicubic
    data = json.loads((out / "train-demo.json").read_text())
    assert data["photographs"] == {"training": 5, "held out": 1}
    assert data["steps"] == [2, 4]
    assert len(data["psnr"]) == 2 and 0 < data["psnr"][-1] < data["bicubic"]
    said = capsys.readouterr().out
    assert said.startswith("4 steps in ") and f" {data['psnr'][-1]:.2f} dB on held-out" in said
    with Image.open(out / "train-demo.png") as image:
        assert image.width == 13 * 110
    seconds = data["seconds"]
    assert run(album, out) == 1  # is there already
    again = json.loads((out / "train-demo.json").read_text())
    assert again["steps"] == [2, 4] and again["seconds"] < seconds


def test_errors_take_a_line(
    album: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(album, tmp_path, "--set", "size=400") == 2
    assert capsys.readouterr().out.startswith("error: ")
    assert run(tmp_path / "none", tmp_path) == 2
    assert capsys.readouterr().out.splitlines()[0].startswith("error: cannot read ")


def test_photographs_are_fetched_once(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By programs that stand in for those of Debian."""
    bin, calls = tmp_path / "bin", tmp_path / "calls"
    bin.mkdir()
    scripts = {
        "apt-get": f"echo $2 >> {calls}\ntouch $2.deb",
        "dpkg-deb": f'mkdir photos && cp "{album}"/*.png photos && test "$3" = .',
    }
    for name, script in scripts.items():
        (bin / name).write_text(f"#!/bin/sh\nset -e\n{script}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    monkeypatch.setattr(photographs, "PACKAGES", {"some-wallpapers": ("0.png", "5.png")})
    found = photographs.collect(tmp_path / "photos")
    assert found == photographs.collect(tmp_path / "photos")
    assert calls.read_text() == "some-wallpapers\n"
    assert {path.name for path in found} == {"0.png", "5.png", *photographs.SCIKIT_IMAGE}
    assert (tmp_path / "photos" / "5.png").read_bytes() == (album / "5.png").read_bytes()
    monkeypatch.setattr(photographs, "PACKAGES", {"other": ("missing.png",)})
    with pytest.raises(OSError, match=r"other holds 0 files missing\.png"):
        photographs.collect(tmp_path / "photos")


def test_without_debian_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="cannot fetch .*apt-get.*name a folder of your own"):
        photographs.collect(tmp_path / "photos")
