"""Tables of an evaluation: means, and files that another program reads."""

import csv
import json
import math
from pathlib import Path

import pytest

from ttsr_fast.table import Failure, Row, Table

ROWS = [Row("a", 30.0, 0.9, 0.5, ("a_1.png", "a_2.png")), Row("b, c", 25.0, 0.6, 1.5, ("LR",))]
EQUAL = Row("e", math.inf, 1.0, 1.0, ())


def test_means():
    table = Table("ttsr", "c2", "all", ROWS, [Failure("d", "broken")])
    assert (table.psnr, table.ssim, table.seconds, table.equal) == (27.5, 0.75, 1.0, 0)
    table = Table("ttsr", "c2", "all", [*ROWS, EQUAL], [])
    assert (table.psnr, table.equal) == (27.5, 1)
    assert table.ssim == pytest.approx(2.5 / 3)
    assert Table("ttsr", "c2", "all", [EQUAL], []).psnr == math.inf


def test_files(tmp_path):
    failures = [Failure("d", "cannot read d.png: cut short")]
    table = Table("ttsr", "c2", "all", [*ROWS, EQUAL], failures)
    table.to_csv(tmp_path / "a.csv")
    table.to_json(tmp_path / "a.json")
    assert b"\r" not in (tmp_path / "a.csv").read_bytes()
    with open(tmp_path / "a.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["a", "b, c", "e", "d", "mean"]
    assert lines[0]["references"] == "a_1.png a_2.png"
    assert [float(line["psnr"] or "nan") for line in lines[:3]] == [30, 25, math.inf]
    assert (lines[3]["psnr"], lines[3]["error"]) == ("", failures[0].message)
    assert float(lines[4]["psnr"]) == 27.5
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["images"][1] == {
        "name": "b, c",
        "psnr": 25.0,
        "ssim": 0.6,
        "seconds": 1.5,
        "references": ["LR"],
    }
    assert (content["psnr"], content["equal"], content["images"][2]["psnr"]) == (27.5, 1, "inf")
    assert content["failures"] == [{"name": "d", "message": failures[0].message}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_a_file_appears_whole_or_not(tmp_path, monkeypatch):
    table = Table("ttsr", "c2", "all", ROWS, [])
    (tmp_path / "a.csv").write_text("older")
    with pytest.raises(OSError, match=r"cannot write .*/none/a\.csv: No such file"):
        table.to_csv(tmp_path / "none" / "a.csv")

    def fail(self, text, **options):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match=r"cannot write .*/a\.csv: No space left on device"):
        table.to_csv(tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "older"
