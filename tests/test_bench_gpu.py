"""What the benchmarks do on a GPU, as far as it goes without one: clock, choice, tables."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import devices
import harness
import peers
import plots
import report
import search
import tables
from sizes import Size

CUDA = torch.device("cuda", 0)
each = pytest.mark.parametrize


# --- the device ---


def test_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("record")

        def synchronize(self) -> None:
            calls.append("synchronize")

        def elapsed_time(self, last: "Event") -> float:
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert devices.timed(lambda: calls.append("run"), CUDA) == 0.0025
    assert calls == ["record", "run", "record", "synchronize"]


def test_results_are_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert devices.stem(CUDA, "search") == "nvidia-h100-80gb-hbm3"
    assert devices.stem(CUDA, "model") == "nvidia-h100-80gb-hbm3-model"
    assert devices.stem(devices.CPU, "transfer") == "transfer"


@each("name, message", [("meta", "must be cpu or cuda"), ("cuda", "sees no CUDA device")])
def test_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.pick(None) == devices.CPU
    with pytest.raises(SystemExit, match="2"):
        search.parse(["--device", name])
    assert message in capsys.readouterr().err


def test_graph_is_captured_once_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    nothing = SimpleNamespace(wait_stream=lambda other: None)

    class Capture:
        def __enter__(self) -> None:
            calls.append("begin")

        def __exit__(self, *error: object) -> None:
            calls.append("end")

    stand_ins = {
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: torch.no_grad(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: calls.append("replay")),
        "graph": lambda graph: Capture(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    run = harness.deferred(devices.graph_run, lambda: calls.append("run") or 7)
    assert (run(), run()) == (7, 7)
    assert calls == ["run"] * 3 + ["begin", "run", "end", "replay", "replay"]


def test_out_of_memory_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def raising(error: Exception):
        def run() -> None:
            raise error

        return harness.check_and_weigh(harness.Contender(run, dict, None), CUDA)

    assert raising(torch.OutOfMemoryError("20 GiB")) == {
        "status": "skipped",
        "reason": "out of memory",
    }
    assert raising(harness.Declined("not for this"))["status"] == "skipped"
    assert raising(AttributeError("tl.dot")) == {
        "status": "failed",
        "reason": "AttributeError: tl.dot",
    }


def test_sizes_that_a_gpu_leaves_to_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.memory, "available_bytes", lambda device: 1 << 50)
    monkeypatch.setattr(search.peers.backends, "why_not", lambda backend, device: None)
    args = search.parse(["--device", "cpu"])
    args.device = CUDA
    reasons = {
        (name, text): search.why_not(name, Size.parse(text), [], args)
        for name in ("triton-fp16", "triton-fp16-graph", "rolled-fp16", "unfold")
        for text in ("9*40x40", "270x480", "540x960")
    }
    skipped = {place for place, reason in reasons.items() if reason is not None}
    assert skipped == {
        ("triton-fp16-graph", "270x480"),
        ("triton-fp16-graph", "540x960"),
        ("rolled-fp16", "540x960"),
        ("unfold", "540x960"),
    }


# --- its tables ---


def gpu_results() -> dict:
    """As a run on a GPU writes them, two candidates at two sizes."""
    rows = {}
    for name, algorithm in (("triton-fp16", "rolled"), ("unfold-fp16", None)):
        candidate = peers.ALL[name]
        record = {"status": "ok", "median_s": 1e-3, "low_s": 9e-4, "high_s": 2e-3, "reps": 9}
        record |= {"peak_bytes": 3e6, "max_abs_error": 1e-7, "index_agreement": 0.998}
        candidate = peers.replace(candidate, products=3, algorithm=algorithm)
        rates = {"float16": 400e12}
        rows[name] = {
            "label": candidate.label,
            "backend": candidate.backend,
            "algorithm": algorithm,
            **search.with_rates(record, candidate, 500_000_000, 256, rates),
        }
    entry = {"query": [125, 185], "key": [125, 185], "batch": 1, "pairs": 500_000_000}
    entry |= {"gemm_flop_per_s": {"float16": 400e12}, "gemms": {"float16 256": 400e12}}
    entry |= {"pixel_gemm_operands": "float16", "pixel_gemm_s": 6.4e-4, "rows": rows}
    device = {"type": "cuda", "name": "NVIDIA H100", "memory_bytes": 8e10}
    return {
        "kind": "search",
        "machine": harness.machine(),
        "device": device | {"cuda": "13.0", "driver": "580.1"},
        "channels": 256,
        "sizes": [entry, {**entry, "batch": 2, "pairs": 1_000_000_000}],
    }


def test_tables_and_plot_of_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = gpu_results()
    row = data["sizes"][0]["rows"]["triton-fp16"]
    assert row["ps_per_pair"] == pytest.approx(2.0)
    assert row["effective_flop_per_s"] == pytest.approx(4608 * 0.5e12)
    assert row["gemm_share"] == pytest.approx(3 * 512 * 0.5e12 / 400e12)
    Console(width=160).print(tables.search_table(data, data["sizes"][1]))
    printed = capsys.readouterr().out
    assert "2 of 125x185, 256 channels, 1.00 G pairs" in printed
    assert "triton fp16 (rolled)" in printed and "2304 TFLOP/s" in printed
    text = report.markdown(data)
    assert "NVIDIA H100, CUDA 13.0, driver 580.1" in text
    assert "| queries in keys | 125x185 | 2 of 125x185 |" in text
    assert "| triton fp16 | 1.00 ms<br>3.00 MB | 1.00 ms<br>3.00 MB |" in text
    plots.draw(data, tmp_path / "gpu.png")
    with Image.open(tmp_path / "gpu.png") as image:
        image.verify()


def test_missing_matplotlib_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.draw({}, tmp_path / "x.png", Console(width=200))
    assert "x.png was not drawn: matplotlib is not installed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
