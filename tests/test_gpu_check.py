"""The checks of a GPU, as far as possible without one."""

import json
import os
import shlex
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))  # as for a script of that folder

import gpu_bundle
import gpu_check
import gpu_kernels
import measure
from gate import WrongResult
from gpu_check import Step
from machine import CPU
from registry import Declined

each = pytest.mark.parametrize


# --- the kernels ---


def run_jobs(out: Path, *jobs: tuple, resume: bool = False) -> int:
    return gpu_kernels.run_jobs(iter(jobs), Namespace(out=out, resume=resume), CPU)


def test_jobs_that_fail_do_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: Exception) -> Callable[[], list]:
        def job() -> list:
            raise error

        return job

    out, cell = tmp_path / "x.json", gpu_kernels.cell("table", "row", "column", "7", seconds=7.0)
    declined = ("declined", failing(Declined("not for this")))
    bad, good = ("bad", failing(RuntimeError("shared memory"))), ("good", lambda: [cell])
    assert run_jobs(out, declined) == 1, "nothing was found to be right"
    assert run_jobs(out, declined, good) == 0
    assert run_jobs(out, bad, good) == 1
    wrong = ("wrong", failing(WrongResult("a score is off by 1.0e-03")))
    assert run_jobs(out, wrong, good) == 1
    printed = capsys.readouterr().out
    assert "failed bad: RuntimeError: shared memory" in printed
    assert "WRONG wrong: a score is off by 1.0e-03" in printed
    assert run_jobs(out, bad, good) == 1
    assert run_jobs(out, bad, ("new", lambda: [cell]), resume=True) == 1
    data = json.loads(out.read_text())
    assert list(data["jobs"]) == ["bad", "good", "new"] and data["cells"] == [cell, cell]

    def gone(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    started: list[list[str]] = []
    monkeypatch.setattr(measure, "synchronize", gone)
    monkeypatch.setattr(gpu_kernels.os, "execv", lambda path, command: started.append(command))
    run_jobs(out, bad)
    assert started[0][0] == sys.executable and started[0][-1] == "--resume"


# --- the whole check ---


def python(code: str) -> str:
    return f"-c {shlex.quote(code)}"


def check(folder: Path, *steps: Step, options: tuple[str, ...] = ()) -> tuple[int, list[dict]]:
    code = gpu_check.main(["a", "--out", str(folder), *options], list(steps))
    return code, json.loads((folder / "gpu-check-a.json").read_text())["steps"]


def packed(folder: Path, name: str) -> str:
    with tarfile.open(folder / "gpu-check-a.tar.gz") as archive:
        return archive.extractfile(f"./{name}").read().decode()


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUT", raising=False)


def test_steps_that_fail_do_not_end_the_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, steps = check(
        tmp_path,
        Step("bad", python("print('WRONG rolled: 7'); raise ValueError('seven')"), 20),
        Step("tool", python(""), 20, "no-such-tool"),
        Step("good", python("import os; print(os.environ['NAME'])"), 20, "", {"NAME": "x"}),
    )
    assert code == 1
    assert [x["status"] for x in steps] == ["failed", "not run", "ok"]
    assert steps[0]["detail"] == "exit code 1; ValueError: seven"
    assert steps[0]["lines"] == ["WRONG rolled: 7"]
    assert [x["detail"] for x in steps[1:]] == ["no-such-tool is not installed", "x"]
    assert "WRONG rolled: 7" in packed(tmp_path, "bad.log")
    printed = capsys.readouterr().out
    assert gpu_check.main(["show", str(tmp_path / "gpu-check-a.json")]) == 0
    assert printed.endswith(capsys.readouterr().out), "the summary comes last"
    assert {path.name for path in tmp_path.iterdir()} == {"gpu-check-a.json", "gpu-check-a.tar.gz"}
    assert check(tmp_path, Step("good", python("pass"), 20))[0] == 0


def test_step_without_end_is_ended_with_all_it_started(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    hang = (
        "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '600']); "
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid)); "
        "print('started', flush=True); time.sleep(600)"
    )
    code, steps = check(tmp_path, Step("hang", python(hang), 3), Step("b", python(""), 5))
    assert code == 1
    assert [x["status"] for x in steps] == ["out of time", "ok"]
    assert steps[0]["detail"].endswith("last: started")
    child = Path("/proc", started.read_text(), "stat")
    end = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_interrupted_check_keeps_what_it_knows(tmp_path: Path) -> None:
    stop = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(600)"
    steps = [Step("one", python("print(1)"), 9), Step("two", python(stop), 9)]
    code, found = check(tmp_path, *steps, Step("three", python("print(3)"), 9))
    assert code == 1
    assert [x["status"] for x in found] == ["ok", "interrupted", "not run"]
    assert found[2]["detail"] == "interrupted in two"
    steps[1] = Step("two", python("print(2)"), 9)
    code, found = check(tmp_path, *steps, options=("--from", "two"))
    assert code == 0
    assert [x["detail"] for x in found] == ["1", "2"]
    assert packed(tmp_path, "one.log") == "1\n", "of the earlier call"


def test_machine_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = {"why_not": "there is no CUDA GPU", "environment": {}}
    monkeypatch.setattr(gpu_check.Check, "result", lambda self, name: why)
    todo = [Step("versions", python("raise SystemExit(1)"), 9), Step("check", python(""), 9)]
    code, steps = check(tmp_path, *todo)
    assert code == 1
    assert [x["status"] for x in steps] == ["failed", "not run"]
    assert steps[1]["detail"] == "there is no CUDA GPU"


def test_why_a_machine_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA GPU: torch" in gpu_bundle.why_not()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_bundle.backends, "why_not", lambda *x: "it needs Triton 3.6 or newer")
    assert gpu_bundle.why_not() == "it needs Triton 3.6 or newer"
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu129")
    assert gpu_bundle.why_not() == "the kernels need torch 2.10 or newer, this is 2.9.1+cu129"


def test_folders_and_files_that_will_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("{}")
    for options, message in (
        (["a", "--out", str(tmp_path / "file" / "x")], "file/x cannot be written"),
        (["a", "--out", str(tmp_path), "--from", "times"], "has no results that --from can keep"),
        (["show", str(tmp_path / "file")], "file is no result of gpu_check.py"),
    ):
        assert gpu_check.main(options) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["b", "--out", str(tmp_path), "--from", "coffee"])
    assert "--from: the steps are versions, compile, search" in capsys.readouterr().err


@each("part", ["a", "b"])
def test_part_takes_less_than_ten_minutes(tmp_path: Path, part: str) -> None:
    steps, rehearsed = (gpu_check.steps(part, tmp_path, tiny) for tiny in (False, True))
    assert sum(step.limit for step in steps) <= 595
    assert [x.name for x in steps] == [x.name for x in rehearsed]


def test_summary_fits_a_terminal() -> None:
    cells = [gpu_kernels.cell("t" * 50, f"row {n}", "c" * 99, "7.25") for n in range(200)]
    step = {"name": "times", "status": "failed", "seconds": 1.0, "detail": "x" * 200}
    steps = [{**step, "lines": ["WRONG " + "y" * 200] * 50}]
    document = {"title": "a", "date": "b", "steps": steps, "results": {"times": {"cells": cells}}}
    lines = gpu_check.summary(document).splitlines()
    assert len(lines) == 100 and max(map(len, lines)) <= 110
    assert lines[-1] == "... and 110 lines more, which are in the file of results"


def test_kernels_are_found_where_nothing_is_installed(tmp_path: Path) -> None:
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path "
        "if 'editable' not in str(f).lower()]; import ttsr_fast.kernels as k; print(k.__path__[0])"
    )
    _, steps = check(tmp_path, Step("kernels", python(code), 60))
    assert Path(steps[0]["detail"]) == gpu_check.ROOT / "kernels"


@pytest.mark.compiled
@each("part", ["a", "b"])
def test_rehearsal(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but profiler and sanitizer for real, with interpreted kernels at tiny sizes."""
    steps, own = (
        gpu_check.steps,
        ("search", "transfer", "model"),
    )  # the others of b are as those of a
    monkeypatch.setattr(
        gpu_check, "steps", lambda *x: [s for s in steps(*x) if part == "a" or s.name in own]
    )
    code = gpu_check.main([part, "--rehearse", "--out", str(tmp_path)])
    document = json.loads((tmp_path / f"gpu-check-{part}.json").read_text())
    assert code == 0, document["steps"]
    measured = {"a": ("check", "times", "ceilings"), "b": own}
    assert all(name in document["results"] for name in measured[part])
    row = "rolled fp16 not lazy" if part == "a" else "triton fp16"
    assert row in gpu_check.summary(document)
