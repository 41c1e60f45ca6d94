"""Compilation of the kernels in C++ and in CUDA, for `setup.py`, make and `ttsr-fast env`.

One library serves every CPU and selects its instruction set at run time, the other holds code for
several GPUs. Both use PyTorch's stable ABI and nothing of Python's: one file fits every Python and
every torch from `OLDEST_TORCH` on. This module imports neither the package nor torch. As a program:

    python -m ttsr_fast.operators.build   # for an installation without the kernels
    python ttsr_fast/operators/build.py ttsr_fast/_C.abi3.so   # in place
"""

import argparse
import filecmp
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"
OLDEST_TORCH = (2, 10)
FLAGS = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")  # OLDEST_TORCH
CXX_FLAGS = ("-fPIC", "-fvisibility=hidden")
# Static, because torch may have another version of the CUDA runtime.
NVCC_FLAGS = ("-DUSE_CUDA", f"-Xcompiler={','.join(CXX_FLAGS)}", "--cudart=static", "--threads=0")
ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
SYSTEMS = ("Linux", "Darwin")
STRING_VARIABLE = r"^(\w+)\b[^=\n]*= *['\"]([^'\"\n]+)['\"]"  # in Python code


class Torch(NamedTuple):
    """An installation of PyTorch."""

    folder: Path  # of its package
    version: str  # such as 2.13.0+cpu
    cuda: str | None  # version of CUDA for which it was compiled


class Step(NamedTuple):
    """One call of the compiler, with the files that it reads and writes."""

    output: str
    inputs: list[str]  # without headers
    command: list[str]


def find_torch() -> Torch | None:
    """The PyTorch of this Python, not imported.

    Site-packages are searched too, because pip's isolated builds hide them. By the stable ABI, the
    headers of any PyTorch from `OLDEST_TORCH` on fit all others.
    """
    spec = importlib.util.find_spec("torch")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    folders += [os.path.join(packages, "torch") for packages in [*site.getsitepackages(), *user]]
    for folder in map(Path, folders):
        if (folder / "version.py").is_file():
            text = (folder / "version.py").read_text(errors="replace")
            strings = dict(re.findall(STRING_VARIABLE, text, re.MULTILINE))
            if "__version__" in strings:
                return Torch(folder, strings["__version__"], strings.get("cuda"))
    return None


def why_not(*, cuda: bool = False) -> str | None:
    """The reason why the kernels cannot be compiled here, None if they can."""
    if platform.system() not in SYSTEMS:
        return f"they are for Linux and macOS, this is {platform.system()}"
    if not sources(cuda=cuda):
        return "their sources (csrc) are not part of this installation"
    compiler = _compiler(cuda)[0]
    if shutil.which(compiler) is None:
        language, variable = ("CUDA", "CUDACXX") if cuda else ("C++", "CXX")
        missing = f"there is no {language} compiler {compiler!r}"
        return f"{missing}: install one, or name another in the variable {variable}"
    if cuda and not _architectures():
        names = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
        return f"{compiler} compiles C++20 for none of {names}"
    torch = find_torch()
    return "torch is not installed" if torch is None else why_not_under(torch.version)


def why_not_under(torch_version: str) -> str | None:
    """The reason why the kernels do not run under a version of PyTorch, None if they do."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None or tuple(map(int, found.groups())) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"the kernels need torch {oldest} or newer, this is {torch_version}"


def remedy(*, cuda: bool = False) -> str:
    """Advice for an installation without the library: a command, and the reason against it."""
    command = f"`{shlex.quote(sys.executable)} -m ttsr_fast.operators.build` compiles it"
    reason = why_not(cuda=cuda)
    return command if reason is None else f"{command}, but not yet: {reason}"


def source_folder() -> Path:
    """`csrc`: inside an installed package, beside it in a checkout."""
    installed = PACKAGE / "csrc"
    return installed if installed.is_dir() else PACKAGE.parent / "csrc"


def sources(*, cuda: bool = False) -> list[Path]:
    """The files to compile."""
    patterns = ("cuda/*.cpp", "cuda/*.cu") if cuda else ("*.cpp", "cpu/*.cpp")
    return sorted(file for pattern in patterns for file in source_folder().glob(pattern))


def compile_library(library: Path, *, cuda: bool = False) -> None:
    """Compile the sources into `library`; with ninja, only the changed ones.

    The environment variables CXX, CXXFLAGS and LDFLAGS are respected, for CUDA CUDACXX, CUDA_HOME,
    NVCCFLAGS and those of nvcc. CXXFLAGS and NVCCFLAGS override the flags above. Messages of the
    compiler go to stderr.

    Raises:
        RuntimeError: `why_not` has a reason, or the compiler finds an error.
    """
    import fcntl  # missing on Windows, where the package imports this module too

    reason = why_not(cuda=cuda)
    if reason is not None:
        raise RuntimeError(f"the kernels cannot be compiled here: {reason}")
    torch = find_torch()
    assert torch is not None  # `why_not` has checked it
    names = f"-fmacro-prefix-map={source_folder()}/="  # messages name a source without its folder
    flags = [*NVCC_FLAGS, f"-Xcompiler={names}", *_architectures()] if cuda else [*CXX_FLAGS, names]
    flags += shlex.split(os.environ.get("NVCCFLAGS" if cuda else "CXXFLAGS", ""))
    compiler = [*_compiler(cuda), *FLAGS, "-isystem", f"{torch.folder}/include", *flags]

    # Ninja sees changes of sources, headers and commands. The name covers the rest.
    version = _output([*_compiler(cuda), "--version"])
    environment = sorted(item for item in os.environ.items() if item[0].startswith("NVCC_"))
    name = f"objects-{_digest(compiler, version, environment, torch)}"
    root = source_folder().parent
    folder = (library.parent if root == PACKAGE else root / "build") / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # no objects of other users
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _run_steps(_steps(f"{folder}/{library.name}", compiler, torch, cuda=cuda), folder)
        _replace(library, folder / library.name)


def _steps(library: str, compiler: list[str], torch: Torch, *, cuda: bool) -> list[Step]:
    """A step for each source, and the link of `library` as the last one."""
    folder, steps = os.path.dirname(library), []
    for source in map(str, sources(cuda=cuda)):
        name = os.path.relpath(source, source_folder()).replace("/", "-")
        output = f"{folder}/{name}.o"
        command = [*compiler, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]
        steps.append(Step(output, [source], command))
    objects = [step.output for step in steps]
    link = [f"-L{torch.folder}/lib", "-ltorch_cpu", "-lc10"]
    if cuda:
        # Functions of torch's libtorch_cuda.so are found only if the library lists that name as
        # needed. The linker takes the name from any file, so a CPU build of torch suffices.
        empty = f"{folder}/libtorch_cuda.so"
        options = ["-shared", "-Xlinker=-soname=libtorch_cuda.so", "-x", "c++", "/dev/null"]
        steps.append(Step(empty, [], [*_compiler(cuda), *options, "-o", empty]))
        link = [f"-L{folder}", "-Xlinker=--no-as-needed", "-ltorch_cuda", *link]
    else:
        link += shlex.split(os.environ.get("LDFLAGS", ""))
    command = [*compiler, "-shared", *objects, *link, "-o", library]
    return [*steps, Step(library, [step.output for step in steps], command)]


def _run_steps(steps: list[Step], folder: Path) -> None:
    """Run the outdated steps by ninja, all of them where it is missing."""
    folders = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
    ninja = shutil.which("ninja", path=os.pathsep.join(folders))
    if ninja is None:
        (folder / ".ninja_log").unlink(missing_ok=True)  # ninja did not make what follows
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, [step.command for step in steps[:-1]]))
        _run(steps[-1].command)
    else:
        file = folder / "build.ninja"
        file.write_text(_ninja_file(steps, str(folder)))
        _run([ninja, "-f", str(file)])


def _ninja_file(steps: list[Step], folder: str) -> str:
    def escaped(path: str) -> str:
        return re.sub(r"[$ :]", r"$\g<0>", path)

    lines = [f"builddir = {escaped(folder)}", "rule call", "  command = $call"]
    for output, inputs, command in steps:
        lines.append(f"build {escaped(output)}: call {' '.join(map(escaped, inputs))}")
        lines.append(f"  description = {escaped(os.path.basename(output))}")
        lines.append(f"  call = {shlex.join(command).replace('$', '$$')}")
        if "-MF" in command:
            lines += [f"  depfile = {escaped(output)}.d", "  deps = gcc"]
    return "\n".join([*lines, ""])


def _run(command: list[str]) -> None:
    status = subprocess.run(command, stdout=2).returncode  # stdout is for results
    if status != 0:
        raise RuntimeError(f"the compiler stopped with status {status}: {shlex.join(command)}")


def _replace(library: Path, compiled: Path) -> None:
    """Replace `library` as a whole, unless it has the same content."""
    if library.is_file() and filecmp.cmp(compiled, library, shallow=False):
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
        copy = shutil.copyfile(compiled, os.path.join(folder, library.name))
        os.chmod(copy, 0o755)  # nobody else may change a library that is loaded
        os.replace(copy, library)


def build_libraries() -> Iterator[str]:
    """`build_library` for the CPU, and for CUDA where PyTorch has it; a line for each library.

    Raises:
        RuntimeError: as `build_library`, for the CPU.
    """
    yield f"compiled {build_library()}"
    torch = find_torch()
    if torch is not None and torch.cuda is not None:
        reason = why_not(cuda=True)
        left_out = f"left out the kernels in CUDA: {reason}"
        yield left_out if reason else f"compiled {build_library(cuda=True)}"


def build_library(*, cuda: bool = False) -> Path:
    """Compile the kernels into torch's cache of extensions, for an installation without them.

    Returns:
        The library, which `cached_library` finds from then on.

    Raises:
        RuntimeError: as `compile_library`; or other users can write to the cache.
    """
    library = _cache_path(cuda)
    for folder in (library.parent.parent, library.parent):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    reason = _why_not_trusted(library)
    if reason is not None:
        raise RuntimeError(f"{reason}; name another folder in TORCH_EXTENSIONS_DIR")
    compile_library(library, cuda=cuda)
    return library


def cached_library(*, cuda: bool = False) -> Path | None:
    """The result of `build_library` from these very sources.

    None if there is none, or, with a warning, if other users can write to the file or its folders:
    loading a library runs its code.
    """
    library = _cache_path(cuda)
    if not library.is_file():
        return None
    reason = _why_not_trusted(library)
    if reason is None:
        return library
    warnings.warn(f"ttsr-fast does not load {library}: {reason}", stacklevel=2)
    return None


def _why_not_trusted(library: Path) -> str | None:
    """The reason why a cached library may be the work of another user, None if it cannot be."""
    if not hasattr(os, "getuid"):
        return None
    for path in filter(Path.exists, (library.parent.parent, library.parent, library)):
        status = path.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        if status.st_mode & 0o022:
            return f"{path} can be written to by other users (chmod go-w changes that)"
    return None


def _cache_path(cuda: bool) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default).expanduser()
    torch = find_torch()
    flags = (platform.machine(), FLAGS, CXX_FLAGS, NVCC_FLAGS, ARCHITECTURES)
    version = torch.cuda if cuda and torch is not None else None
    files = [file.read_bytes() for file in sorted(source_folder().rglob("*.[ch]*"))]
    name = CUDA_LIBRARY if cuda else LIBRARY
    return root / "ttsr_fast" / _digest(flags, version, files) / name


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compiler(cuda: bool) -> list[str]:
    named = os.environ.get("CUDACXX" if cuda else "CXX")
    if named or not cuda:
        return shlex.split(named or "c++")
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH", os.defpath)
    folders = [*([f"{home}/bin"] if home else []), path, "/usr/local/cuda/bin"]
    return [shutil.which("nvcc", path=os.pathsep.join(folders)) or "nvcc"]


def _architectures() -> list[str]:
    """Flags for machine code of every architecture that nvcc knows, and PTX of the newest.

    Later GPUs translate the PTX. An nvcc without C++20 knows none.
    """
    known = _output([*_compiler(cuda=True), FLAGS[0], "--list-gpu-arch"]).split()
    numbers = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    code = [(number, "sm") for number in numbers] + [(number, "compute") for number in numbers[-1:]]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in code]


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ttsr_fast.operators.build",
        description="Compile the kernels for this user, in CUDA where PyTorch has it.",
    )
    text = f"compile these files instead: {LIBRARY} or {CUDA_LIBRARY}, in any folder"
    parser.add_argument("libraries", type=Path, nargs="*", metavar="library", help=text)
    libraries = parser.parse_args().libraries
    for name in {library.name for library in libraries} - {LIBRARY, CUDA_LIBRARY}:
        parser.error(f"the library must be named {LIBRARY} or {CUDA_LIBRARY}, got {name}")
    try:
        for library in libraries:
            compile_library(library, cuda=library.name == CUDA_LIBRARY)
        for line in () if libraries else build_libraries():
            print(line)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
