"""Compiling: flags and variables, errors, the cache; on a library of one line."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from ttsr_fast import build

ANSWER = '#define EXPORT extern "C" __attribute__((visibility("default")))\nEXPORT int answer() {'


@pytest.fixture
def write_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a program the only source; compiler, flags and cache are the test's own."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    monkeypatch.setattr(build, "source_folder", lambda: folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for variable in ("CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(variable, raising=False)

    def write(text: str) -> None:
        (folder / "module.cpp").write_text(text)

    return write


def answer_of(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def test_compiler_flags_of_the_user_win(
    write_source: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(f"{ANSWER} return NUMBER; }}")
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DNUMBER=1"))
    monkeypatch.setenv("CXXFLAGS", "-UNUMBER -DNUMBER='40 + 2'")
    library = tmp_path / "new folder" / "answer.so"
    build.compile_library(library)
    assert answer_of(library) == 42
    assert [path.name for path in library.parent.iterdir()] == ["answer.so"]


def test_error_in_a_source(
    write_source: Callable[[str], None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_source(f"{ANSWER} return no_such_name; }}")
    with pytest.raises(RuntimeError, match=r"compiler stopped with status 1: c\+\+ .*module\.cpp"):
        build.build_library()
    assert "no_such_name" in capfd.readouterr().err
    assert build.cached_library() is None
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_cache_belongs_to_the_sources(
    write_source: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(f"{ANSWER} return 1; }}")
    assert build.cached_library() is None
    first = build.build_library()
    assert build.cached_library() == first
    assert answer_of(first) == 1

    write_source(f"{ANSWER} return 2; }}")
    assert build.cached_library() is None
    second = build.build_library()
    assert (answer_of(second), second != first) == (2, True)

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.build_library() == second


def test_reasons(
    write_source: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(f"{ANSWER} return 1; }}")
    assert build.why_not() is None
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "2.10.1+cpu")
        assert build.why_not() == "torch 2.10.1+cpu is older than 2.11"
    with monkeypatch.context() as patch:
        patch.setattr("platform.system", lambda: "Windows")
        assert build.why_not() == "they are for Linux and macOS, this is Windows"
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler -pipe")
        with pytest.raises(RuntimeError, match=r"no C\+\+ compiler 'no-such-compiler'"):
            build.build_library()
    monkeypatch.setattr(build, "source_folder", lambda: tmp_path / "missing")
    with pytest.raises(RuntimeError, match="sources .csrc. are not part of this installation"):
        build.build_library()


def test_sources_of_the_repository() -> None:
    root = Path(__file__).parent.parent
    assert build.source_folder() == root / "csrc"
    assert root / "csrc" / "module.cpp" in build.sources()
