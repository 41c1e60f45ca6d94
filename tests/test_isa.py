"""Instruction sets: the processor's by Linux' own list, whichever compiler made the library."""

import ctypes
import json
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.emulated import ROOT
from ttsr_fast.operators import build

each = pytest.mark.parametrize
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="for x86-64 processors")

# Flags of /proc/cpuinfo that each instruction set needs, best first.
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
NEEDED = {
    "amx": {"fma", *AVX512, "amx_tile", "amx_bf16"},
    "avx512_bf16": {"fma", "avx512_bf16", *AVX512},
    "avx512": {"fma", *AVX512},
    "avx2": {"fma", "avx2"},
    "baseline": set(),
}

# Prints the choice for every name, each in a process of its own.
CHOICES = """
import json, multiprocessing, os, sys
from ttsr_fast.operators import library

def choice(name):
    os.environ["TTSR_FAST_ISA"] = name
    try:
        return library.instruction_set()
    except RuntimeError as error:
        assert f"an instruction set of this processor, got '{name}'" in str(error)

assert library.load_library() is None
with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    print(json.dumps(pool.map(choice, sys.argv[1:], chunksize=1)))
"""

FEATURES = """
#include <cstdio>
#include "x86.h"
int main() {
  const ttsr_fast::X86Features& f = ttsr_fast::x86_features();
  std::printf("%d%d%d%d", f.avx2, f.avx512, f.avx512_bf16, ttsr_fast::request_amx());
}
"""


def supported() -> list[str]:
    """What Linux lists, best first, AMX only where it grants that to this process."""
    if platform.system() != "Linux":
        pytest.skip("/proc/cpuinfo is Linux'")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    names = [name for name, needed in NEEDED.items() if needed <= flags]
    refused = "amx" in names and ctypes.CDLL(None).syscall(158, 0x1023, 18) != 0
    return names[1:] if refused else names


def compiler(name: str) -> str:
    if name == "zig":  # its run-time library lacks what __builtin_cpu_supports reads
        if find_spec("ziglang") is None:
            pytest.skip("the package ziglang is not installed")
        return f"{shlex.quote(sys.executable)} -m ziglang c++"
    if shutil.which(name) is None:
        pytest.skip(f"there is no {name}: apt install clang")
    return name


@x86
@pytest.mark.compiled
@each("name", ["installed", "clang++"])
def test_a_library_chooses_the_best_or_the_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "installed":
        library = ROOT / f"build/isa/{name}/{build.LIBRARY}"
        monkeypatch.setenv("CXX", compiler(name))
        monkeypatch.setenv("CXXFLAGS", "-O0")
        build.compile_library(library)
        monkeypatch.setenv("TTSR_FAST_LIBRARY", str(library))
    here = supported()
    expected = {isa: isa if isa in here else None for isa in NEEDED}
    expected |= {"": here[0], "sse9": None}
    command = [sys.executable, "-c", CHOICES, *expected]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert dict(zip(expected, found, strict=True)) == expected


@x86
@each("name", ["c++", "clang++", "zig"])
def test_features_are_those_that_linux_lists(name: str, tmp_path: Path) -> None:
    names, here = ("avx2", "avx512", "avx512_bf16", "amx"), supported()
    program = compile_features(compiler(name), tmp_path)
    assert run(program) == "".join(str(int(name in here)) for name in names)


@x86
@each(
    ("processor", "expected"),
    [
        ("Nehalem", "0000"),
        ("Haswell", "1000"),
        ("Haswell,-avx2", "0000"),
        ("Haswell,-fma", "0000"),
        ("Haswell,-xsave", "0000"),  # the system does not save the registers
    ],
)
def test_features_of_older_processors(processor: str, expected: str, tmp_path: Path) -> None:
    if shutil.which("qemu-x86_64") is None:
        pytest.skip("there is no qemu-x86_64: apt install qemu-user")
    program = compile_features("c++", tmp_path)
    assert run("qemu-x86_64", "-cpu", processor, program) == expected


def compile_features(compiler: str, folder: Path) -> str:
    (folder / "features.cpp").write_text(FEATURES)
    program = str(folder / "features")
    flags = ["-std=c++20", f"-I{ROOT / 'csrc/cpu'}", str(folder / "features.cpp"), "-o", program]
    run(*shlex.split(compiler), *flags)
    return program


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
