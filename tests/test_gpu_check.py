"""The measurements on a GPU, as far as they go without one: clock, tuning, the whole check."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

from ttsr_fast import gather_fold

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import devices
import gpu_check
import harness
import kernel_smoke
import peers
import plots
import report
import search
import tables
import tune
from gpu_check import Step
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
    assert devices.stem(CUDA, "tune") == "nvidia-h100-80gb-hbm3-tune"
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


# --- tuning ---


def row(tile: list[int], **times_s: float) -> dict:
    return {"tile": tile, "ring_bytes": None, "status": "ok", "times_s": times_s}


def test_the_winner_is_the_best_over_all_sizes() -> None:
    rows = [
        row([1, 1, 1, 4, 1], small=1.0, large=30.0),  # 1 + 1.5
        row([2, 2, 2, 4, 1], small=1.2, large=20.0),  # 1.2 + 1
        row([3, 3, 3, 4, 1], small=3.0, large=21.0),
        {**row([4, 4, 4, 4, 1]), "status": "failed", "reason": "out of resource: shared memory"},
    ]
    assert tune.winner(rows)["tile"] == [2, 2, 2, 4, 1]
    assert tune.winner(rows[3:]) is None
    groups = [{"algorithm": "rolled", "operands": "float16", "winner": [64, 128, 64, 4, 3]}]
    groups += [{"algorithm": "slab", "operands": "float32", "winner": [32, 64, 64, 4, 1]}]
    groups[1]["ring_bytes"] = 16 << 20
    assert list(tune.winners({"target": "sm_90", "groups": groups})) == [
        '("rolled", "sm_90", "float16"): Tile(64, 128, 64, 4, 3),',
        '("slab", "sm_90", "float32"): Tile(32, 64, 64, 4, 1),',
        "RING_BYTES = 16 << 20  # best for float32",
    ]


@dataclass(frozen=True)
class Tile:
    name: str


def test_candidates_that_fail_are_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--sizes", "4x5", "--channels", "4", "--seconds", "0.001"]
    args = search.parse(["--device", "cpu", "--tune", *sizes])
    reference = peers.PEERS["unfold"].search

    def by_tile(query, key, algorithm, precision, tile):
        if tile.name == "large":
            raise RuntimeError("out of resource: shared memory")
        score, index = reference(query, key)
        return (score + 1e-3 if tile.name == "wrong" else score), index

    monkeypatch.setattr(peers, "algorithm_search", by_tile)
    tiles = {Tile(name): None for name in ("right", "large", "wrong")}
    problems = list(tune.make_problems(args, ["fp16"]))
    options = {"problems": problems, "args": args}
    rows = tune.time_all("direct", tiles, deadline=time.monotonic() + 60, **options)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed"]
    assert rows[0]["times_s"]["fp16 4x5"] > 0 and not rows[1]["times_s"]
    assert [row.get("wrong") for row in rows] == [None, None, True]
    late = tune.time_all("direct", tiles, deadline=0.0, **options)
    assert {row["reason"] for row in late} == {"no time was left"}

    group = {"algorithm": "direct", "operands": "float16", "winner": ["right"], "rows": rows}
    Console(width=200).print(tune.group_table(group))
    printed = " ".join(capsys.readouterr().out.split())
    assert "fp16 4x5: RuntimeError: out of resource: shared memory: (large)" in printed
    assert "WRONG: fp16 4x5: a score is off by 1.0e-03" in printed


# --- the whole check ---


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def check(folder: Path, *steps: Step) -> tuple[int, list[dict], str]:
    code = gpu_check.main(["--out", str(folder)], list(steps))
    log = (folder / "gpu-check" / "gpu-check.log").read_text()
    return code, json.loads((folder / "gpu-check" / "gpu-check.json").read_text()), log


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_check, "PATIENCE", 1.0)


def test_steps_that_fail_do_not_end_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, outcomes, log = check(
        tmp_path,
        Step("bad", python("print('some output'); raise ValueError('seven')"), 20),
        Step("tool", ["compute-sanitizer"], 20, "compute-sanitizer is not installed"),
        Step("gone", [str(tmp_path / "nothing")], 20),
        Step("good", python("import os; print(os.environ['NAME'])"), 20, None, {"NAME": "x"}),
    )
    assert code == 1
    assert [x["status"] for x in outcomes] == ["failed", "not run", "not run", "ok"]
    assert outcomes[0]["detail"] == "exit code 1; ValueError: seven"
    assert outcomes[1]["detail"] == "compute-sanitizer is not installed"
    assert outcomes[3]["detail"] == "x"
    assert "some output" in log and log.count("=== ") == 4
    printed = capsys.readouterr().out
    assert printed.endswith(gpu_check.line(gpu_check.Outcome(**outcomes[3])) + "\n")
    assert check(tmp_path, Step("good", python("pass"), 20))[0] == 0


def test_step_without_end_is_ended_with_all_it_started(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    hang = (
        "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid)); "
        "print('started', flush=True); time.sleep(600)"
    )
    code, outcomes, _ = check(tmp_path, Step("hang", python(hang), 3), Step("b", python(""), 5))
    assert code == 1
    assert [x["status"] for x in outcomes] == ["out of time", "ok"]
    assert outcomes[0]["detail"] == "after 3 s; last: started"
    child = Path("/proc", started.read_text(), "stat")
    end = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_time_left_over_passes_on(tmp_path: Path) -> None:
    slow = Step("slow", python("import time; time.sleep(1)"), 0.1)
    assert check(tmp_path, Step("quick", python("pass"), 20), slow)[0] == 0
    _, outcomes, _ = check(tmp_path, slow, Step("later", python("pass"), 20))
    assert [x["status"] for x in outcomes] == ["out of time", "ok"], "but is not borrowed"


def test_kernels_are_found_where_nothing_is_installed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path "
        "if 'editable' not in str(f).lower()]; import ttsr_fast.kernels as k; print(k.__path__[0])"
    )
    _, outcomes, _ = check(tmp_path, Step("kernels", python(code), 60))
    assert outcomes[0]["status"] == "ok"
    assert Path(outcomes[0]["detail"]) == gpu_check.ROOT / "kernels"


def test_whole_check_takes_less_than_nine_minutes(tmp_path: Path) -> None:
    steps = gpu_check.gpu_steps(tmp_path)
    assert sum(step.limit for step in steps) <= 535
    names = ["versions", "environment", "build", "tests", "memcheck", "racecheck"]
    assert [step.name for step in steps] == [
        *names,
        *("search", "transfer", "model", "tune", "report"),
    ]
    build, tests = steps[2:4]
    assert build.environment == {"TTSR_FAST_BUILD": "cuda"}
    assert tests.environment["TTSR_FAST_TEST_DEVICE"] == "cuda"
    assert not any("pip" in step.command or "venv" in step.command for step in steps)


@pytest.mark.compiled
def test_sanitized_kernels_are_held_to_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in kernel_smoke.folds() if case.to_one and case.shared)
    monkeypatch.setattr(kernel_smoke, "folds", lambda: [case])
    reasons = {"cpp": None, "triton": "not here"}
    monkeypatch.setattr(kernel_smoke.backends, "why_not", lambda name, *_: reasons[name])
    assert kernel_smoke.main(["--device", "cpu"]) == 2, "one of the two could not run"

    def wrong(*arguments, **options):
        return 1.001 * gather_fold(*arguments, **options)

    monkeypatch.setattr(kernel_smoke, "gather_fold", wrong)
    assert kernel_smoke.run_fold(case, devices.CPU).startswith("WRONG: result is off by 1.0e-03")
    assert kernel_smoke.main(["--device", "cpu"]) == 1


def test_step_that_there_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--out", str(tmp_path), "--only", "coffee"])
    assert "no such step: coffee" in capsys.readouterr().err


@pytest.mark.compiled
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but the sanitizers for real, with interpreted kernels at tiny sizes."""
    monkeypatch.setenv("OUT", str(tmp_path))
    code = gpu_check.main(["--rehearse"])
    outcomes = json.loads((tmp_path / "gpu-check.json").read_text())
    log = (tmp_path / "gpu-check.log").read_text()
    assert {x["name"]: x["status"] for x in outcomes} == dict.fromkeys(
        (x["name"] for x in outcomes), "ok"
    ), log
    assert code == 0
    names = {"search", "transfer", "model"}
    expected = {f"{name}.{kind}" for name in names for kind in ("json", "png")} | {"tune.json"}
    assert {path.name for path in tmp_path.iterdir()} == {
        *expected,
        "gpu-check.log",
        "gpu-check.json",
    }
    rows = json.loads((tmp_path / "search.json").read_text())["sizes"][0]["rows"]
    assert rows["direct-fp16"]["status"] == "ok" and rows["direct-fp16"]["algorithm"] == "direct"
    assert "for kernels/tiles.py" in log.lower() and "| 4x5 |" in log
