"""Compilation of CUDA sources for the CPU; `emulator/` runs the threads one after the other."""

import fcntl
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ttsr_fast.operators import build

ROOT = Path(__file__).parent.parent
EMULATOR = Path(__file__).parent / "emulator"
TORCH = Path(torch.__file__).parent
FLAGS = (
    *build.FLAGS,
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DUSE_CUDA",
    "-DTTSR_DISPATCH_KEY=CPU",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll, for nvcc
    f"-I{EMULATOR}",
    f"-isystem{TORCH / 'include'}",
)
# For kernels. A finding ends the launch: the emulator replaces the sanitizer's library.
CHECKS = (
    "-fsanitize=alignment,bounds-strict,integer-divide-by-zero,null,shift,signed-integer-overflow",
    "-fno-sanitize-recover",
)
LINK = (f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")


def library(folder: Path = ROOT / "csrc/cuda") -> Path:
    """The sources of a folder as a library, compiled once for the same sources.

    Its function `emulator_set_order` sets the order of threads.

    Raises:
        RuntimeError: an error or a warning of the compiler.
    """
    sources = sorted([*folder.glob("*.cpp"), *folder.glob("*.cu"), EMULATOR / "emulator.cpp"])
    headers = sorted([*folder.glob("*.h"), *folder.parent.glob("*.h"), *EMULATOR.glob("*.h")])
    words = [platform.machine(), torch.__version__, *_compiler(), *FLAGS, *CHECKS]
    digest = hashlib.sha256(" ".join(words).encode())
    for file in [*sources, *headers]:
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    target = ROOT / "build/emulated" / digest.hexdigest()[:16] / "emulated.so"
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, others wait
        if not target.is_file():
            _compile(sources, target)
    return target


def _compile(sources: list[Path], target: Path) -> None:
    with (
        tempfile.TemporaryDirectory(dir=target.parent) as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [f"{folder}/{number}.o" for number in range(len(sources))]
        checks = [CHECKS if source.suffix == ".cu" else () for source in sources]
        commands = [
            [*_compiler(), *FLAGS, *more, "-x", "c++", "-c", str(source), "-o", out]
            for source, more, out in zip(sources, checks, objects, strict=True)
        ]
        list(pool.map(_run, commands))
        linked = f"{folder}/{target.name}"
        _run([*_compiler(), "-shared", *objects, *LINK, "-o", linked])
        os.replace(linked, target)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}:\n{result.stderr}")
