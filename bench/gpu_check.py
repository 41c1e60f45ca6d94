"""All checks on a CUDA GPU, in two calls of ten minutes at most each.

    python bench/gpu_check.py a               kernels: results, times, profiles
    python bench/gpu_check.py b               benchmarks, tests, memcheck
    python bench/gpu_check.py a --from times  go on from a step
    python bench/gpu_check.py a --rehearse    a few pixels on a CPU
    python bench/gpu_check.py show FILE.json  print a summary again

Uses the Python that runs it as it is: nothing is installed or downloaded. A
step is a process with a time limit. If one fails or lacks its tool, the others
go on. After every step two files in the folder `$OUT`, or `bench/results`, are
rewritten: `gpu-check-a.json` with all numbers and `gpu-check-a.tar.gz` with
logs and raw results. Exits with status 1 unless all steps passed.
"""

import argparse
import datetime
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

import report

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "gpu-bundle" / "triton-cache"
LINES = 100
COLUMNS = min(110, shutil.get_terminal_size((110, LINES)).columns)
FAILURES = 5  # lines on the failures of a step
Data = dict[str, Any]
PREPARATIONS = ("versions", "compile")  # repeated in every call: the machine may be another
OPTIONS = {  # of a benchmark on a GPU, and in a rehearsal
    "search": (
        "--sizes 540x960 270x480 125x185 9*40x40 --seconds 0.1 --limit 2 "
        "--candidates triton-fp16 triton-fp16x3 triton-fp32 unfold unfold-fp16 chunked",
        "--sizes 2x3 --channels 8 --seconds 0.001 --candidates triton-fp16 unfold",
    ),
    "transfer": (
        "--sizes 9*40x40 --levels 'all three' --seconds 0.05 "
        "--candidates cpp cpp-graph torch reference index_add",
        "--sizes 4x5 --quick --seconds 0.001 --no-memory",
    ),
    "model": (
        "--sizes 9*40x40 88x125:92x125 --seconds 0.1 --limit 2 "
        "--candidates default fp16x3 default-graph reference",
        "--sizes 4x5 --pair 4x5:16x20 --patch 4x5 --quick --seconds 0.001 --no-memory",
    ),
}
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis")
NCU = "ncu --clock-control none --profile-from-start off --section LaunchStats --section "
NCU += " --section ".join(SECTIONS)
TESTS = {
    "a": "tests/test_gpu.py tests/test_gpu_transfer.py",
    "b": "tests/test_search.py tests/test_kernels.py tests/test_layout.py "
    "tests/test_gather_fold.py tests/test_modules.py",
    "memcheck": "tests/test_gather_fold.py -k 'test_options and not torch or test_layouts'",
    "rehearsal": "tests/test_table.py",
}
PYTEST = "-m pytest -q -p no:cacheprovider"


class Step(NamedTuple):
    """One process: arguments of Python, its limit in seconds, and a command before Python's."""

    name: str
    arguments: str
    limit: float
    wrapper: str = ""
    environment: dict[str, str] = {}  # noqa: RUF012


def steps(part: str, work: Path, tiny: bool) -> list[Step]:
    """The steps of a part, in 595 seconds at most; their results go to the folder `work`."""
    small, device = ("--tiny", "cpu") if tiny else ("", "cuda")
    out = f"--out {shlex.quote(str(work))}/"
    kernels = f"bench/gpu_kernels.py {small}"
    found = [
        Step("versions", f"bench/gpu_bundle.py versions {small} {out}versions.json", 80),
        Step("compile", f"bench/gpu_bundle.py kernels {small}", 70),
    ]
    if part == "a":
        for name, limit in (("check", 75), ("times", 110), ("ceilings", 65)):
            found.append(Step(name, f"{kernels} {name} {out}{name}.json", limit))
        profile = f"{kernels} profile {out}ncu.json"
        found.append(Step("ncu", profile, 90, "" if tiny else NCU))
    else:
        for name, limit in (("search", 100), ("transfer", 50), ("model", 60)):
            options = f"--device {device} {out}{name} {OPTIONS[name][tiny]}"
            found.append(Step(name, f"bench/{name}.py {options}", limit))
    tests = f"{PYTEST} {TESTS['rehearsal' if tiny else part]}"
    if not tiny and find_spec("xdist"):
        tests += f" -n {4 if part == 'a' else 8} --dist loadgroup"
    environment = {"OMP_NUM_THREADS": "1", "TTSR_FAST_TEST_DEVICE": device}
    found.append(Step("tests", tests, 100 if part == "a" else 140, "", environment))
    if part == "b":
        sanitizer = "" if tiny else "compute-sanitizer --tool memcheck --error-exitcode 1"
        # Past the caching allocator, so that a buffer has an end that can be overrun.
        environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        transfer = f"{PYTEST} {TESTS['memcheck']}"
        found.append(Step("memcheck", f"{kernels} check --few", 45, sanitizer, environment))
        found.append(Step("memcheck-transfer", transfer, 50, sanitizer, environment))
    return found


def outcome(step: Step, status: str, detail: str = "", seconds: float = 0.0) -> dict[str, Any]:
    """`ok`, `failed`, `out of time`, `interrupted` or `not run`."""
    found = {"name": step.name, "status": status, "seconds": seconds, "detail": detail}
    return found | {"lines": []}


class Check:
    """A part that is being run: its outcomes and its files."""

    def __init__(self, part: str, folder: Path, work: Path, tiny: bool) -> None:
        self.file, self.work, self.tiny = folder / f"gpu-check-{part}.json", work, tiny
        self.outcomes: list[dict[str, Any]] = []
        paths = [ROOT / "bench" / "uninstalled", ROOT, os.environ.get("PYTHONPATH", "")]
        tools = [os.environ["PATH"], f"{os.environ.get('CUDA_HOME') or '/usr/local/cuda'}/bin"]
        self.environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, map(str, paths))),
            "PATH": os.pathsep.join(tools),
        }
        if tiny:
            self.environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        elif CACHE.is_dir():
            self.environment["TRITON_CACHE_DIR"] = str(CACHE)

    def restore(self, first: str) -> dict[str, dict[str, Any]]:
        """Outcomes of an earlier call before the step `first`; unpacks its files."""
        document = json.loads(self.file.read_text())
        with tarfile.open(self.file.with_suffix(".tar.gz")) as archive:
            archive.extractall(self.work, filter="data")
        found = {x["name"]: x for x in document["steps"] if x["name"] not in PREPARATIONS}
        names = list(found)
        return {x: found[x] for x in names[: names.index(first) if first in names else None]}

    def run(self, todo: list[Step], kept: dict[str, dict[str, Any]]) -> None:
        """All steps without a kept outcome, one after another."""
        reason = None
        for step in todo:
            tool = "".join(step.wrapper.split()[:1])
            if step.name in kept:
                found = kept[step.name]
            elif reason is not None:
                found = outcome(step, "not run", reason)
            elif tool and shutil.which(tool, path=self.environment["PATH"]) is None:
                found = outcome(step, "not run", f"{tool} is not installed")
            else:
                found = self.run_step(step)
            self.outcomes.append(found)
            print(step_line(found), flush=True)
            self.save()
            if found["status"] == "interrupted":
                reason = f"interrupted in {step.name}"
            elif step.name == "versions":
                versions = self.result("versions") or {"why_not": f"versions: {found['detail']}"}
                self.environment |= versions.get("environment", {})
                reason = versions.get("why_not")

    def run_step(self, step: Step) -> dict[str, Any]:
        """Outcome of a step; at its limit the step ends, with all its processes."""
        log, start = self.work / f"{step.name}.log", time.monotonic()
        (self.work / f"{step.name}.json").unlink(missing_ok=True)
        shutil.rmtree(self.work / step.name, ignore_errors=True)
        command = [*shlex.split(step.wrapper), sys.executable, "-u", *shlex.split(step.arguments)]
        environment = {**os.environ, **self.environment, **step.environment}
        status, streams = "out of time", {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, start_new_session=True, **streams
            )
            try:
                status = "ok" if process.wait(timeout=step.limit) == 0 else "failed"
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                status = "interrupted"
            finally:
                end_group(process)
        lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
        if any(x.startswith("==WARNING== No kernels") for x in lines):  # of ncu, with code 0
            status = "failed"
        last = shorten(lines[-1], 100) if lines else "it printed nothing"
        words = {"ok": "", "failed": f"exit code {process.returncode}; "}
        prefix = words.get(status, f"after {time.monotonic() - start:.0f} s; last: ")
        found = outcome(step, status, prefix + last, time.monotonic() - start)
        bad = ("WRONG", "failed", "hangs", "FAILED", "ERROR", "========= Invalid", "==ERROR==")
        return {**found, "lines": [x for x in lines if status != "ok" and x.startswith(bad)]}

    def result(self, name: str) -> dict[str, Any] | None:
        """Results of a step, complete or not."""
        for path in (self.work / f"{name}.json", *(self.work / name).glob("*.json")):
            try:
                return json.loads(path.read_text())
            except (OSError, ValueError):
                continue
        return None

    def document(self) -> dict[str, Any]:
        results = {x["name"]: self.result(x["name"]) for x in self.outcomes}
        return {
            "title": f"{self.file.stem}{' (rehearsal)' if self.tiny else ''}",
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "steps": self.outcomes,
            "results": {name: result for name, result in results.items() if result},
        }

    def save(self) -> None:
        """Both files, each replaced as a whole."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            archive.add(self.work, ".")
        text = json.dumps(self.document(), indent=1) + "\n"
        for suffix, content in ((".tar.gz", packed.getvalue()), (".json", text.encode())):
            path = self.file.with_suffix(suffix)
            try:
                write(path, content)
            except OSError as error:
                print(f"{path} was not written: {error.strerror}", flush=True)


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- the summary ---


def step_line(step: Data) -> str:
    text = f"{step['name']:<17} {step['status']:<12} {step['seconds']:6.1f} s  {step['detail']}"
    return text[:COLUMNS]


def summary(document: Data) -> str:
    """At most `LINES` lines of `COLUMNS` characters; the file of results has the rest."""
    lines = [f"{document['title']}, {document['date']}"]
    for step in document["steps"]:
        lines.append(step_line(step))
        lines += [f"    {text}" for text in step["lines"][:FAILURES]]
    lines += document["results"].get("versions", {}).get("lines", [])
    for result in document["results"].values():
        tables = report.tables(result) if "kind" in result else tables_of(result.get("cells", ()))
        for table in tables:
            lines += table.lines(COLUMNS)
    if len(lines) > LINES:
        left = len(lines) - LINES + 1
        lines[LINES - 1 :] = [f"... and {left} lines more, which are in the file of results"]
    return "\n".join(line[:COLUMNS] for line in lines)


def tables_of(cells: Iterable[Data]) -> list[report.Table]:
    """Tables of cells that name their table, row and column."""
    texts: dict[str, dict[tuple[str, str], str]] = {}
    for cell in cells:
        texts.setdefault(cell["table"], {})[cell["row"], cell["column"]] = cell["cell"]
    found = []
    for title, at in texts.items():
        rows, columns = (list(dict.fromkeys(place[n] for place in at)) for n in (0, 1))
        body = [[row, *(at.get((row, column), "-") for column in columns)] for row in rows]
        found.append(report.Table(title, ["", *columns], 1, body))
    return found


def main(argv: list[str] | None = None, todo: list[Step] | None = None) -> int:
    """Run a part; 0 if all steps passed, 1 if not, 2 if nothing could be done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("part", choices=("a", "b", "show"))
    add("file", nargs="?", type=Path, help="for show")
    add("--from", dest="first", metavar="STEP", help="go on from this step")
    add("--rehearse", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    default = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    add("--out", type=Path, default=default, metavar="FOLDER", help="default: $OUT, bench/results")
    args = parser.parse_args(argv)
    if (args.part == "show") != (args.file is not None):
        parser.error("show takes a FILE, a and b take none")
    with TemporaryDirectory() as folder:
        check = Check(args.part, args.out.resolve(), Path(folder).resolve(), args.rehearse)
        doing = f"{args.out} cannot be written"
        try:
            if args.file is not None:
                doing = f"{args.file} is no result of gpu_check.py"
                print(summary(json.loads(args.file.read_text())))
                return 0
            args.out.mkdir(parents=True, exist_ok=True)
            todo = steps(args.part, check.work, args.rehearse) if todo is None else todo
            if args.first not in (None, *(step.name for step in todo)):
                parser.error(f"--from: the steps are {', '.join(step.name for step in todo)}")
            doing = f"{args.out} has no results that --from can keep"
            kept = check.restore(args.first) if args.first else {}
        except (OSError, ValueError, KeyError, TypeError, tarfile.TarError) as error:
            print(f"{doing}: {error}", file=sys.stderr)
            return 2
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            check.run(todo, kept)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        check.save()
        print(f"\n{summary(check.document())}", flush=True)
    passed = [x["status"] for x in check.outcomes].count("ok")
    return int(passed < len(todo))


if __name__ == "__main__":
    sys.exit(main())
