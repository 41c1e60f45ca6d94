"""Everything that can be said about this package on a GPU, by one command: `make gpu-check`.

    python bench/gpu_check.py                          on a machine with a CUDA GPU
    python bench/gpu_check.py --only tests memcheck    these steps alone
    python bench/gpu_check.py --rehearse               tiny sizes, the kernels interpreted on a CPU

Uses the Python that runs it as it is: nothing is installed or downloaded. Each step is a process
with a time limit of its own, to which is added what the steps before it left over; together they
take less than nine minutes. A step that fails, or lacks its tool, says so and the others go on.

Results, `<gpu>.json` and its like, go to the folder `$OUT`, or `bench/results` where that is not
set; what the steps print goes to `gpu-check.log` there, or in `bench/results/gpu-check`. The
summary comes last; exits with status 1 unless all steps passed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 5.0  # seconds that a step which ran out of time gets to end by itself
WORKERS = 14  # that run tests; each holds a CUDA context of half a gigabyte
TINY = "4x5"
REPORT = """
import platform, sys
import torch
print("python", platform.python_version(), "torch", torch.__version__)
for number in range(torch.cuda.device_count()):
    print("cuda:%d" % number, torch.cuda.get_device_properties(number))
import triton
print("triton", triton.__version__)
import ttsr_fast.kernels
"""


# The folder `kernels` is the package `ttsr_fast.kernels` once installed, and nothing is installed
# here: every process imports this as `sitecustomize`, which finds it where nothing else does.
FINDER = """
import importlib.util, sys

class Kernels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "ttsr_fast.kernels":
            return importlib.util.spec_from_file_location(
                name, {init!r}, submodule_search_locations=[{folder!r}]
            )

sys.meta_path.append(Kernels)
"""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: for the summary and `--only`.
        command: what to run, from the root of the checkout.
        limit: seconds.
        lacking: why it cannot be run, None if it can.
        environment: set for it.
    """

    name: str
    command: list[str]
    limit: float
    lacking: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step went: `ok`, `failed`, `out of time` or `not run`."""

    name: str
    status: str
    seconds: float
    detail: str


# --- the steps ---


def gpu_steps(results: Path) -> list[Step]:
    """What runs on a GPU, in 535 seconds at most."""
    python, out = sys.executable, ["--out", str(results), "--device", "cuda"]
    bench, transfer, model = (
        [python, "-u", f"bench/{name}.py", *out] for name in ("search", "transfer", "model")
    )
    # The three levels at once, and without torch.compile: either takes longer than all this.
    transfer += ["--levels", "all three", "--peers", "reference", "grid_sample", "index_add"]
    workers = (
        ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
        if find_spec("xdist")
        else []
    )
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
    return [
        *environment_steps(python),
        Step(
            "build",
            [python, "setup.py", "--quiet", "build_ext", "--inplace", "--force"],
            90,
            _lacking("setuptools"),
            {"TTSR_FAST_BUILD": "cuda"},
        ),
        Step(
            "tests",
            tests,
            140,
            _lacking("pytest", "hypothesis"),
            {"TTSR_FAST_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"},
        ),
        sanitizer_step("memcheck", 45, ["--leak-check", "no"]),
        sanitizer_step("racecheck", 45, ["--racecheck-report", "analysis"]),
        Step("search", [*bench, "--seconds", "0.1", "--limit", "2"], 70, _lacking("rich")),
        Step("transfer", [*transfer, "--seconds", "0.05"], 35, _lacking("rich")),
        Step("model", [*model, "--seconds", "0.1", "--limit", "2"], 40, _lacking("rich")),
        Step("tune", [*bench, "--tune", "--quick", "--budget", "20"], 30, _lacking("rich")),
        report_step(python, results),
    ]


def rehearsal_steps(results: Path) -> list[Step]:
    """The same on the CPU: one file of the tests, no sanitizer, sizes of a few pixels."""
    python, out = sys.executable, ["--out", str(results), "--device", "cpu"]
    interpreted = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    bench, transfer, model = (
        [python, "-u", f"bench/{name}.py", *out] for name in ("search", "transfer", "model")
    )
    tiny = ["--sizes", TINY, "--channels", "8", "--seconds", "0.001"]
    short = ["--quick", "--seconds", "0.001", "--no-memory"]
    images = ["--pair", f"{TINY}:16x20", "--patch", TINY, "--batch", "1"]
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_modules.py"]
    smoke = [python, "-u", "bench/kernel_smoke.py", "--device", "cpu", "--tiny"]
    own = ["--backends", "torch-fp32", "direct-fp16", "--peers", "unfold"]
    tuned = ["--algorithms", "direct", "--precisions", "fp16", "--budget", "5"]
    return [
        *environment_steps(python),
        Step("build", [python, "setup.py", "--quiet", "--version"], 60, _lacking("setuptools")),
        Step("tests", tests, 120, _lacking("pytest"), {"TTSR_FAST_TEST_BACKENDS": "torch"}),
        Step("memcheck", [*smoke, "--precisions", "fp16"], 120, environment=interpreted),
        Step("search", [*bench, *tiny, *own], 120, environment=interpreted),
        Step("transfer", [*transfer, "--size", TINY, *short], 120, environment=interpreted),
        Step("model", [*model, "--sizes", TINY, *images, *short], 120, environment=interpreted),
        Step("tune", [*bench, *tiny, "--tune", *tuned], 120, environment=interpreted),
        report_step(python, results),
    ]


def environment_steps(python: str) -> list[Step]:
    command = [python, "-m", "ttsr_fast", "env"]
    lacking = _lacking("typer", "rich")
    return [
        Step("versions", [python, "-c", REPORT], 15),
        Step("environment", command, 10, lacking),
    ]


def sanitizer_step(tool: str, limit: float, options: list[str]) -> Step:
    """Memory past the caching allocator, so that a buffer has an end that can be overrun."""
    sanitizer = shutil.which("compute-sanitizer") or _in_toolkit("compute-sanitizer")
    command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *options]
    return Step(
        tool,
        [*command, sys.executable, "-u", "bench/kernel_smoke.py", "--device", "cuda"],
        limit,
        None if sanitizer else "compute-sanitizer is not installed",
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def _in_toolkit(name: str) -> str | None:
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return shutil.which(name, path=str(home / "bin"))


def report_step(python: str, results: Path) -> Step:
    """Tables into the log, and the plots of results whose benchmark was cut short."""
    script = (
        "import pathlib, sys; sys.path.insert(0, 'bench'); import report; "
        f"folder = pathlib.Path({str(results)!r}); since = {time.time()!r}; "
        "files = [str(p) for p in sorted(folder.glob('*.json')) if p.stat().st_mtime >= since]; "
        "code = report.main([*files, '--images', str(folder)]) if files else 1; "
        "print(len(files), 'result files'); sys.exit(code)"
    )
    return Step("report", [python, "-c", script], 15, _lacking("rich"))


def _lacking(*modules: str) -> str | None:
    missing = [name for name in modules if find_spec(name) is None]
    return f"{' and '.join(missing)} cannot be imported" if missing else None


# --- running them ---


def run_steps(steps: list[Step], log: TextIO) -> list[Outcome]:
    """All of them, one after another."""
    outcomes = []
    with TemporaryDirectory() as folder:
        kernels = ROOT / "kernels"
        finder = FINDER.format(init=str(kernels / "__init__.py"), folder=str(kernels))
        Path(folder, "sitecustomize.py").write_text(finder)
        paths = [folder, str(ROOT), os.environ.get("PYTHONPATH", "")]
        common = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "160"}
        end = time.monotonic() + sum(step.limit for step in steps)
        for n, step in enumerate(steps):
            later = sum(other.limit for other in steps[n + 1 :])
            outcomes.append(run_step(step, end - time.monotonic() - later, log, common))
            print(line(outcomes[-1]), flush=True)
    return outcomes


def run_step(step: Step, limit: float, log: TextIO, common: dict[str, str]) -> Outcome:
    """One of them, its output appended to the log; killed with all it started at its limit."""
    log.write(f"\n=== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    if step.lacking is not None:
        return Outcome(step.name, "not run", 0.0, step.lacking)
    start, begin = time.monotonic(), log.tell()
    environment = {**os.environ, **common, **step.environment}
    try:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(step.name, "not run", 0.0, str(error))
    try:
        code: int | None = process.wait(timeout=max(limit, 0.0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end_group(process)
    last = last_line(Path(log.name), begin)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome(step.name, "out of time", seconds, f"after {limit:.0f} s; last: {last}")
    detail = last if code == 0 else f"exit code {code}; {last}"
    return Outcome(step.name, "ok" if code == 0 else "failed", seconds, detail)


def end_group(process: subprocess.Popen) -> None:
    """End a process and what it started, politely first."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_line(path: Path, begin: int) -> str:
    """What was printed last."""
    with path.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    return shorten(lines[-1], 100) if lines else "it printed nothing"


def line(outcome: Outcome) -> str:
    return f"{outcome.name:<12} {outcome.status:<12} {outcome.seconds:6.1f} s  {outcome.detail}"


def summary(outcomes: Iterable[Outcome]) -> str:
    return "\n".join(["", "summary", *map(line, outcomes)])


def main(argv: list[str] | None = None, steps: list[Step] | None = None) -> int:
    """Run the steps; 1 unless all passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    out = os.environ.get("OUT")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    add("--only", nargs="+", metavar="STEP", help="these steps alone")
    add("--out", type=Path, default=Path(out or ROOT / "bench" / "results"), metavar="FOLDER")
    args = parser.parse_args(argv)
    results: Path = args.out.resolve()
    if steps is None:
        steps = rehearsal_steps(results) if args.rehearse else gpu_steps(results)
    unknown = set(args.only or ()) - {step.name for step in steps}
    if unknown:
        parser.error(f"--only: no such step: {', '.join(sorted(unknown))}")
    steps = [step for step in steps if not args.only or step.name in args.only]
    folder = results if out else results / "gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu-check.log"
    path.write_text("")
    with path.open("a") as log:  # which the steps write to as well
        outcomes = run_steps(steps, log)
        log.write(summary(outcomes) + "\n")
    records: list[dict[str, Any]] = [asdict(outcome) for outcome in outcomes]
    (folder / "gpu-check.json").write_text(json.dumps(records, indent=1) + "\n")
    print(summary(outcomes), flush=True)
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
