"""A file appears whole or not at all, whoever else writes there, and errors name it."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from ttsr_fast import files
from ttsr_fast.files import check_writable, keep_as, refusal, replacing, shown, write_bytes

each = pytest.mark.parametrize


def test_replaces_when_complete_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"first")
    with replacing(path) as file:
        file.write(b"second")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_the_file_before_hands_on_its_mode_and_its_protection(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"private")
    path.chmod(0o600)
    write_bytes(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    access = os.access
    monkeypatch.setattr(os, "access", lambda file, mode: mode != os.W_OK and access(file, mode))
    for write in (check_writable, lambda file: write_bytes(file, b"newer")):
        with pytest.raises(PermissionError, match=f"cannot write {path}: it is write-protected"):
            write(path)
    assert path.read_bytes() == b"new"


@each("error", [KeyboardInterrupt(), ValueError("x"), OSError(errno.ENOSPC, "")])
def test_an_error_keeps_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]
    if isinstance(error, OSError):
        expected = f"cannot write {path}: the disk is full; the one before it is still there"
        assert str(caught.value) == expected


def test_cause_is_found_behind_a_library() -> None:
    """torch.save reports a full disk as a RuntimeError of its own."""
    error = RuntimeError("unexpected pos 64")
    error.__context__ = OSError(errno.EDQUOT, "")
    assert refusal(error) == "the disk is full"
    assert refusal(RuntimeError("x")) is None


def test_follows_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "a").symlink_to(victim)
    write_bytes(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_leftover_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    program = f"""
import sys
from ttsr_fast import files
from ttsr_fast.files import replacing
with replacing({str(path)!r}), replacing({str(other)!r}):
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        write_bytes(path, b"1")
        assert len(os.listdir(tmp_path)) == 3  # a and both unfinished files
        child.send_signal(signal.SIGKILL)
    monkeypatch.setattr(files, "_cleaned", set())  # as in the next process
    write_bytes(path, b"2")
    assert os.listdir(tmp_path) == ["a"]


def test_threads_and_readers_see_whole_files(tmp_path: Path) -> None:
    path, stop, torn, errors = tmp_path / "a", threading.Event(), [], []

    def write(number: int) -> None:
        try:
            for _ in range(60):
                write_bytes(path, bytes([number]) * (1000 + number))
        except OSError as error:
            errors.append(error)

    def read() -> None:
        while not stop.is_set():
            content = path.read_bytes() if path.exists() else b""
            if content != content[:1] * (1000 + content[0] if content else 0):
                torn.append(content)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert (torn, errors) == ([], [])
    assert os.listdir(tmp_path) == ["a"]


def test_longest_name(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 127)  # 254 bytes
    write_bytes(path, b"x")
    assert os.listdir(tmp_path) == [path.name]


def test_a_name_that_is_too_long_is_found_beforehand(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^cannot write .*/a+: no file can be made in .* name too"):
        check_writable(tmp_path / ("a" * 256))


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    for write in (check_writable, lambda path: write_bytes(path, b"")):
        with pytest.raises(OSError, match=r"^cannot write .*/a: it is no regular file$"):
            write(tmp_path / "a")
    assert (tmp_path / "a").is_fifo()
    assert os.listdir(tmp_path) == ["a"]


def test_a_check_may_meet_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one takes the closed file of the check for a leftover."""
    create = files._create

    def create_and_lose(path: Path) -> tuple[Path, BinaryIO]:
        unfinished, file = create(path)
        unfinished.unlink()
        return unfinished, file

    monkeypatch.setattr(files, "_create", create_and_lose)
    check_writable(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@each(
    ("name", "expected"),
    [
        ("caf\xe9 \U0001f600 \u5199\u771f.png", "caf\xe9 \U0001f600 \u5199\u771f.png"),
        (Path("a\nb\t\x1b[2J\x7f\x9b"), r"a\nb\t\x1b[2J\x7f\x9b"),
        ("\u202egnp.\u2066", r"\u202egnp.\u2066"),
        (os.fsdecode(b"\xff\x80"), r"\xff\x80"),
        ("\ud800\u2028", r"\ud800\u2028"),
    ],
)
def test_names_are_shown_in_one_harmless_line(name: str | Path, expected: str) -> None:
    assert shown(name) == expected
    assert shown(expected) == expected
    with pytest.raises(FileNotFoundError) as caught:
        check_writable(Path("no") / name)
    assert str(caught.value) == f"cannot write no/{expected}: there is no folder no"


def test_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cannot write .*no/a: No such file"):
        write_bytes(tmp_path / "no" / "a", b"")
    with pytest.raises(FileNotFoundError, match="cannot write .*no/a: there is no folder .*no"):
        check_writable(tmp_path / "no" / "a")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "a")
    assert os.listdir(tmp_path) == []


@each("links", [True, False])
def test_a_file_stays_under_a_second_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    first, second = tmp_path / "a", tmp_path / "b"
    write_bytes(first, b"content")
    second.write_bytes(b"older")
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    keep_as(first, second)
    assert second.read_bytes() == b"content"
    assert first.samefile(second) is links
    keep_as(first, second)  # again
    write_bytes(first, b"newer")
    assert second.read_bytes() == b"content"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        keep_as(tmp_path / "none", second)
    assert second.read_bytes() == b"content"
