"""The compiled CUDA library, without a GPU: machine code, symbols, loading.

Triton's wheel includes cuobjdump, which lists the machine code.
"""

import ctypes
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import sass
from ttsr_fast.kernels import slab
from ttsr_fast.operators import build

LIBRARY = Path(build.__file__).parent.parent / build.CUDA_LIBRARY
TARGETS = {f"sm_{number}" for number in build.ARCHITECTURES}
KERNELS = {"gather_fold_kernel", "gather_fold_adjoint_kernel", "gather_dot_kernel"}
BYTES = {"double": 8, "float": 4, "c10::Half": 2, "c10::BFloat16": 2}
REGISTERS = 1 << 16  # of a multiprocessor, on every target; a thread gets a multiple of eight
# Symbols from torch's CUDA library; a CPU build of torch has the rest.
FROM_TORCH_CUDA = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
LOADING = """
import ctypes, sys, torch
library, *stand_in = sys.argv[1:]
if torch.version.cuda is None and stand_in:
    ctypes.CDLL(stand_in[0])
import ttsr_fast.operators.library
torch.ops.load_library(library)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for op in ("gather_fold", "gather_fold_adjoint", "gather_dot", "slab_search", "slab_argmax"):
    assert has_kernel(f"ttsr_fast::cuda_{op}", "CUDA"), op
print(torch.ops.ttsr_fast.cuda_version())
"""
pytestmark = pytest.mark.xdist_group("cuda_library")  # cuobjdump takes seconds


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target. `vector`: elements of one load."""

    target: str
    name: str
    element: str
    vector: int
    threads: int  # most of a block
    registers: int
    memory: int  # bytes of a thread's local memory, where registers are spilled
    loads: Counter[str]

    def __str__(self) -> str:
        return f"{self.name}<{self.element}, {self.vector}> on {self.target}"


def output_of(*command: str | Path, text: str | None = None) -> str:
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    return result.stdout


def cuobjdump(option: str) -> str:
    return sass.run("cuobjdump", option, LIBRARY)


def functions(listing: str) -> dict[tuple[str, str], str]:
    """The part of a listing about each function, by target and symbol."""
    found = {}
    _, *targets = re.split(r"\barch = (\w+)\n", listing)
    for target, listed in zip(targets[::2], targets[1::2], strict=True):
        _, *parts = re.split(r"\bFunction (?:: )?(\w+)", listed)
        found |= {(target, name): text for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return found


def number(pattern: str, text: str) -> int:
    (found,) = re.findall(pattern, text)
    return int(found)


Listings = dict[tuple[str, str], tuple[str, str, str]]


@pytest.fixture(scope="session")
def listings() -> Listings:
    """Resources and machine code of every kernel, by target and demangled name."""
    usage, code = functions(cuobjdump("-res-usage")), functions(cuobjdump("-sass"))
    assert usage.keys() == code.keys()
    return {
        (target, output_of("c++filt", symbol).strip()): (symbol, usage[target, symbol], text)
        for (target, symbol), text in code.items()
    }


@pytest.fixture(scope="session")
def kernels(listings: Listings) -> list[Kernel]:
    """The kernels of the transfer."""
    ptx = cuobjdump("-ptx")
    found = []
    for (target, demangled), (symbol, listed, text) in listings.items():
        if "slab_argmax_kernel" in demangled:
            continue
        ((name, element, vector),) = re.findall(r"(\w+)<([\w:]+), (\d+)>", demangled)
        found.append(
            Kernel(
                target,
                name,
                element,
                int(vector),
                threads=number(rf"\.entry {symbol}\([^)]*\)\s*\.maxntid (\d+)", ptx),
                registers=number(r" REG:(\d+)", listed),
                memory=number(r" STACK:(\d+)", listed) + number(r" LOCAL:(\d+)", listed),
                loads=Counter(re.findall(r"\bLDG\.[\w.]+", text)),
            )
        )
    return found


def test_targets() -> None:
    """Machine code for each target, and PTX of the newest for later GPUs."""
    assert set(re.findall(r"\.(\w+)\.cubin", cuobjdump("--list-elf"))) == TARGETS
    newest = f"sm_{max(build.ARCHITECTURES)}"
    assert set(re.findall(r"\.(\w+)\.ptx", cuobjdump("--list-ptx"))) == {newest}


def test_every_kernel_for_every_target(kernels: list[Kernel]) -> None:
    found = [(kernel.target, kernel.name, kernel.element, kernel.vector) for kernel in kernels]
    assert Counter(found) == Counter(
        (target, name, element, vector)
        for target in TARGETS
        for name in KERNELS
        for element, size in BYTES.items()
        for vector in (1, 16 // size)
    )


def test_registers_suffice(kernels: list[Kernel]) -> None:
    """No spills, and enough registers for a thread block of the largest size."""
    spilled = {str(kernel): kernel.memory for kernel in kernels if kernel.memory}
    assert spilled == {}
    taken = {str(kernel): -kernel.registers // 8 * -8 * kernel.threads for kernel in kernels}
    assert {name: count for name, count in taken.items() if count > REGISTERS} == {}


def test_vectors_are_one_load(kernels: list[Kernel]) -> None:
    wrong = {
        str(kernel): kernel.loads
        for kernel in kernels
        if any(".128" in load for load in kernel.loads) != (kernel.vector > 1)
    }
    assert wrong == {}


# By keys of a thread: most instructions per pair, and fewest thread blocks on a multiprocessor.
SLAB_ARGMAX = {8: (10, 3), 4: (11, 3)}


@pytest.mark.parametrize("keys", SLAB_ARGMAX)
def test_cost_of_a_pair_in_the_slab(listings: Listings, keys: int) -> None:
    """Instructions of one iteration, three rows, in which no score improves."""
    assert slab.KEYS in SLAB_ARGMAX
    found = {
        target: (listed, code)
        for (target, name), (_, listed, code) in listings.items()
        if f"slab_argmax_kernel<{keys}>" in name
    }
    assert found.keys() == TARGETS
    most, blocks = SLAB_ARGMAX[keys]
    for listed, code in found.values():
        assert number(r" STACK:(\d+)", listed) + number(r" LOCAL:(\d+)", listed) == 0
        registers = -number(r" REG:(\d+)", listed) // 8 * -8 * 128
        assert REGISTERS // registers >= blocks
        usual = [sass.usual_path(body) for body in sass.loops(sass.instructions(code))]
        length = min(len(path) for path in usual if len(path) > 100)
        loads = max(sum(x.name.startswith("LDG.E.128") for x in path) for path in usual)
        assert loads >= 3 * (keys + 2), "of 16 bytes"
        assert length / (3 * 4 * keys) <= most


def dynamic_section(tag: str) -> list[str]:
    listing = output_of("readelf", "--dynamic", "--wide", LIBRARY)
    return re.findall(rf"\({tag}\).*\[(.*)\]", listing)


def dynamic_symbols(option: str) -> list[tuple[str, str]]:
    """Kind and name of the dynamic symbols, without versions."""
    listing = output_of("nm", "--dynamic", "--without-symbol-versions", option, LIBRARY)
    return re.findall(r"(\w) (\S+)$", listing, re.MULTILINE)


def test_nothing_is_exported() -> None:
    """Except symbols of the linker and weak symbols of the C++ library."""
    exported = dynamic_symbols("--defined-only")
    strong = {name for kind, name in exported if kind not in "VWu"}
    assert strong <= {"_edata", "_end", "__bss_start", "_init", "_fini"}
    weak = output_of("c++filt", text="\n".join(name for kind, name in exported if kind in "VWu"))
    assert [line for line in weak.splitlines() if "std::" not in line] == []


def test_needs_the_stable_abi_and_the_system_alone() -> None:
    needed = dynamic_section("NEEDED")
    ours = [name for name in needed if name.startswith(("libtorch", "libc10"))]
    assert ours == ["libtorch_cuda.so", "libtorch_cpu.so", "libc10.so"]
    names = {re.split(r"[-.]", name)[0] for name in needed if name not in ours}
    assert names <= {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread", "librt", "ld"}
    assert dynamic_section("RPATH") + dynamic_section("RUNPATH") == []

    system = [ctypes.CDLL(name) for name in needed if name not in ours]
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    undefined = {name for kind, name in dynamic_symbols("--undefined-only") if kind == "U"}
    from_torch = {name for name in undefined if not any(hasattr(x, name) for x in system)}
    foreign = [name for name in from_torch if not name.startswith(("aoti_torch_", "torch_"))]
    assert foreign == []
    assert {name for name in from_torch if not hasattr(torch_cpu, name)} == FROM_TORCH_CUDA


def test_loads_beside_the_library_of_torch(tmp_path: Path) -> None:
    """A stand-in for libtorch_cuda.so is found as well, because the process has loaded it."""
    stand_in = tmp_path / "stand_in.so"
    source = "\n".join(f'extern "C" int {name}() {{ return 0; }}' for name in FROM_TORCH_CUDA)
    command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "-x", "c++", "-"]
    output_of(*command, "-o", stand_in, text=source)
    load = (sys.executable, "-c", LOADING, LIBRARY)
    assert int(output_of(*load, stand_in)) >= 12000
    if torch.version.cuda is None:
        result = subprocess.run(load, capture_output=True, text=True)
        assert "libtorch_cuda.so: cannot open shared object file" in result.stderr
