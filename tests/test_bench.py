"""The runner of the benchmarks, their report, and the benchmarks of processes."""

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ttsr_fast import search as package_search

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import highres
import machine
import measure
import model
import report
import runner
import search
import sharded
import transfer
from gate import WrongResult
from measure import Entry
from registry import Declined, Size

MIB = 1 << 20
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
RESULTS = Path(__file__).parent.parent / "bench" / "results"
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # set by the benchmarks


# --- the runner ---


def test_runs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(1000))  # every run takes a second
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    runs = {name: partial(calls.append, name) for name in "abc"}
    timings = measure.time_interleaved(runs, seconds=2.0, min_reps=3)
    assert [timing.reps for timing in timings.values()] == [3, 3, 3]
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # a warm-up, then three rounds
    calls.clear()
    measure.time_interleaved(runs, seconds=20.0)
    assert "".join(calls[:9]) == "abc" + "aabbcc"  # a tenth of the time in every turn


def test_quantiles_and_slow_runs() -> None:
    timing = measure.summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert timing == measure.Timing(median_s=3.5, low_s=2.0, high_s=5.0, reps=6)
    calls = []
    runs = {"slow": lambda: calls.append(time.sleep(0.05))}
    timing = measure.time_interleaved(runs, seconds=0.01, min_reps=5)["slow"]
    assert (timing.reps, len(calls)) == (1, 1), "a slow run is not repeated"
    assert timing.median_s >= 0.05


def allocating_job(through_torch: bool):
    """A run that fills 64 MiB on the way to its result of 16 MiB; its input takes as much."""
    fill = torch.ones if through_torch else partial(np.ones, dtype=np.float32)

    def run(given: Tensor, mebibytes: int) -> Tensor:
        buffer = fill(mebibytes * MIB // 4)
        return given * float(buffer[0])

    return partial(run, torch.ones(1), 1), lambda: partial(run, torch.ones(4 * MIB), 64)


@each("through_torch", [True, False])
def test_memory_counts_every_allocation(through_torch: bool) -> None:
    peak = measure.peak_bytes(allocating_job, through_torch)
    assert peak == pytest.approx(64 * MIB, abs=3 * MIB)


def failing_job():
    raise ValueError("no such thing")


def test_memory_reports_a_failure() -> None:
    with pytest.raises(ValueError, match="no such thing"):
        measure.peak_bytes(failing_job)


@each(
    "error, record",
    [
        (torch.OutOfMemoryError("20 GiB"), {"status": "skipped", "reason": "out of memory"}),
        (Declined("not for this"), {"status": "skipped", "reason": "not for this"}),
        (
            AttributeError("tl.dot"),
            {"status": "failed", "wrong": False, "reason": "AttributeError: tl.dot"},
        ),
        (WrongResult("off"), {"status": "failed", "wrong": True, "reason": "off"}),
    ],
)
def test_errors_are_recorded(error: Exception, record: dict) -> None:
    def run() -> None:
        raise error

    assert measure.check_and_weigh(Entry(run, dict), CPU) == record


def test_missing_compiler_is_no_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(transfer, "_compiler", lambda: failing)
    place = ("gather_fold", "lv3", "NCHW", "random", Size((2, 3), (3, 2)))
    run = transfer.CANDIDATES["compile"].prepare(*transfer.inputs(*place))
    record = measure.check_and_weigh(Entry(run, dict), CPU)
    assert record == {"status": "skipped", "reason": "it does not compile: no compiler"}


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
    assert measure.timed(lambda: calls.append("run"), CUDA) == 0.0025
    assert calls == ["record", "run", "record", "synchronize"]


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
    run = measure.deferred(measure.graph_run, lambda: calls.append("run") or 7)
    assert (run(), run()) == (7, 7)
    assert calls == ["run"] * 3 + ["begin", "run", "end", "replay", "replay"]


def test_results_are_named_after_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert machine.stem(CUDA, "search") == "nvidia-h100-80gb-hbm3-search"
    assert machine.stem(CUDA, "model") == "nvidia-h100-80gb-hbm3-model"
    assert machine.stem(CPU, "transfer") == "transfer"


@each(
    "bench, options, message",
    [
        (search, ["--device", "meta"], "must be cpu or cuda"),
        (search, ["--device", "cuda"], "sees no CUDA device"),
        (search, ["--sizes", "0x4"], "must read 100x100, 100x100:108x96 or 9*40x40, got '0x4'"),
        (search, ["--sizes", "4x4@0"], "got '4x4@0', with @64 after it for 64 channels"),
        (transfer, ["--sizes", "4x4@8"], "9*40x40, got '4x4@8'\n"),
        (search, ["--channels", "0"], "--channels: must be positive"),
        (search, ["--threads", "0"], "--threads: must be positive"),
        (model, ["--pair", "300x300:1200x1200"], "--pair is too large"),
    ],
)
def test_wrong_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bench: object,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        runner.parse(bench, options)
    assert message in capsys.readouterr().err


def test_sizes_are_read() -> None:
    assert Size.parse("8x9") == Size((8, 9), (8, 9))
    size = Size.parse("9*40x41:7x5")
    assert size == Size((40, 41), (7, 5), batch=9)
    assert (size.queries, size.keys, size.pairs) == (1640, 35, 9 * 1640 * 35)
    assert report.size_title(size.facts) == "9 of 40x41 in 7x5"
    size = Size.parse("9*40x41@32", 64)
    assert (size, size.channels) == (Size((40, 41), (40, 41), 9, 32), 32)
    assert Size.parse("8x9", 64).channels == 64
    assert report.size_title({**size.facts, "channels": 32}, 64) == "9 of 40x41, C = 32"
    assert report.size_title({**size.facts, "channels": 32}, 32) == "9 of 40x41"


# --- candidates that are not tried ---


def case_at(size: Size, operation: str = "search", skip=lambda candidate: None) -> SimpleNamespace:
    return SimpleNamespace(size=size, operation=operation, skip=skip)


@each("bench", [search, model], ids=["search", "model"])
def test_candidates_that_do_not_fit_or_are_slow(monkeypatch: pytest.MonkeyPatch, bench) -> None:
    args = runner.parse(bench, ["--device", "cpu", "--limit", "60"])
    why_not = runner.Runner(bench, args).why_not
    monkeypatch.setattr(runner.memory, "free_bytes", lambda device: 64 << 30)
    whole = bench is model
    operation, original = ("SearchTransfer", "reference") if whole else ("search", "unfold")
    huge = case_at(Size.parse("270x480"), operation)
    size = case_at(Size((1, 10), (1, 100)), operation)
    assert why_not(original, huge, []) == "does not fit (needs 69.6 GB)"
    before = [{"operation": operation, "pairs": 100}]
    before[0]["rows"] = {name: {"median_s": 7.0} for name in bench.CANDIDATES}
    reason = why_not(original, size, before)
    assert reason == "skipped (estimated 70.0 s)"
    ours = "cpp" if whole else "cpp-fp32"
    assert why_not(ours, size, before) is None
    before[0]["pairs"] = 200
    assert why_not(original, size, before) is None


def test_sizes_for_this_package_alone() -> None:
    skipped = {
        (name, size)
        for name in ("triton-fp16", "triton-fp16-graph", "unfold")
        for size in ("9*40x40", "270x480", "540x960")
        if search.skip(Size.parse(size), CUDA, search.CANDIDATES[name])
    }
    assert skipped == {
        ("triton-fp16-graph", "270x480"),
        ("triton-fp16-graph", "540x960"),
        ("unfold", "540x960"),
    }


# --- high resolution, and processes ---


def test_high_resolution_is_judged() -> None:
    truth = np.zeros((10, 100), np.uint8)
    row = {"status": "ok", "limit": "1GiB", "peak_bytes": 1 << 30}
    assert highres.judged(row, truth + 1, truth) == {**row, "equal": 0.0, "close": 1.0}
    assert highres.judged(row, truth + 2, truth)["reason"] == "only 0.00% are close"
    row["peak_bytes"] += 1
    assert highres.judged(row, truth, truth)["reason"] == "it took more memory than its limit"


def run_sharded(wrong):
    """A case of `bench/sharded.py`, with a search that may be wrong."""
    arguments = {"processes": dist.get_world_size(), "threads": 1, "seconds": 0.01}
    before = sharded.search_sharded
    if wrong:
        other = torch.ones(1, 4, 9, 8)
        sharded.search_sharded = lambda *args, **options: package_search(other, args[1])
    try:
        return sharded.run_case(Size((9, 8), (7, 6), channels=4), Namespace(**arguments))
    finally:
        sharded.search_sharded = before
        torch.set_num_threads(1)


@pytest.mark.xdist_group("processes")  # which are started once
@pytest.mark.compiled
@each("wrong", [False, True])
def test_processes(two, wrong):
    case, follower = two.run(run_sharded, wrong)
    rows = case["rows"]
    assert follower is None
    labels = ["1 process, 1 thread", "1 process, 2 threads", "2 processes, 1 thread each"]
    assert list(rows) == labels
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "failed" if wrong else "ok"]
    assert [row["key_bytes"] for row in rows.values()] == [4 * 4 * 7 * 6] * 2 + [4 * 4 * 5 * 6]
    if wrong:
        assert rows[labels[2]]["reason"] == "the result is not that of one process, bit for bit"
        assert "median_s" not in rows[labels[2]]
        return
    assert all(row["median_s"] > 0 and row["peak_bytes"] >= 0 for row in rows.values())
    data = {"kind": "sharded", "labels": {name: name for name in rows}, "cases": [case]}
    assert [row[0] for row in report.tables(data)[0].rows] == labels


def test_processes_need_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit):
        sharded.parse([])
    assert "torchrun --nproc-per-node 2 bench/sharded.py" in capsys.readouterr().err


# --- the report ---


@each("kind", ["search", "transfer", "transfer-batch", "model", "highres"])
def test_kept_results_have_tables(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(RESULTS / f"{kind}.json")]) == 0
    first = {
        "search": "| 40x40 | 2.56 M | 5.15 ms<br>3.70 MB | 6.36 ms<br>1.76 MB |",
        "transfer": "| gather_fold | lv1 | NCHW | 16.8/15.5/8.04<br>1.94 MB |",
        "transfer-batch": "| gather_fold | all three | NHWC | ",
        "model": "| SearchTransfer | 9 of 40x40 | 122 ms<br>520 kB |  | 756 ms<br>281 MB |",
        "highres": "| ttsr | 6GiB | 100 s | 3.11 GB | 100.0000% | 100.0000% |",
    }
    assert first[kind] in capsys.readouterr().out


@each(
    "text, expected",
    [
        (report.seconds_text(59.96), "60.0 s"),
        (report.seconds_text(0.0123456), "12.3 ms"),
        (report.seconds_text(4e-6), "4.00 µs"),
        (report.bytes_text(67.18e9), "67.2 GB"),
        (report.bytes_text(1.5e6), "1.50 MB"),
        (report.bytes_text(200), "0.20 kB"),
        (report.bytes_text(None), "not measured"),
        (report.count_text(16.8e9), "16.8 G"),
        (report.count_text(7), "7.00"),
        (report.flop_text(2.5e12), "2.50 TFLOP/s"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


@each("content", ['{"kind": "weather"}', "no json", "{}"])
def test_report_refuses_other_files(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert "other.json" in capsys.readouterr().err
