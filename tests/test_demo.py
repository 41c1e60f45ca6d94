"""The demonstration: what it measures, draws and saves."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))  # as for a script of that folder

import demo


def test_demo_draws_and_beats_bicubic(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    window = (slice(120, 281), slice(320, 495))
    pair = [view[window] for view in demo.stereo_motorcycle()]
    monkeypatch.setattr(demo, "stereo_motorcycle", lambda: pair)
    monkeypatch.setattr(demo, "DETAILS", {"red": (40, 24)})
    assert demo.main(["--out", str(tmp_path / "images" / "demo.png")]) == 0
    bicubic, ours = re.findall(r"(\d+\.\d+) dB", capsys.readouterr().out)
    assert float(ours) > float(bicubic) + 1
    sizes = {}
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as image:
            image.load()
            sizes[path.name] = image.size
    assert sizes.pop("demo.png")[0] == 1550
    whole = (172, 160)
    assert sizes == {"lr.png": (43, 40), "ref.png": (175, 161), "sr.png": whole, "truth.png": whole}


def test_demo_follows_the_matches() -> None:
    y, x = torch.meshgrid(torch.arange(10), torch.arange(12), indexing="ij")
    index = (4 * y + 3) * 100 + 4 * x + 9
    index[4, 4] = 0  # one stray match
    assert demo.matched_box((8, 12, 28, 32), index, (100, 100)) == (17, 15, 37, 35)
    assert demo.matched_box((8, 12, 28, 32), index, (33, 100)) == (17, 13, 37, 33)  # the edge
