"""Tiny runs of the benchmarks: their results and tables, and no time for a wrong result."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ttsr_fast import reference
from ttsr_fast.operators import library

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import machine
import model
import model_candidates
import report
import runner
import search
import search_candidates
import transfer
from gate import SearchTruth, WrongResult
from machine import CPU
from registry import Size

QUICK = ["--device", "cpu", "--quick", "--seconds", "0.001", "--no-memory"]
IMAGES = ["--pair", "4x5:16x20", "--patch", "2*4x4"]
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set by the benchmarks


# --- search ---


def run_search(folder: Path, *names: str) -> int:
    sizes = ["--sizes", "8x8", "6x9:7x5", "--channels", "16", "--seconds", "0.001"]
    options = [*sizes, "--device", "cpu", "--out", str(folder), "--candidates", *names]
    return runner.main(search, options)


def test_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_search(tmp_path, "torch-fp32", "unfold", "chunked") == 0
    data = json.loads((tmp_path / "search.json").read_text())
    assert data["machine"]["versions"]["torch"] and "commit" in data["machine"]
    assert [case["pairs"] for case in data["cases"]] == [64 * 64, 54 * 35]
    for case in data["cases"]:
        assert list(case["rows"]) == list(data["labels"]) == ["torch-fp32", "unfold", "chunked"]
        for row in case["rows"].values():
            assert row["status"] == "ok" and row["peak_bytes"] >= 0
            assert row["low_s"] <= row["median_s"] <= row["high_s"]
            assert row["pairs_per_s"] == pytest.approx(case["pairs"] / row["median_s"])
            assert row["effective_flop_per_s"] == pytest.approx(row["pairs_per_s"] * 2 * 9 * 16)
            assert row["index_agreement"] == 1
        row = case["rows"]["torch-fp32"]
        assert row["gemm_share"] * row["median_s"] == pytest.approx(case["pixel_gemm_s"])
    assert "At 6x9 in 7x5, where one product over pixels takes" in capsys.readouterr().out
    assert report.main([str(tmp_path / "search.json")]) == 0
    printed = capsys.readouterr().out
    assert "| queries in keys | pairs | torch fp32 | unfold + bmm | in chunks |" in printed
    assert "| 8x8 | 4.10 k | " in printed


def test_wrong_search_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def prepare(query: Tensor, key: Tensor):
        def wrong() -> tuple[Tensor, Tensor]:
            calls.append(query.shape)
            score, index = reference.search(query, key)
            return score + 1e-3, index

        return wrong

    broken = replace(search.CANDIDATES["torch-fp32"], prepare=prepare)
    monkeypatch.setitem(search.CANDIDATES, "torch-fp32", broken)
    assert run_search(tmp_path, "torch-fp32") == 1
    assert "torch fp32: FAILED: a score is off by 1.0e-03" in capsys.readouterr().out
    for case in json.loads((tmp_path / "search.json").read_text())["cases"]:
        row = case["rows"]["torch-fp32"]
        assert row["status"] == "failed"
        assert not {"median_s", "pairs_per_s", "peak_bytes"} & set(row)
    assert len(calls) == 2, "one run per size, for the check"


SMALL = Size((2, 3), (3, 2), batch=4, channels=2)
BASELINES = {name for name, candidate in search.CANDIDATES.items() if candidate.baseline}


@each("name", sorted(BASELINES - {"keops", "compile"}))  # these compile
@each("size", [Size((7, 9), (6, 8), 1, 8), Size((4, 5), (6, 3), 2, 4)], ids=["one", "batch"])
def test_baselines_of_the_search_are_right(name: str, size: Size) -> None:
    candidate, maps = search.CANDIDATES[name], search_candidates.maps(size)
    if candidate.package is None:
        found = search.check(SearchTruth(*maps), candidate, candidate.prepare(*maps)())
        assert found["index_agreement"] == 1 or candidate.operands != "float32"
    else:
        assert candidate.why_not(CPU) in (None, f"{candidate.package} is not installed")


@each("limit", [1, 2500])  # bytes of a row of an image, and of two images of four
def test_baseline_in_chunks(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search_candidates, "BLOCK_BYTES", limit)
    candidate, maps = search.CANDIDATES["chunked"], search_candidates.maps(SMALL)
    assert search.check(SearchTruth(*maps), candidate, candidate.prepare(*maps)())
    assert candidate.bytes_needed(SMALL, "search") < 1000, "of an image"


@pytest.mark.compiled
def test_row_names_the_instruction_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_search(tmp_path, "cpp-fp32", "cpp-bf16") == 0
    isa = library.instruction_set()
    printed = capsys.readouterr().out
    assert f"kernels for {isa}, " in printed and f"cpp bf16 ({isa})  " in printed
    for case in json.loads((tmp_path / "search.json").read_text())["cases"]:
        assert {row["instruction_set"] for row in case["rows"].values()} == {isa}
        assert ("bfloat16 16" in case["gemm_flop_per_s"]) == machine.multiplies_bfloat16()
        assert isa not in ("amx", "avx512_bf16") or machine.multiplies_bfloat16()
    maps = {size: search_candidates.maps(Size.parse(size)) for size in ("8x8", "16x16:48x48")}
    for name, precision in (("cpp-fp32", "fp32"), ("cpp-bf16", "bf16")):
        rows = {size: search.resolved(search.CANDIDATES[name], *x) for size, x in maps.items()}
        assert (rows["8x8"].products, rows["8x8"].operands) == (1, "float32")
        expected = {("amx", "fp32"): 3, ("amx", "bf16"): 1, ("avx512_bf16", "bf16"): 1}
        products = expected.get((isa, precision))
        large = rows["16x16:48x48"]
        assert large.products == (products or 1)
        assert large.operands == ("bfloat16" if products else "float32")


def test_results_of_a_gpu() -> None:
    size = Size((125, 4000), (10, 100))  # half a billion pairs
    row = {"status": "ok", "median_s": 1e-3, "low_s": 9e-4, "high_s": 2e-3, "peak_bytes": 3e6}
    row |= {"max_abs_error": 1e-7, "index_agreement": 0.998}
    candidate = replace(search.CANDIDATES["triton-fp16"], products=3, algorithm="rolled")
    row |= search.rates_of(1e-3, candidate, size, {"float16": 400e12})
    assert row["pairs_per_s"] == pytest.approx(0.5e12)
    assert row["effective_flop_per_s"] == pytest.approx(4608 * 0.5e12)
    assert row["gemm_share"] == pytest.approx(3 * 512 * 0.5e12 / 400e12)
    case = {**size.facts, "gemm_flop_per_s": {"float16 256": 400e12}, "pixel_gemm_s": 6.4e-4}
    case |= {"pixel_gemm_operands": "float16", "rows": {"triton-fp16": row}}
    device = {"type": "cuda", "name": "NVIDIA H100", "cuda": "13.0", "driver": "580.1"}
    data = {"kind": "search", "machine": machine.facts(), "device": device}
    data |= {"labels": {"triton-fp16": "triton fp16"}, "cases": [case, {**case, "batch": 2}]}
    markdown = report.markdown(data)
    assert "NVIDIA H100, CUDA 13.0, driver 580.1" in markdown
    assert "| queries in keys | 125x4000 in 10x100 | 2 of 125x4000 in 10x100 |" in markdown
    assert "| triton fp16 | 1.00 ms<br>3.00 MB | 1.00 ms<br>3.00 MB |" in markdown
    assert "| triton fp16 (rolled) | 2.00 | 2304 TFLOP/s |" in markdown


# --- transfer ---


def test_transfer(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    names = ["torch", *(n for n, c in transfer.CANDIDATES.items() if c.baseline and n != "compile")]
    options = [*QUICK, "--sizes", "5x7:6x4", "2*3x4", "--levels", "lv3", "all three"]
    options += ["--out", str(tmp_path), "--candidates", *names]
    assert runner.main(transfer, options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"transfer.json", "transfer-batch.json"}
    data = json.loads((tmp_path / "transfer.json").read_text())
    assert len(data["cases"]) == 2 * 3 * 2 * 2
    for case in data["cases"]:
        assert ("index_add" in case["rows"]) == (case["operation"] == "adjoint")
        for row in case["rows"].values():
            rate = case["least_bytes"] / row["median_s"]
            assert row["copy_share"] == pytest.approx(rate / case["copy_bytes_per_s"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    cells = [cell for row in report.tables(data)[0].rows for cell in row[3:]]
    for part in " ".join(cells).split():  # nothing is cut
        assert part in printed
    assert "| gather_fold | lv3 | NHWC | " in report.markdown(data)


def test_wrong_transfer_is_refused() -> None:
    place = ("gather_fold", "lv3", "NCHW", "random", Size((7, 9), (6, 8)))
    check, inputs = transfer.gate(place), transfer.inputs(*place)
    (result,) = transfer.CANDIDATES["torch"].prepare(*inputs)()
    assert check((result,))["max_relative_error"] < 1e-6
    with pytest.raises(WrongResult, match="lv3 is off by"):
        check((result + 0.1,))


def test_least_traffic() -> None:
    index = torch.tensor([[[0, 7]]])  # a corner and a key inside: 4 and 9 blocks, 2 of them in both
    maps = transfer.make_maps("lv2", "NCHW", Size((1, 2), (4, 5)))
    block = 2 * 128 * 2 * 4
    forward = transfer.least_bytes("gather_fold", (4, 5), *maps, index)
    assert forward == 2 * 8 + (4 + 9 - 2 + 2) * block
    assert transfer.least_bytes("adjoint", (4, 5), *maps, index) == 2 * 8 + (20 + 2) * block


# --- model ---


def test_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "PAIRS", 1000)
    options = [*QUICK, *IMAGES, "--candidates", "torch", "reference", "--out", str(tmp_path)]
    assert runner.main(model, [*options, "--sizes", "7x8", "2*4x5"]) == 0
    data = json.loads((tmp_path / "model.json").read_text())
    cases = {(case["operation"], case["title"]): case["rows"] for case in data["cases"]}
    assert list(cases) == [
        ("SearchTransfer", "2 of 4x5"),
        ("with gradients", "2 of 4x5"),
        ("SearchTransfer", "7x8"),
        ("TTSR", "LR 4x5, reference 16x20"),
        ("training step", "LR 2 of 4x4"),
    ]
    assert all(row["status"] == "ok" for rows in cases.values() for row in rows.values())
    checked = [rows["torch"].get("checked_queries") for rows in cases.values()]
    assert checked == [None, None, 56, None, None]
    for operation, stages in (("TTSR", 4), ("training step", 6)):
        rows = next(rows for (name, _), rows in cases.items() if name == operation)
        for row in rows.values():
            assert list(row["stages_s"]) == list(model_candidates.STAGES[:stages])
    capsys.readouterr()
    assert report.main([str(tmp_path / "model.json")]) == 0
    printed = capsys.readouterr().out
    assert "|  | size | torch | original | faster | error | checked |" in printed
    assert "|  |  | LTE | search | transfer | MainNet | backward | Adam |" in printed
    rows = cases["SearchTransfer", "7x8"]
    faster = rows["reference"]["median_s"] / rows["torch"]["median_s"]
    assert f"| {report.digits(faster)} x |" in printed


def test_wrong_module_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(model_candidates.SearchTransfer):
        def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
            score, *textures = super().forward(*maps)
            return score + 1e-3, *textures

    monkeypatch.setattr(model_candidates, "SearchTransfer", Wrong)
    options = [*QUICK, *IMAGES, "--candidates", "torch", "--out", str(tmp_path)]
    assert runner.main(model, [*options, "--sizes", "4x5"]) == 1
    row = json.loads((tmp_path / "model.json").read_text())["cases"][0]["rows"]["torch"]
    assert (row["status"], row["wrong"]) == ("failed", True) and "median_s" not in row


def test_gate_of_large_maps() -> None:
    maps, _ = model_candidates.make_features(Size((6, 20), (9, 21)))
    check, result = model.large_check(maps), reference.search_transfer(*maps)
    assert check(result)["checked_queries"] == 120
    for n, message in ((0, "a score is off by"), (2, "T_lv2 is off by")):
        wrong = [x.clone() for x in result]
        wrong[n][0, 0] += 1
        with pytest.raises(WrongResult, match=message):
            check(tuple(wrong))


@each("operation", model_candidates.MODEL)
def test_gate_of_the_model(operation: str) -> None:
    place = (operation, Size((4, 5), (16, 20)), CPU)
    check = model.model_check(*place)
    result = model_candidates.Subject("torch", *place).run()
    assert check(result)["max_relative_error"] < 1e-2
    with pytest.raises(WrongResult, match=r"(sr|loss) is off by"):
        check((result[0] + 1e-2, *result[1:]))
    with pytest.raises(WrongResult, match="is off by"):
        check((*result[:-1], 1.1 * result[-1]))


def test_training_step_trains() -> None:
    size = Size((4, 5), (16, 20), batch=2)
    subject = model_candidates.Subject("torch", "training step", size)
    losses = [subject.run()[0].item() for _ in range(4)]
    assert losses[-1] < losses[0]
