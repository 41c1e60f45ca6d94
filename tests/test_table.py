"""Tables of an evaluation: means, and files that another program reads."""

import csv
import errno
import json
import math

import pytest

from ttsr_fast.evaluation.table import Failure, Row, Table

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

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "")

    monkeypatch.setattr("os.fsync", fail)
    for write in (table.to_csv, table.to_json):
        with pytest.raises(
            OSError, match=r"cannot write .*/a\.csv: the disk is full; the one befo"
        ):
            write(tmp_path / "a.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "older"


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM", "'@SUM"),
        ("\uff1d1", "'\uff1d1"),
        ("\t=1", "\\t=1"),
        ("\r=1", "\\r=1"),
        ("a\n=1", "a\\n=1"),
        ("caf\xe9 \U0001f600", "caf\xe9 \U0001f600"),
        ("\udcff\x1b[2J", "\\xff\\x1b[2J"),
    ],
)
def test_names_are_harmless_in_a_spreadsheet(tmp_path, name, cell):
    rows = [Row(name, -3.5, -0.25, 0.5, (name, "b.png"))]
    table = Table("ttsr", "c2", "all", rows, [Failure(name, name)])
    table.to_csv(tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        first, failed, _ = csv.reader(file.readlines()[1:])
    assert first == [cell, "-3.5", "-0.25", "0.5", f"{cell} b.png", ""]
    assert failed == [cell, "", "", "", "", cell]
    table.to_json(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["images"][0]["references"] == [name, "b.png"]
    assert content["failures"] == [{"name": name, "message": name}]
