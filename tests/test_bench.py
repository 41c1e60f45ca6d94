"""The benchmarks: what they refuse, what they measure, and what they write."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from ttsr_fast import reference

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import harness
import memory
import peers
import plots
import report
import search
import tables
import text
import transfer
import transfer_peers
from gate import SearchTruth, WrongResult
from sizes import Size

MIB = 1 << 20
CPU = torch.device("cpu")
QUERY, KEY = (7, 9), (6, 8)
each = pytest.mark.parametrize
Found = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the benchmarks set it for the libraries they load


@pytest.fixture(scope="module")
def maps() -> Found:
    return peers.maps(Size(QUERY, KEY), channels=8)


@pytest.fixture(scope="module")
def truth(maps: Found) -> SearchTruth:
    return SearchTruth(*maps)


# --- time ---


def test_quantiles() -> None:
    timing = harness.summarise([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert timing == harness.Timing(median_s=3.5, low_s=2.0, high_s=5.0, reps=6)


def test_runs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    clock = iter(range(1000))  # every run takes a second
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    runs = {name: partial(calls.append, name) for name in "abc"}
    timings = harness.time_interleaved(runs, seconds=2.0, min_reps=3)
    assert [timing.reps for timing in timings.values()] == [3, 3, 3]
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # a warm-up, then three rounds
    calls.clear()
    harness.time_interleaved(runs, seconds=20.0)
    assert "".join(calls[:9]) == "abc" + "aabbcc"  # a tenth of the time in every turn


def test_slow_run_is_not_repeated() -> None:
    calls = []
    runs = {"slow": lambda: calls.append(time.sleep(0.05))}
    timing = harness.time_interleaved(runs, seconds=0.01, min_reps=5)["slow"]
    assert (timing.reps, len(calls)) == (1, 1)
    assert timing.median_s >= 0.05


# --- memory ---


def allocating_job(through_torch: bool):
    """A run that fills 64 MiB on the way to its result of 16 MiB; its input takes as much."""
    fill = torch.ones if through_torch else partial(np.ones, dtype=np.float32)

    def run(given: Tensor, mebibytes: int) -> Tensor:
        buffer = fill(mebibytes * MIB // 4)
        return given * float(buffer[0])

    return partial(run, torch.ones(1), 1), lambda: partial(run, torch.ones(4 * MIB), 64)


@each("through_torch", [True, False])
def test_memory_counts_whoever_allocates(through_torch: bool) -> None:
    peak = memory.peak_bytes(allocating_job, through_torch)
    assert peak == pytest.approx(64 * MIB, abs=3 * MIB)


def failing_job():
    raise ValueError("no such thing")


def test_memory_passes_a_failure_on() -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        memory.peak_bytes(failing_job)


# --- the search benchmark ---


def arguments(folder: Path, *more: str) -> list[str]:
    sizes = ["--sizes", "8x8", "6x9:7x5", "--channels", "16", "--seconds", "0.001"]
    sizes += ["--device", "cpu"]
    return [*sizes, "--backends", "torch-fp32", "--out", str(folder), *more]


def test_sweep_writes_results_a_plot_and_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main(arguments(tmp_path, "--peers", "unfold", "chunked")) == 0
    data = json.loads((tmp_path / "search.json").read_text())
    assert [entry["pairs"] for entry in data["sizes"]] == [54 * 35, 64 * 64]
    for entry in data["sizes"]:
        assert list(entry["rows"]) == ["torch-fp32", "unfold", "chunked"]
        for row in entry["rows"].values():
            assert row["status"] == "ok"
            assert row["low_s"] <= row["median_s"] <= row["high_s"]
            assert row["pairs_per_s"] == pytest.approx(entry["pairs"] / row["median_s"])
            assert row["effective_flop_per_s"] == pytest.approx(row["pairs_per_s"] * 2 * 9 * 16)
            assert row["index_agreement"] == 1
        shares = [row["gemm_share"] for row in entry["rows"].values()]
        assert shares[0] * entry["rows"]["torch-fp32"]["median_s"] == pytest.approx(
            entry["pixel_gemm_s"]
        )
    with Image.open(tmp_path / "search.png") as image:
        image.verify()
    assert "6x9 in 7x5, 16 channels, 1.89 k pairs" in capsys.readouterr().out

    images = tmp_path / "images"
    assert report.main([str(tmp_path / "search.json"), "--images", str(images)]) == 0
    printed = capsys.readouterr().out
    assert "| queries in keys | pairs | torch fp32 | unfold + bmm | in chunks |" in printed
    assert "| 8x8 | 4.10 k | " in printed
    assert [path.name for path in images.iterdir()] == ["search.png"]


def test_no_time_is_given_for_a_wrong_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def wrong(query: Tensor, key: Tensor) -> Found:
        calls.append(query.shape)
        score, index = reference.search(query, key)
        return score + 1e-3, index

    monkeypatch.setitem(peers.ALL, "torch-fp32", replace(peers.ALL["torch-fp32"], search=wrong))
    assert search.main(arguments(tmp_path, "--no-peers")) == 1
    assert "torch fp32: FAILED: a score is off by 1.0e-03" in capsys.readouterr().out
    for entry in json.loads((tmp_path / "search.json").read_text())["sizes"]:
        row = entry["rows"]["torch-fp32"]
        assert row["status"] == "failed"
        assert not {"median_s", "pairs_per_s", "peak_bytes"} & set(row)
    assert len(calls) == 2, "one run per size, for the check"


def test_what_does_not_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    args = search.parse(["--quick", "--device", "cpu"])
    huge = Size.parse("270x480")
    assert peers.ALL["unfold"].bytes_needed(huge, 256) > 67e9
    monkeypatch.setattr(memory, "available_bytes", lambda device: 64 << 30)
    assert search.why_not("unfold", huge, [], args) == "does not fit (needs 69.6 GB)"
    assert search.why_not("chunked", huge, [], args) is None

    never = replace(peers.ALL["unfold"], search=lambda query, key: pytest.fail("it was tried"))
    monkeypatch.setitem(peers.ALL, "unfold", never)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    args.channels, args.seconds = 8, 0.001
    size = Size.parse("8x8")
    entry = search.measure_size(size, ["unfold"], [], args, step=lambda text: None)
    assert entry["rows"]["unfold"]["reason"].startswith("does not fit")


def test_all_but_the_default_are_skipped_where_slow() -> None:
    args = search.parse(["--limit", "60", "--device", "cpu"])
    before = [{"pairs": 100, "rows": {name: {"median_s": 7.0} for name in peers.ALL}}]
    size = Size((1, 10), (1, 100))
    assert search.why_not("chunked", size, before, args) == "skipped (estimated 70.0 s)"
    assert search.why_not("torch-fp32", size, before, args) == "skipped (estimated 70.0 s)"
    assert search.why_not("cpp-fp32", size, before, args) is None
    before[0]["pairs"] = 200
    assert search.why_not("chunked", size, before, args) is None


def test_sizes_are_read() -> None:
    assert Size.parse("8x9") == Size((8, 9), (8, 9))
    size = Size.parse("9*40x41:7x5")
    assert size == Size((40, 41), (7, 5), batch=9)
    assert (size.queries, size.keys, size.pairs) == (1640, 35, 9 * 1640 * 35)
    assert text.size_title(vars(size)) == "9 of 40x41 in 7x5"


def test_chunks_of_a_batch() -> None:
    maps = peers.maps(Size((4, 5), (6, 3), batch=2), channels=4)
    assert SearchTruth(*maps).check(peers.PEERS["chunked"].search(*maps))["index_agreement"] == 1


@each("text", ["8", "8x", "0x4", "8x8:3", "8x8:3x3:1x1", "0*4x4", "2*3*4x4"])
def test_size_that_makes_no_sense(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        search.parse(["--sizes", text])
    assert f"must read 100x100, 100x100:108x96 or 9*40x40, got '{text}'" in capsys.readouterr().err


@each("name", [name for name in peers.PEERS if name not in ("keops", "compile")])  # these compile
def test_peers_are_right(name: str, maps: Found, truth: SearchTruth) -> None:
    peer = peers.PEERS[name]
    reason = peer.why_not(CPU)
    if reason is None:
        found = truth.check(peer.search(*maps), peer.tolerance, peer.score_tolerance)
        assert found["index_agreement"] == 1 or peer.operands != "float32"
    else:
        assert "is not installed" in reason


# --- the transfer benchmark ---


PEERS = [name for name in transfer_peers.PEERS if name != "compile"]  # which takes long
F32, F16 = torch.float32, torch.float16


def test_transfer_cases_are_right_and_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["torch", *PEERS]
    size = Size((5, 7), (6, 4), batch=2)
    data = {
        "kind": "transfer",
        "machine": harness.machine(),
        **vars(size),
        "labels": {name: transfer_peers.ALL[name].label for name in names},
        "cases": [],
        "copy_bytes_per_s": 2e10,
    }
    for case, contenders in transfer.cases(dict.fromkeys(transfer.GROUPS, names), size, F32):
        rows = {}
        for name, contender in contenders.items():
            accuracy = contender.check(contender.run())
            rows[name] = {"status": "ok", "median_s": 2e-3, "peak_bytes": 5e6, **accuracy}
        assert ("index_add" in rows) == (case["operation"] == "adjoint")
        data["cases"].append(case | {"rows": rows})
    assert len(data["cases"]) == 4 * 3 * 2 * 2

    Console(width=80).print(tables.transfer_table(data))
    printed = capsys.readouterr().out
    assert "Transfer, 2 of 5x7 in 6x4, float32" in printed
    cell = "2.00/2.00/2.00<br>5.00 MB"
    row = f"| gather_fold | lv1 | NHWC | {' | '.join([cell] * 3)} |  |"
    assert row in report.markdown(data)
    for part in cell.split("<br>"):  # nothing is cut, and every row has its label
        assert printed.count(part) == report.markdown(data).count(part)
    assert printed.count("\nadjoint      all three  NHWC ") == 2
    assert max(map(len, printed.splitlines())) <= 80
    plots.draw(data, tmp_path / "transfer.png")
    with Image.open(tmp_path / "transfer.png") as image:
        image.verify()


def test_transfer_writes_a_file_for_every_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--device", "cpu", "--quick", "--no-memory", "--seconds", "0.001"]
    options += ["--size", "3x4", "2*3x4", "--backends", "torch", "--out", str(tmp_path)]
    assert transfer.main([*options, "--peers", "reference"]) == 0
    stems = {"transfer", "transfer-batch"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{kind}" for stem in stems for kind in ("json", "png")
    }
    data = json.loads((tmp_path / "transfer-batch.json").read_text())
    assert (data["batch"], data["dtype"]) == (2, "float32")
    assert {case["level"] for case in data["cases"]} == {"all three"}
    for case in data["cases"]:
        for row in case["rows"].values():
            rate = case["least_bytes"] / row["median_s"]
            assert row["copy_share"] == pytest.approx(rate / case["copy_bytes_per_s"])


def test_wrong_transfer_is_refused() -> None:
    names = {"lv3": ["torch", "reference"]}
    _, contenders = next(transfer.cases(names, Size(QUERY, KEY), F32))
    (result,) = contenders["torch"].run()
    with pytest.raises(WrongResult, match="result 0 is off by"):
        contenders["torch"].check((result + 1e-4,))
    _, contenders = next(transfer.cases(names, Size(QUERY, KEY), F16))
    (result,) = contenders["torch"].run()
    for name, error in (("torch", WrongResult), ("reference", harness.Declined)):
        with pytest.raises(error, match="result 0 is off by"):
            contenders[name].check((result + 0.1,))


def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("no compiler")

    monkeypatch.setattr(transfer_peers, "_compiler", lambda: failing)
    for _, contenders in transfer.cases({"lv3": ["compile"]}, Size((2, 3), (3, 2)), F32):
        record = harness.check_and_weigh(contenders["compile"], CPU)
        assert record == {"status": "skipped", "reason": "it does not compile: no compiler"}


def test_bytes_that_have_to_move() -> None:
    size = Size((1, 2), (4, 5))
    index = torch.tensor([[[0, 7]]])  # a corner and a key inside: 4 and 9 blocks, 2 of them in both
    maps = transfer.make_maps("lv2", "NCHW", size, F16)
    block = 2 * 128 * 2 * 2
    forward = transfer.least_bytes("gather_fold", index, size.key, *maps)
    assert forward == 2 * 8 + (4 + 9 - 2 + 2) * block
    assert transfer.least_bytes("adjoint", index, size.key, *maps) == 2 * 8 + (20 + 2) * block


def test_transfer_jobs_repeat_the_runs() -> None:
    size = Size(QUERY, KEY)
    job = (transfer.job, "torch", "adjoint", "lv2", "NHWC", "random", size, F32)
    (gradient,) = job[0](*job[1:])[1]()()
    maps = transfer.make_maps("lv2", "NCHW", size, F32)
    (truth,) = transfer.truths("lv2", transfer.make_index("random", size), *maps)["adjoint"]
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)


# --- text and pictures ---


@each(
    "text, expected",
    [
        (text.seconds_text(59.96), "60.0 s"),
        (text.seconds_text(0.0123456), "12.3 ms"),
        (text.seconds_text(4e-6), "4.00 µs"),
        (text.bytes_text(67.18e9), "67.2 GB"),
        (text.bytes_text(1.5e6), "1.50 MB"),
        (text.bytes_text(None), "not measured"),
        (text.count_text(16.8e9), "16.8 G"),
        (text.count_text(7), "7.00"),
    ],
)
def test_numbers_as_text(text: str, expected: str) -> None:
    assert text == expected


def test_labels_are_moved_apart_no_further_than_needed() -> None:
    assert plots.spread([0.0, 20.0, 22.0, 40.0], 10.0) == [0.0, 16.0, 26.0, 40.0]
    assert plots.spread([0.0, 1.0, 2.0], 10.0) == [-9.0, 1.0, 11.0]


@each("content", ['{"kind": "weather"}', "no json", "{}"])
def test_report_refuses_other_files(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert "other.json" in capsys.readouterr().err
