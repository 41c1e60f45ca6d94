"""What is in the wheel and in the source archive, and that they work once installed.

nvcc is not needed: the library in CUDA is a stand-in, see `test_cuda_library.py` for its own tests.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import ttsr_fast

ROOT = Path(__file__).parent.parent
LIBRARY, CUDA_LIBRARY = "ttsr_fast/_C.abi3.so", "ttsr_fast/_C_cuda.abi3.so"
FAKE_COMPILER = shlex.join([sys.executable, str(ROOT / "tests" / "fake_compiler.py")])
FAKE_NVCC = f"{FAKE_COMPILER} compute_90"
pytestmark = pytest.mark.xdist_group("packaging")  # the archives are built once

SEARCH = """
import torch, ttsr_fast
from ttsr_fast.operators import backends, library
assert ttsr_fast.__file__.startswith({installed!r}), ttsr_fast.__file__
query, key = torch.randn(2, 3, 6, 5), torch.randn(1, 3, 7, 4)
def search_and_transfer(backend):
    score, index = ttsr_fast.search(query, key, backend=backend)
    return score, index, ttsr_fast.gather_fold(key, index, backend=backend)
expected = search_and_transfer("reference")
"""
WITHOUT_THE_LIBRARY = """
chosen, portable = search_and_transfer(None), search_and_transfer("torch")
assert all(torch.equal(a, b) for a, b in zip(chosen, portable))
torch.testing.assert_close(chosen, expected)
try:
    search_and_transfer("cpp")
except RuntimeError as error:
    assert "the compiled library is not part of this installation" in str(error), error
else:
    raise AssertionError("the library should be missing")

import shutil
from ttsr_fast.operators import build
def compile_library(target, cuda):  # stands in for the compiler
    assert build.why_not() is None and len(build.sources()) > 1 and not cuda
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy({library!r}, target)
build.compile_library = compile_library
build.build_library()
library.load_library.cache_clear()
torch.testing.assert_close(search_and_transfer("cpp"), expected)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    left_out = ("CXX", "LDFLAGS", "CUDACXX", "CUDA_HOME", "NVCCFLAGS", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=inherited | {"CXXFLAGS": "-O0"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_checked(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = run(*command, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout
    return result.stdout


def files_under(*folders: str, suffixes: str) -> set[str]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    return {str(path.relative_to(ROOT)) for path in paths if path.suffix in suffixes.split()}


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without anything that was built in it."""
    tree = tmp_path_factory.mktemp("tree") / "ttsr-fast"
    made = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "build", "dist", "out", "*.so", "*.egg-info", "__py*"
    )
    shutil.copytree(ROOT, tree, ignore=made)
    return tree


@pytest.fixture(scope="session")
def archives(tree: Path) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    build = ("-m", "build", "--no-isolation")
    run_checked(*build, cwd=tree, TTSR_FAST_BUILD="cuda", CUDACXX=FAKE_NVCC)
    (archive,), (wheel,) = tree.glob("dist/*.tar.gz"), tree.glob("dist/*.whl")
    return archive, wheel


@pytest.fixture(scope="session")
def wheel(archives: tuple[Path, Path]) -> Path:
    return archives[1]


@pytest.fixture(scope="session")
def python_only(tree: Path, archives: tuple[Path, Path]) -> Path:
    """The wheel without the libraries."""
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", "python-only")
    run_checked(*build, cwd=tree, TTSR_FAST_BUILD="none")
    (wheel,) = tree.glob("python-only/*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target")
    run_checked(*pip, folder, wheel, cwd=folder.parent)
    return folder


def test_wheel_holds_the_package(wheel: Path) -> None:
    kernels = files_under("csrc", suffixes=".h .cpp .cu") | files_under("kernels", suffixes=".py")
    expected = files_under("ttsr_fast", suffixes=".py .typed .yaml") | {LIBRARY, CUDA_LIBRARY}
    expected |= {f"ttsr_fast/{path}" for path in kernels}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"csrc/cpu/search.cpp", "csrc/cuda/gather_fold_kernel.cu", "kernels/search.py"} < kernels


def test_source_archive_holds_the_repository(archives: tuple[Path, Path]) -> None:
    expected = files_under("ttsr_fast", "kernels", "bench", "tests", suffixes=".py .typed .yaml")
    expected |= files_under("csrc", "tests", suffixes=".h .cpp .cu")
    expected |= {"Makefile", "constraints.txt", "pyproject.toml", "setup.py", "MANIFEST.in"}
    expected |= {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", ".clang-format"}
    with tarfile.open(archives[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert expected <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    assert wheel.name.startswith(f"ttsr_fast-{ttsr_fast.__version__}-cp310-abi3-")
    library = zipfile.ZipFile(wheel).read(LIBRARY)
    assert b"torch_call_dispatcher" in library
    assert b"torch_python" not in library
    assert b"PyObject" not in library


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(file.read(name))
        scripts = file.read(name.replace("METADATA", "entry_points.txt")).decode()
    required = metadata.get_all("Requires-Dist", [])
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.4", "numpy"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert "ttsr-fast = ttsr_fast.cli:main" in scripts


def test_installed_kernels_run(wheel: Path, tmp_path: Path) -> None:
    installed = install(wheel, tmp_path / "installed")
    program = (
        SEARCH
        + """
for backend in ("cpp", "triton"):
    torch.testing.assert_close(search_and_transfer(backend), expected)
"""
    )
    program = program.format(installed=str(installed))
    environment = {"PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    run_checked("-c", program, cwd=tmp_path, **environment)


def test_without_the_library(python_only: Path, wheel: Path, tmp_path: Path) -> None:
    """The portable backend is chosen; the compiled one gives its reason, until it is built."""
    assert python_only.name.endswith("-py3-none-any.whl")
    installed = install(python_only, tmp_path / "installed")
    library = tmp_path / "compiled.so"
    library.write_bytes(zipfile.ZipFile(wheel).read(LIBRARY))
    program = SEARCH + WITHOUT_THE_LIBRARY
    program = program.format(installed=str(installed), library=str(library))
    environment = {"PYTHONPATH": str(installed), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    run_checked("-c", program, cwd=tmp_path, **environment)


FAKE_TORCH = """
__version__ = '2.13.0+cpu'
cuda: Optional[str] = %r
"""
NO_CXX, NO_NVCC, WITH_CUDA = {"CXX": "nowhere"}, {"CUDACXX": "nowhere"}, {"FAKE_TORCH_CUDA": "13.0"}
WITHOUT = "ttsr-fast: building without the kernels in "


@pytest.mark.parametrize(
    ("wanted", "changed", "built", "line"),
    [
        ("none", {}, [], f"{WITHOUT}C++: TTSR_FAST_BUILD=none"),
        ("none", {}, [], f"{WITHOUT}CUDA: TTSR_FAST_BUILD=none"),
        ("cpu", NO_NVCC, [LIBRARY], f"{WITHOUT}CUDA: TTSR_FAST_BUILD=cpu"),
        ("cuda", {}, [LIBRARY, CUDA_LIBRARY], ""),
        ("", WITH_CUDA, [LIBRARY, CUDA_LIBRARY], ""),
        ("", {}, [LIBRARY], f"{WITHOUT}CUDA: torch 2.13.0+cpu is a build without CUDA"),
        ("", WITH_CUDA | NO_NVCC, [LIBRARY], f"{WITHOUT}CUDA: there is no CUDA compiler 'nowhere'"),
        ("", {"CXX": "false"}, [], '"ttsr_fast._C" failed: the compiler stopped with status 1'),
        ("", NO_CXX, [], f"{WITHOUT}C++: there is no C++ compiler 'nowhere'"),
        ("cpu", NO_CXX, None, "=cpu: the kernels in C++ cannot be compiled here: there is no"),
        ("cuda", NO_CXX, None, "=cuda: the kernels in C++ cannot be compiled here: there is no"),
        ("cuda", NO_NVCC, None, "=cuda: the kernels in CUDA cannot be compiled here: there is no"),
        ("gpu", {}, None, "TTSR_FAST_BUILD must be cpu, cuda or none, got 'gpu'"),
    ],
)
def test_choice_of_kernels(
    wanted: str,
    changed: dict[str, str],
    built: list[str] | None,
    line: str,
    tree: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text(FAKE_TORCH % changed.get("FAKE_TORCH_CUDA"))
    environment = {"CXX": FAKE_COMPILER, "CUDACXX": FAKE_NVCC, "PYTHONPATH": str(tmp_path)}
    environment |= {"TTSR_FAST_BUILD": wanted, **changed}
    command = ("setup.py", "build_ext", "--build-lib", tmp_path / "built")
    result = run(*command, cwd=tree, **environment)
    libraries = [str(path.relative_to(tmp_path / "built")) for path in tmp_path.rglob("*.so")]
    assert (result.returncode, sorted(libraries)) == (built is None, built or []), result.stdout
    assert line in result.stdout
    assert line or WITHOUT not in result.stdout
