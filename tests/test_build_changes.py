"""Compilation of changes alone, interrupted, and by two processes at once; also without ninja."""

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest

from ttsr_fast.operators import build

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() {'
# c++ with a log of its outputs. Where a file `slow` is, it writes a part of one and sleeps.
LOGGED = """#!/bin/sh
for output; do :; done
test "$output" = --version && exec c++ "$@"
test ! -e %(folder)s/slow || echo part > "$output"
echo "${output##*/}" >> %(folder)s/log
test ! -e %(folder)s/slow || exec sleep 60
exec c++ "$@"
"""
Write = Callable[..., None]
Outputs = Callable[[], list[str]]


@pytest.fixture
def outputs(write_source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """Reader of the names of what the compiler has written since the last call."""
    seen, compiler = [], tmp_path / "compiler"
    (tmp_path / "log").touch()
    compiler.write_text(LOGGED % {"folder": tmp_path})
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    def read() -> list[str]:
        names = (tmp_path / "log").read_text().split()[len(seen) :]
        seen.extend(names)
        return sorted(names)

    return read


def answer_of(library: Path) -> int:
    """The answer of a library, loaded from a copy: a path is loaded once."""
    copy = library.with_name(f"copy-{time.monotonic_ns()}.so")
    shutil.copyfile(library, copy)
    try:
        return ctypes.CDLL(str(copy)).answer()
    finally:
        copy.unlink()


def write_two_sources(write: Write) -> list[str]:
    """Sources of which one includes a header; the names of the outputs."""
    write(f'#include "cpu/number.h"\n{ANSWER} return NUMBER; }}')
    write("#define NUMBER 1", "cpu/number.h")
    write("int other;", "cpu/other.cpp")
    return ["answer.so", "cpu-other.cpp.o", "module.cpp.o"]


def test_changes_alone_are_compiled(
    write_source: Write, outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, library = write_two_sources(write_source), tmp_path / "answer.so"
    build.compile_library(library)
    assert outputs() == every
    first = library.stat()
    build.compile_library(library)
    assert (outputs(), library.stat()) == ([], first)

    write_source("#define NUMBER 2", "cpu/number.h")
    build.compile_library(library)
    assert (outputs(), answer_of(library)) == (["answer.so", "module.cpp.o"], 2)
    write_source("int other = 1;", "cpu/other.cpp")
    build.compile_library(library)
    assert outputs() == ["answer.so", "cpu-other.cpp.o"]

    monkeypatch.setenv("LDFLAGS", "-s")
    build.compile_library(library)
    assert outputs() == ["answer.so"]
    monkeypatch.setenv("CXXFLAGS", "-UNUMBER")
    build.compile_library(library)
    assert outputs() == every
    monkeypatch.delenv("CXXFLAGS")
    build.compile_library(library)
    assert outputs() == []
    library.unlink()
    build.compile_library(library)
    assert (outputs(), answer_of(library)) == ([], 2)


def test_without_ninja_the_library_is_the_same(
    write_source: Write, outputs: Outputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ninja compiles everything again after a run without it."""
    every, libraries = write_two_sources(write_source), []
    for number in range(3):
        with monkeypatch.context() as patch:
            if number == 1:
                patch.setattr(shutil, "which", lambda name, **_: None if name == "ninja" else name)
            build.compile_library(tmp_path / str(number) / "answer.so")
        assert outputs() == every
        libraries.append((tmp_path / str(number) / "answer.so").read_bytes())
    assert libraries[0] == libraries[1] == libraries[2]


def start(library: Path) -> ForkProcess:
    """A compilation in a process group of its own."""

    def compile_library() -> None:
        os.setsid()
        build.compile_library(library)

    process = get_context("fork").Process(target=compile_library)
    process.start()
    return process


def status_of(process: ForkProcess) -> int | None:
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interruption_leaves_the_library_whole(
    write_source: Write, outputs: Outputs, tmp_path: Path, ninja: bool, number: int
) -> None:
    write_two_sources(write_source)
    library, slow = tmp_path / "made" / "answer.so", tmp_path / "slow"
    for version in (1, 2):
        before = library.read_bytes() if version == 2 else None
        write_source(f"#define NUMBER {version}", "cpu/number.h")
        write_source(f"int other = {version};", "cpu/other.cpp")
        slow.touch()
        outputs()
        process, started, end = start(library), [], time.monotonic() + 60
        while len(started) < min(2, os.cpu_count()):
            assert time.monotonic() < end
            time.sleep(0.01)
            started += outputs()
        os.killpg(process.pid, number)
        assert status_of(process) not in (0, None)
        slow.unlink()
        assert (library.read_bytes() if library.exists() else None) == before
        build.compile_library(library)
        assert answer_of(library) == version
    assert list(library.parent.iterdir()) == [library]


def test_two_builds_at_once(
    write_source: Write, outputs: Outputs, tmp_path: Path, ninja: bool
) -> None:
    """The second waits; with ninja it finds nothing to do."""
    every, library = write_two_sources(write_source), tmp_path / "answer.so"
    processes = [start(library) for _ in range(2)]
    assert [status_of(process) for process in processes] == [0, 0]
    assert outputs() == (every if ninja else sorted(every * 2))
    assert answer_of(library) == 1


def test_error_leaves_the_earlier_library(
    write_source: Write, outputs: Outputs, tmp_path: Path
) -> None:
    write_two_sources(write_source)
    library = tmp_path / "answer.so"
    build.compile_library(library)
    before = library.read_bytes()
    outputs()
    write_source("#error", "cpu/other.cpp")
    with pytest.raises(RuntimeError, match="the compiler stopped with status 1"):
        build.compile_library(library)
    assert (outputs(), library.read_bytes()) == (["cpu-other.cpp.o"], before)
