"""Both libraries and the Triton kernels, compiled for a GPU machine.

    python bench/gpu_bundle.py make      compile for sm_90 into gpu-bundle
    python bench/gpu_bundle.py versions  on the GPU: load or build the libraries
    python bench/gpu_bundle.py kernels   on the GPU: compile missing kernels

Triton finds a kernel compiled here where Python, torch and Triton are of the
same builds. Whatever does not fit is compiled again.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import machine
import torch
from machine import ROOT
from registry import Declined

from ttsr_fast.operators import backends, build

BUNDLE = ROOT / "gpu-bundle"
LARGEST = 30 << 20  # bytes
TARGET = 90  # compute capability
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
LOAD = "import sys; from ttsr_fast.operators import library; sys.exit(library.{}())"
LIBRARIES = {
    "CPU": (build.LIBRARY, "TTSR_FAST_LIBRARY", LOAD.format("load_library")),
    "CUDA": (build.CUDA_LIBRARY, "TTSR_FAST_CUDA_LIBRARY", LOAD.format("load_cuda_library")),
}


def digests() -> dict[str, str]:
    """Digests of the sources and of Triton."""
    from triton.runtime.cache import triton_key

    files = [*(ROOT / "csrc").rglob("*.[ch]*"), *(ROOT / "kernels").glob("*.py")]
    sources = b"".join(
        file.read_bytes() for file in [ROOT / "ttsr_fast/operators/build.py", *sorted(files)]
    )
    parts = {"sources": sources, "triton": triton_key().encode()}
    return {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def bundle_has(*names: str) -> bool:
    """True if the bundle was made of the same."""
    try:
        made = json.loads((BUNDLE / "bundle.json").read_text())
    except (OSError, ValueError):
        return False
    return all(made.get(name) == digests()[name] for name in names)


def find_library(kind: str) -> tuple[Path | None, str]:
    """A library that loads, compiled if there is none, and its place; or None and the reason."""
    name, variable, load = LIBRARIES[kind]
    compiled, reason = ROOT / "build" / "gpu-check" / name, ""
    places = [BUNDLE / name] if bundle_has("sources") else []
    for path in (*places, ROOT / "ttsr_fast" / name, compiled):
        try:
            if path == compiled:
                build.compile_library(path, cuda=kind == "CUDA")
            elif not path.is_file():
                continue
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            continue
        # In a process of its own: two libraries in one would define the same operators.
        command, environment = [sys.executable, "-c", load], {**os.environ, variable: str(path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return path, str(path.relative_to(ROOT))
        reason = (done.stderr.strip().splitlines() or ["loading it ends the process"])[-1]
    return None, f"none: {reason}"


def versions(out: Path, *, tiny: bool) -> int:
    """Write machine, clocks and the environment of later steps; 1 if something is missing."""
    facts, reason = machine.facts(), None if tiny else why_not()
    triton = facts["versions"]["triton"]
    lines = [f"python {facts['python']}, torch {torch.__version__}, triton {triton}"]
    data = {"machine": facts, "why_not": reason, "lines": lines, "environment": {}}
    missing = [reason] if reason else []
    machine.write_json(out, data)
    if not missing:
        data["device"] = machine.describe(machine.pick("cpu" if tiny else "cuda"))
        lines.append(f"{data['device']['name']}; {clocks()}")
        for kind in ("CPU",) if tiny else LIBRARIES:
            path, text = find_library(kind)
            lines.append(f"{kind} library: {text}")
            missing += [] if path else lines[-1:]
            data["environment"] |= {LIBRARIES[kind][1]: str(path)} if path else {}
    machine.write_json(out, data)
    print("; ".join(missing or lines))
    return int(bool(missing))


def why_not() -> str | None:
    """The reason why nothing can be measured here."""
    reason = build.why_not_under(torch.__version__)
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return f"there is no CUDA GPU: torch {torch.__version__} sees none"
    return backends.why_not("triton", torch.device("cuda", 0))


def clocks() -> str:
    """Clocks and power now, by nvidia-smi."""
    answer = machine.output("nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader")
    return f"{CLOCKS}: {answer.splitlines()[0]}" if answer else "no clocks: nvidia-smi fails"


# --- kernels ---


def compile_share(number: int, of: int, tiny: bool) -> list[tuple[str, bool | None]]:
    """Compile the kernels of every `of`-th job; their names, and True for each that was there."""
    import gpu_kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", TARGET, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
            utils=mock.MagicMock(),  # which Triton 3.7 asks for
        )
    )
    torch.set_default_device("meta")
    launch, found, launchers = JITFunction.run, {}, {}
    listen = mock.patch.object(
        triton.knobs.compilation,
        "listener",
        lambda **x: found.update({x["metadata"]["hash"]: (x["src"].name, x["cache_hit"])}),
    )
    unloaded = mock.patch("triton.runtime.build._load_module_from_path")  # that needs a driver

    def compile_only(function: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(function, *args, **{**kwargs, "warmup": True})
        if kernel.hash not in launchers:
            launchers[kernel.hash] = CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    lab = gpu_kernels.Lab(torch.device("meta"), compiling=True)
    parts = [gpu_kernels.PARTS[name](lab) for name in ("check", "times", "ceilings")]
    others = ("540x960 slab", "270x480 slab")  # no kernels of their own
    jobs = [job for part in parts for job in part if not job[0].startswith(others)]
    with listen, unloaded, mock.patch.object(JITFunction, "run", compile_only):
        CudaUtils()
        for name, job in jobs[number : 1 if tiny else None : of]:
            try:
                with suppress(Declined):
                    job()
            except Exception as error:  # of the compiler; the others are compiled
                print(f"{name} was not compiled: {error}", flush=True)
                found[name] = (name, None)
    return list(found.values())


def compile_kernels(*, tiny: bool = False) -> int:
    """Compile the kernels of all jobs into Triton's cache, on all processors."""
    workers = 1 if tiny else os.cpu_count() or 1
    os.environ |= {"TRITON_STORE_BINARY_ONLY": "1", "TRITON_INTERPRET": "0"}
    with TemporaryDirectory() as folder:
        if not torch.cuda.is_available():  # a stand-in for the driver, to link with
            command = [os.environ.get("CC", "gcc"), "-shared", "-x", "c", "/dev/null", "-o"]
            subprocess.run([*command, f"{folder}/libcuda.so.1"], check=True)
            os.environ["TRITON_LIBCUDA_PATH"] = folder
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            shares = pool.map(compile_share, range(workers), repeat(workers), repeat(tiny))
            hits = [hit for share in shares for _, hit in share]
    compiled, there, failed = map(hits.count, (False, True, None))
    print(f"{compiled} kernels compiled, {there} were there, {failed} jobs failed")
    return int(failed or not hits)


def make_bundle() -> int:
    """Both libraries, the kernels and what they were made of; 1 if that is too large."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    for kind, (name, *_) in LIBRARIES.items():
        build.compile_library(BUNDLE / name, cuda=kind == "CUDA")
    os.environ["TRITON_CACHE_DIR"] = str(BUNDLE / "triton-cache")
    failed = compile_kernels()
    machine.write_json(BUNDLE / "bundle.json", {**digests(), "machine": machine.facts()})
    size = sum(file.stat().st_size for file in BUNDLE.rglob("*") if file.is_file())
    print(f"gpu-bundle: {size / (1 << 20):.1f} MiB of at most {LARGEST >> 20}")
    return int(failed or size > LARGEST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("make", "versions", "kernels"))
    parser.add_argument("--out", type=Path, metavar="FILE", help="results of `versions` as JSON")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, with one kernel")
    args = parser.parse_args(argv)
    if args.what == "make":
        return make_bundle()
    if args.what == "versions":
        return versions(args.out, tiny=args.tiny)
    if not args.tiny and bundle_has("sources", "triton"):
        print("the bundle has them")
        return 0
    return compile_kernels(tiny=args.tiny)


if __name__ == "__main__":
    sys.exit(main())
