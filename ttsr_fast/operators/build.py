"""Compiles the kernels in C++ and in CUDA, for `setup.py`, make and `ttsr-fast env`.

There is a library for the CPU, which chooses its instruction set when it runs, and one that holds
code for several GPUs. Both are written against PyTorch's stable ABI and need nothing of Python's,
so that one file serves every Python and every torch from `OLDEST_TORCH` on. This file imports
nothing of the package, and no torch. It is a program, too:

    python -m ttsr_fast.operators.build   # for an installation without the kernels
    python ttsr_fast/operators/build.py ttsr_fast/_C.abi3.so   # in place
"""

import argparse
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
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.abi3.so"
OLDEST_TORCH = (2, 10)
FLAGS = ("-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")  # OLDEST_TORCH
CXX_FLAGS = ("-fPIC", "-fvisibility=hidden")
NVCC_FLAGS = (
    "-DUSE_CUDA",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "--cudart=static",  # torch may bring along another
    "--threads=0",
)
ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
SYSTEMS = ("Linux", "Darwin")


class Torch(NamedTuple):
    """An installation of PyTorch.

    Attributes:
        folder: of its package.
        version: such as 2.13.0+cpu.
        cuda: version of CUDA that it is built for.
    """

    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch | None:
    """The PyTorch of this Python, not imported.

    Site-packages are searched as well, because pip's isolated builds hide them. By the stable ABI,
    the headers of any PyTorch from `OLDEST_TORCH` on fit all others.
    """
    spec = importlib.util.find_spec("torch")
    found = [] if spec is None else list(spec.submodule_search_locations or ())
    roots = [{"base": sys.prefix, "platbase": sys.exec_prefix}]
    if "include-system-site-packages = true" in _environment_settings():
        roots.append({"base": sys.base_prefix, "platbase": sys.base_exec_prefix})
    found += [
        os.path.join(sysconfig.get_path(name, vars=root), "torch")
        for root in roots
        for name in ("platlib", "purelib")
    ]
    if site.ENABLE_USER_SITE:
        found.append(os.path.join(site.getusersitepackages(), "torch"))
    for folder in map(Path, found):
        if (folder / "version.py").is_file():
            text = (folder / "version.py").read_text(errors="replace")
            version, cuda = (_value(name, text) for name in ("__version__", "cuda"))
            if version is not None:
                return Torch(folder, version, cuda)
    return None


def _environment_settings() -> str:
    """The file that makes a folder a virtual environment; empty elsewhere."""
    file = Path(sys.prefix, "pyvenv.cfg")
    return file.read_text(errors="replace").lower() if file.is_file() else ""


def _value(name: str, source: str) -> str | None:
    """The string that Python code assigns to a variable; None for anything else."""
    found = re.search(rf"^{name}\b[^=\n]*= *['\"]([^'\"\n]+)['\"]", source, re.MULTILINE)
    return None if found is None else found[1]


def why_not(*, cuda: bool = False) -> str | None:
    """Why the kernels cannot be compiled here, for the CPU or in CUDA; None if they can."""
    if platform.system() not in SYSTEMS:
        return f"they are for Linux and macOS, this is {platform.system()}"
    if not sources(cuda=cuda):
        return "their sources (csrc) are not part of this installation"
    compiler = _compiler(cuda)[0]
    if shutil.which(compiler) is None:
        language, variable = ("CUDA", "CUDACXX") if cuda else ("C++", "CXX")
        return (
            f"there is no {language} compiler {compiler!r}: install one, or name another in the "
            f"variable {variable}"
        )
    if cuda and not _architectures():
        names = ", ".join(f"sm_{number}" for number in ARCHITECTURES)
        return f"{compiler} compiles C++20 for none of {names}"
    torch = find_torch()
    return "torch is not installed" if torch is None else why_not_under(torch.version)


def why_not_under(torch_version: str) -> str | None:
    """Why the kernels do not run under a version of PyTorch, None if they do."""
    found = re.match(r"(\d+)\.(\d+)", torch_version)
    if found is None or tuple(map(int, found.groups())) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"the kernels need torch {oldest} or newer, this is {torch_version}"


def remedy(*, cuda: bool = False) -> str:
    """Advice for an installation without the library: a command, and what it lacks to work."""
    command = f"`{shlex.quote(sys.executable)} -m ttsr_fast.operators.build` compiles it"
    reason = why_not(cuda=cuda)
    return command if reason is None else f"{command}, but not yet: {reason}"


def source_folder() -> Path:
    """`csrc`: inside the package where that is installed, beside it in the repository."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def sources(*, cuda: bool = False) -> list[Path]:
    """The files to compile."""
    patterns = ("cuda/*.cpp", "cuda/*.cu") if cuda else ("*.cpp", "cpu/*.cpp")
    return sorted(file for pattern in patterns for file in source_folder().glob(pattern))


def compile_library(library: Path, *, cuda: bool = False) -> None:
    """Compile the sources into `library`, all at the same time.

    The environment variables CXX, CXXFLAGS and LDFLAGS are respected; for CUDA it is CUDACXX,
    CUDA_HOME, NVCCFLAGS and what nvcc itself reads. Where CXXFLAGS or NVCCFLAGS differ from the
    flags above, they win. Messages of the compiler go to the terminal.

    Raises:
        RuntimeError: `why_not` has a reason, or the compiler finds an error.
    """
    reason = why_not(cuda=cuda)
    if reason is not None:
        raise RuntimeError(f"the kernels cannot be compiled here: {reason}")
    torch = find_torch()
    assert torch is not None  # or there would be a reason
    compiler = [*_compiler(cuda), *FLAGS, "-isystem", str(torch.folder / "include")]
    here = f"-fmacro-prefix-map={source_folder()}/="  # messages name a source, not its folder
    compiler += (
        [*NVCC_FLAGS, f"-Xcompiler={here}", *_architectures()] if cuda else [*CXX_FLAGS, here]
    )
    compiler += shlex.split(os.environ.get("NVCCFLAGS" if cuda else "CXXFLAGS", ""))
    link = [f"-L{torch.folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [f"{folder}/{number}.o" for number in range(len(sources(cuda=cuda)))]
        commands = [
            [*compiler, "-c", str(source), "-o", target]
            for source, target in zip(sources(cuda=cuda), objects, strict=True)
        ]
        list(pool.map(_run, commands))
        if cuda:
            link = [*_stand_in_for_torch_cuda(folder), *link]
        else:
            link += shlex.split(os.environ.get("LDFLAGS", ""))
        linked = f"{folder}/{library.name}"
        _run([*compiler, "-shared", *objects, *link, "-o", linked])
        os.chmod(linked, 0o755)  # nobody else may change what is loaded
        os.replace(linked, library)


def build_libraries() -> Iterator[str]:
    """`build_library` for the CPU, and for CUDA where PyTorch has it; lines that say what was done.

    Raises:
        RuntimeError: as `build_library`, for the CPU.
    """
    yield f"compiled {build_library()}"
    torch = find_torch()
    if torch is not None and torch.cuda is not None:
        reason = why_not(cuda=True)
        if reason is not None:
            yield f"left out the kernels in CUDA: {reason}"
        else:
            yield f"compiled {build_library(cuda=True)}"


def build_library(*, cuda: bool = False) -> Path:
    """Compile the kernels into torch's cache of extensions, for an installation without them.

    Returns:
        The library, where `cached_library` finds it from then on.

    Raises:
        RuntimeError: as `compile_library`; or other users can write to that place.
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
    """What `build_library` has compiled from these very sources.

    None if it has not, or if other users can write to the file or its folders, with a warning:
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
    """Why a library in the cache may be the work of another user, None if it cannot be."""
    if not hasattr(os, "getuid"):
        return None
    for path in (library.parent.parent, library.parent, library):
        if not path.exists():
            continue
        status = path.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        if status.st_mode & 0o022:
            return f"{path} can be written to by other users (chmod go-w changes that)"
    return None


def _cache_path(cuda: bool) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default).expanduser()
    how: tuple[str, ...] = (
        platform.machine(),
        *FLAGS,
        *CXX_FLAGS,
        *NVCC_FLAGS,
        *map(str, ARCHITECTURES),
    )
    torch = find_torch()
    if cuda and torch is not None:
        how = (*how, str(torch.cuda))
    digest = hashlib.sha256(" ".join(how).encode())
    for file in sorted(source_folder().rglob("*.[ch]*")):
        digest.update(file.read_bytes())
    name = CUDA_LIBRARY if cuda else LIBRARY
    return root / "ttsr_fast" / digest.hexdigest()[:16] / name


def _compiler(cuda: bool) -> list[str]:
    named = os.environ.get("CUDACXX" if cuda else "CXX")
    if named or not cuda:
        return shlex.split(named or "c++")
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    if os.environ.get("CUDA_HOME"):
        folders.insert(0, os.path.join(os.environ["CUDA_HOME"], "bin"))
    return [shutil.which("nvcc", path=os.pathsep.join(folders)) or "nvcc"]


def _architectures() -> list[str]:
    """Flags for machine code of every architecture that nvcc knows, and PTX of the newest.

    Later GPUs translate the PTX. An nvcc without C++20 knows none.
    """
    question = [*_compiler(cuda=True), FLAGS[0], "--list-gpu-arch"]
    known = subprocess.run(question, capture_output=True, text=True).stdout.split()
    numbers = [number for number in ARCHITECTURES if f"compute_{number}" in known]
    code = [(number, "sm") for number in numbers] + [(number, "compute") for number in numbers[-1:]]
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for number, kind in code]


def _stand_in_for_torch_cuda(folder: str) -> list[str]:
    """Flags that link with an empty library of the name of torch's for CUDA, made in `folder`.

    A process that has torch has loaded libtorch_cuda.so, but not for others to see: a library gets
    at its functions only by naming it among those that it needs. The linker believes that name
    of any file that bears it, so that a CPU build of torch will do to link with.
    """
    name = "libtorch_cuda.so"
    make = [*_compiler(cuda=True), "-shared", f"-Xlinker=-soname={name}", "-x", "c++", "/dev/null"]
    _run([*make, "-o", f"{folder}/{name}"])
    return [f"-L{folder}", "-Xlinker=--no-as-needed", "-ltorch_cuda"]


def _run(command: list[str]) -> None:
    status = subprocess.run(command).returncode
    if status != 0:
        raise RuntimeError(f"the compiler stopped with status {status}: {shlex.join(command)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ttsr_fast.operators.build",
        description="Compile the kernels for this user, in CUDA where PyTorch has it.",
    )
    parser.add_argument(
        "library",
        type=Path,
        nargs="?",
        help=f"compile this file instead: {LIBRARY} or {CUDA_LIBRARY}, in any folder",
    )
    target = parser.parse_args().library
    if target is not None and target.name not in (LIBRARY, CUDA_LIBRARY):
        parser.error(f"the library must be named {LIBRARY} or {CUDA_LIBRARY}, got {target.name}")
    try:
        if target is not None:
            compile_library(target, cuda=target.name == CUDA_LIBRARY)
        for line in build_libraries() if target is None else ():
            print(line)
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
