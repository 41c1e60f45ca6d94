"""Compiles the kernels in C++, the same way for `setup.py` and for `ttsr-fast env --build`.

The library is written against PyTorch's stable ABI and needs nothing of Python's, so that one file
serves every Python and every torch from `OLDEST_TORCH` on; it chooses its instruction set when it
runs. `setup.py` runs this file by itself: it imports nothing of the package, and torch only to
compile.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY = "_C.abi3.so"
OLDEST_TORCH = (2, 11)
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # OLDEST_TORCH
)


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, None if they can."""
    if platform.system() not in ("Linux", "Darwin"):
        return f"they are for Linux and macOS, this is {platform.system()}"
    if not (source_folder() / "module.cpp").is_file():
        return "their sources (csrc) are not part of this installation"
    if shutil.which(_compiler()[0]) is None:
        return f"there is no C++ compiler {_compiler()[0]!r}; the variable CXX names another"
    try:
        from torch import __version__ as version
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    return None


def source_folder() -> Path:
    """`csrc`: inside the package where that is installed, beside it in the repository."""
    package = Path(__file__).resolve().parent
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def sources() -> list[Path]:
    """The files to compile."""
    return sorted(source_folder().rglob("*.cpp"))


def compile_library(library: Path) -> None:
    """Compile the sources into `library`, all at the same time.

    The environment variables CXX, CXXFLAGS and LDFLAGS are respected; where CXXFLAGS differ from
    `FLAGS`, they win. Messages of the compiler go to the terminal.

    Raises:
        RuntimeError: `why_not` has a reason, or the compiler finds an error.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the kernels cannot be compiled here: {reason}")
    import torch

    torch_folder = Path(torch.__file__).parent
    flags = [*FLAGS, "-isystem", str(torch_folder / "include")]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    library.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = [f"{folder}/{number}.o" for number in range(len(sources()))]
        commands = [
            [*_compiler(), *flags, "-c", str(source), "-o", target]
            for source, target in zip(sources(), objects, strict=True)
        ]
        list(pool.map(_run, commands))
        linked = f"{folder}/{LIBRARY}"
        _run([*_compiler(), *flags, "-shared", *objects, *link, "-o", linked])
        os.replace(linked, library)


def build_library() -> Path:
    """Compile the kernels once into torch's cache of extensions, for an installation without them.

    Returns:
        The library, where `cached_library` finds it from then on.

    Raises:
        RuntimeError: as `compile_library`.
    """
    library = _cache_path()
    if not library.is_file():
        compile_library(library)
    return library


def cached_library() -> Path | None:
    """What `build_library` has compiled from these very sources, None if it has not."""
    library = _cache_path()
    return library if library.is_file() else None


def _cache_path() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "torch_extensions")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default).expanduser()
    digest = hashlib.sha256(" ".join([platform.machine(), *FLAGS]).encode())
    for file in sorted(source_folder().rglob("*.[ch]*")):
        digest.update(file.read_bytes())
    return root / "ttsr_fast" / digest.hexdigest()[:16] / LIBRARY


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _run(command: list[str]) -> None:
    status = subprocess.run(command).returncode
    if status != 0:
        raise RuntimeError(f"the compiler stopped with status {status}: {shlex.join(command)}")
