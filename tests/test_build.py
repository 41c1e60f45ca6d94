"""Compilation: flags and variables, errors, the cache; on libraries of one line.

The output of nvcc is covered by `test_cuda_library.py`; here a stand-in records its calls.
"""

import ctypes
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ttsr_fast.operators import build

FAKE_COMPILER = shlex.join([sys.executable, str(Path(__file__).with_name("fake_compiler.py"))])
ANSWER = '#define EXPORT extern "C" __attribute__((visibility("default")))\nEXPORT int answer() {'
Write = Callable[..., None]


def write_program(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def test_compiler_flags_of_the_user_win(
    write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool
) -> None:
    write_source(f"{ANSWER} return NUMBER; }}")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNUMBER=1"))
    monkeypatch.setenv("CXXFLAGS", "-UNUMBER -DNUMBER='40 + 2' -DUNUSED='$HOME: $$'")
    library = tmp_path / "new folder" / "answer.so"
    build.compile_library(library)
    assert answer_of(library) == 42
    assert [path.name for path in library.parent.iterdir()] == ["answer.so"]


def test_error_in_a_source(
    write_source: Write, tmp_path: Path, capfd: pytest.CaptureFixture[str], ninja: bool
) -> None:
    """The command and the compiler's message are shown, and no library is there."""
    write_source(f"{ANSWER} return no_such_name; }}")
    with pytest.raises(RuntimeError, match="the compiler stopped with status 1: ") as error:
        build.build_library()
    shown = capfd.readouterr().err
    assert "no_such_name" in shown
    assert re.search(r"c\+\+ .*module\.cpp", shown if ninja else str(error.value))
    assert build.cached_library() is None
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_objects_of_an_installed_package_are_in_the_cache(
    write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the package, which may belong to another user."""
    write_source(f"{ANSWER} return 1; }}")
    package = build.source_folder().parent
    monkeypatch.setattr(build, "PACKAGE", package)
    library = build.build_library()
    assert [path.name for path in package.iterdir()] == ["csrc"]
    (objects,) = library.parent.glob("*/*.o")
    assert objects.parent.stat().st_mode & 0o077 == 0


def test_cache_belongs_to_the_sources(write_source: Write) -> None:
    write_source(f"{ANSWER} return 1; }}")
    assert build.cached_library() is None
    first = build.build_library()
    assert build.cached_library() == first
    assert answer_of(first) == 1

    write_source(f"{ANSWER} return 2; }}")
    assert build.cached_library() is None
    second = build.build_library()
    assert (answer_of(second), second != first) == (2, True)

    second.unlink()
    second.write_bytes(b"damaged")
    assert build.build_library() == second
    assert second.read_bytes() != b"damaged"


@pytest.mark.parametrize(
    ("text", "version", "cuda"),
    [
        (
            "from typing import Optional\n__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n",
            "2.13.0+cpu",
            None,
        ),
        ("__version__ = '2.4.1+cu121'\ncuda = '12.1'\n", "2.4.1+cu121", "12.1"),
        ('__version__ = "2.14.0a0+git1"\nraise ImportError\n', "2.14.0a0+git1", None),
    ],
)
def test_torch_is_found_without_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, version: str, cuda: str | None
) -> None:
    """By the path of imports, and where pip's isolated build hides it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(text)
    found = build.Torch(tmp_path / "torch", version, cuda)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    assert build.find_torch() == found
    (tmp_path / "torch" / "version.py").write_text("")
    monkeypatch.setattr("site.ENABLE_USER_SITE", False)
    assert build.find_torch() is None


def test_reasons(write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(f"{ANSWER} return 1; }}")
    assert build.why_not() is None
    with monkeypatch.context() as patch:
        older = build.Torch(tmp_path, "2.9.1+cpu", None)
        patch.setattr(build, "find_torch", lambda: older)
        assert build.why_not() == "the kernels need torch 2.10 or newer, this is 2.9.1+cpu"
        with pytest.raises(RuntimeError, match=r"the kernels need torch 2\.10"):
            build.build_library()
        patch.setattr(build, "find_torch", lambda: None)
        assert build.why_not() == "torch is not installed"
    with monkeypatch.context() as patch:
        patch.setattr("platform.system", lambda: "Windows")
        assert build.why_not() == "they are for Linux and macOS, this is Windows"
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -pipe")
        with pytest.raises(RuntimeError, match=r"no C\+\+ compiler 'no-such-compiler'"):
            build.build_library()
        assert re.fullmatch(r"`\S+ -m .*` compiles it, but not yet: there is .*", build.remedy())
    monkeypatch.setattr(build, "source_folder", lambda: tmp_path / "missing")
    with pytest.raises(RuntimeError, match="sources .csrc. are not part of this installation"):
        build.build_library()


@pytest.fixture
def cuda_source(write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel, which no compiler will see, and a folder in which nvcc may be found."""
    write_source("", "cuda/answer_kernel.cu")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    ("known", "codes"),
    [
        (
            "compute_75 compute_80 compute_90 compute_100 compute_120",
            "sm_80 sm_90 sm_100 compute_100",
        ),
        ("compute_50 compute_80 compute_90", "sm_80 sm_90 compute_90"),
    ],
)
def test_code_for_the_gpus_that_nvcc_knows(
    known: str, codes: str, cuda_source: Path, monkeypatch: pytest.MonkeyPatch, ninja: bool
) -> None:
    monkeypatch.setenv("CUDACXX", f"{FAKE_COMPILER} {known}")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("NVCCFLAGS", "-O0 -DNUMBER='40 + 2'")
    library = cuda_source / "answer.so"
    build.compile_library(library, cuda=True)
    compiled, linked = map(shlex.split, library.read_text().splitlines())
    for command in (compiled, linked):
        assert re.findall(r",code=(\w+)", " ".join(command)) == codes.split()
        assert command.index("-O3") < command.index("-O0") == command.index("-DNUMBER=40 + 2") - 1
    assert compiled[-4:-2] == ["-c", str(build.source_folder() / "cuda/answer_kernel.cu")]
    assert linked.index("-shared") < linked.index("-ltorch_cuda") < linked.index("-ltorch_cpu")


def test_nvcc_is_looked_for(cuda_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDACXX goes before CUDA_HOME, CUDA_HOME before PATH; none of these knows a GPU."""
    for name in ("bin/nvcc", "home/bin/nvcc", "named"):
        write_program(cuda_source / name)
    expected = f"{cuda_source}/%s compiles C++20 for none of sm_80, sm_90, sm_100"
    assert build.why_not(cuda=True) == expected % "bin/nvcc"
    monkeypatch.setenv("CUDA_HOME", str(cuda_source / "home"))
    assert build.why_not(cuda=True) == expected % "home/bin/nvcc"
    monkeypatch.setenv("CUDACXX", str(cuda_source / "named"))
    assert build.why_not(cuda=True) == expected % "named"

    monkeypatch.setenv("CUDACXX", "no-such-nvcc -v")
    with pytest.raises(RuntimeError, match=r"no CUDA compiler 'no-such-nvcc': install one"):
        build.build_library(cuda=True)


def test_an_nvcc_without_the_standard_is_none(
    cuda_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_program(cuda_source / "nvcc", f'test "$1" = {build.FLAGS[0]} || echo compute_80')
    monkeypatch.setenv("CUDACXX", str(old))
    assert build.why_not(cuda=True) == f"{old} compiles C++20 for none of sm_80, sm_90, sm_100"


def test_each_library_has_sources_and_a_cache_of_its_own(
    write_source: Write, cuda_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", f"{FAKE_COMPILER} compute_90")
    assert build.why_not() == "their sources (csrc) are not part of this installation"
    library = build.build_library(cuda=True)
    assert library.name == build.CUDA_LIBRARY
    assert (build.cached_library(cuda=True), build.cached_library()) == (library, None)

    write_source("// another")
    assert build.cached_library(cuda=True) is None
    monkeypatch.setenv("CXX", FAKE_COMPILER)
    library = build.build_library()
    assert library.name == build.LIBRARY
    assert (build.cached_library(cuda=True), build.cached_library()) == (None, library)
    assert "cuda" not in library.read_text()
    names = [["module.cpp"], ["answer_kernel.cu"]]
    assert [[path.name for path in build.sources(cuda=cuda)] for cuda in (False, True)] == names


def test_sources_of_the_repository() -> None:
    folder = Path(__file__).parent.parent / "csrc"
    assert build.source_folder() == folder
    together = {*build.sources(), *build.sources(cuda=True)}
    assert {folder / "cpu/search.cpp", folder / "cuda/gather_fold_kernel.cu"} < together
    assert together == {path for path in folder.rglob("*.c*") if path.is_file()}


def test_a_library_that_others_can_write_is_neither_loaded_nor_built(
    write_source: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(f"{ANSWER} return 1; }}")
    before = os.umask(0o002)  # where a group is a user's own by default
    try:
        library = build.build_library()
    finally:
        os.umask(before)
    assert build.cached_library() == library
    for path in (library, library.parent, library.parent.parent):
        path.chmod(0o775)
        with pytest.warns(UserWarning, match=f"{path} can be written to by other users"):
            assert build.cached_library() is None
        with pytest.raises(RuntimeError, match="other users .*; name another folder in TORCH_EXT"):
            build.build_library()
        path.chmod(0o755)
    if os.getuid() == 0:  # whose files everyone trusts
        os.chown(library, 1, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: library.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to another user"):
        assert build.cached_library() is None
