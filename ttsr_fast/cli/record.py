"""Record of the sources of results, by which `--resume` keeps only results that are up to date."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ttsr_fast.files import NO_LINK, check_readable, named_errors, shown, write_bytes

NAME = ".ttsr-fast.jsonl"
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
_CHECKSUM = 16  # hexadecimal digits in front of a line
_STALE = 1000  # superseded lines, above which the file is written again
_CHANGED = {
    "image": "the image has changed",
    "references": "the references have changed",
    "weights": "the weights have changed",
}


class _Result(NamedTuple):
    """Digest of a file, and digests and options of its sources."""

    digest: str
    made_from: dict[str, str]


class Record:
    """Results in a folder: a hidden file with a line for each.

    A line is appended in one piece when its result is whole, and begins with its checksum. A line
    that a kill has torn is ignored, and its result is made again. Several processes may append.

    Args:
        folder: folder of the results, which exists.

    Raises:
        OSError: the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._results: dict[str, _Result] = {}
        lines = self._content().split(b"\n")
        for line in lines:
            self._read_line(line)
        self._torn = lines[-1] != b""
        if len(lines) > 2 * len(self._results) + _STALE:
            kept = [_line(name, result) for name, result in self._results.items()]
            write_bytes(self.path, b"".join(kept))
            self._torn = False

    def holds(self, path: Path) -> bool:
        """True for a file that equals a recorded result of this folder."""
        result = self._results.get(path.name)
        if path.parent.resolve() != self.path.parent.resolve():
            return False
        return result is not None and digest_of(path) == result.digest

    def why_again(self, path: Path, made_from: Mapping[str, str]) -> str | None:
        """Reason why the file at `path` is not the result of `made_from`; None if it is."""
        result = self._results.get(path.name)
        if result is None:
            return "there is no record of how it was made"
        for name, value in made_from.items():
            if result.made_from.get(name) != value:
                return _CHANGED.get(name, f"{name} was {result.made_from.get(name)}")
        return None if self.holds(path) else "the file has changed"

    def add(self, path: Path, made_from: Mapping[str, str]) -> None:
        """Add the line of a result that is on the disk.

        Raises:
            OSError: the record cannot be written.
        """
        result = self._results[path.name] = _Result(digest_of(path), dict(made_from))
        line = b"\n" * self._torn + _line(path.name, result)
        self._torn = True
        with named_errors("write", self.path):
            descriptor = os.open(self.path, _APPEND | NO_LINK, 0o666)
            with open(descriptor, "wb", buffering=0) as file:
                self._torn = file.write(line) != len(line)

    def check_writable(self) -> None:
        """Raise OSError if no line can be added."""
        with named_errors("write", self.path):
            os.close(os.open(self.path, _APPEND | NO_LINK, 0o666))

    def _content(self) -> bytes:
        if not os.path.lexists(self.path):
            return b""
        if not stat.S_ISREG(self.path.lstat().st_mode):
            raise OSError(f"cannot write {shown(self.path)}: it is no regular file")
        with named_errors("write", self.path):
            return self.path.read_bytes()

    def _read_line(self, line: bytes) -> None:
        checksum, content = line[:_CHECKSUM], line[_CHECKSUM + 1 :]
        if checksum != _checksum(content):
            return
        try:
            entry = json.loads(content)
            self._results[entry["name"]] = _Result(entry["result"], dict(entry["made_from"]))
        except (ValueError, KeyError, TypeError, RecursionError):  # of another version
            return


def digest_of(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    check_readable(path)
    hasher = hashlib.sha256()
    with named_errors("read", path), open(path, "rb") as file:
        while block := file.read(2**20):
            hasher.update(block)
    return hasher.hexdigest()


def _line(name: str, result: _Result) -> bytes:
    entry = {"name": name, "result": result.digest, "made_from": result.made_from}
    content = json.dumps(entry).encode()
    return _checksum(content) + b" " + content + b"\n"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[:_CHECKSUM].encode()
