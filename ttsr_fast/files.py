"""Files that appear whole or not at all, and errors with the names of files."""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":
    import fcntl

_UNFINISHED = ".ttsr.part"
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.ttsr\.part", re.DOTALL)
_cleaned: set[Path] = set()  # folders without leftovers of other processes
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_OLD = os.O_RDWR | getattr(os, "O_NONBLOCK", 0)  # NFS locks only what can be written
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which replaces `path` when all of it is on the disk.

    It is written under an unpredictable name in the same folder, which no other thread, process or
    machine uses, and follows no link. After an error the file is removed; after a kill the next
    process that writes in the folder removes it.

    Args:
        path: a file in a folder that exists. A link there is replaced, not followed. The mode of an
            existing file is kept; a write-protected file is not replaced.

    Raises:
        OSError: the file cannot be written, such as on a full disk. The message names `path` and
            the reason, and says if the previous file is still there.
    """
    path = Path(path)
    unfinished: Path | None = None
    try:
        _check_kind(path)
        _remove_leftovers(path.parent)
        unfinished, file = _create(path)
        with file:
            if path.is_file() and sys.platform != "win32":
                with suppress(OSError):  # a file system without modes
                    os.fchmod(file.fileno(), path.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":  # which renames no open file
                file.close()
            os.replace(unfinished, path)
            unfinished = None
    except (OSError, RuntimeError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        kept = "; the one before it is still there" if path.is_file() else ""
        raise _kind_of(error)(f"cannot write {shown(path)}: {reason}{kept}") from error
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file by `replacing`."""
    with replacing(path) as file:
        file.write(content)


def keep_as(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file a second name in its folder; the second file appears whole or not at all.

    `replacing` one of the names does not change the content of the other. On file systems with hard
    links they share the disk until then.

    Raises:
        OSError: the file cannot be read, or the second not be written.
    """
    path, target = Path(path), Path(target)
    with path.open("rb") as file:
        linked = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{_UNFINISHED}")
        _lock(file.fileno())  # so that the link is not taken for a leftover
        try:
            os.link(path, linked)
            os.replace(linked, target)
        except OSError:  # such as a file system without hard links
            with replacing(target) as copy:
                shutil.copyfileobj(file, copy)
        finally:
            linked.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if no file can be written at `path`."""
    path = Path(path)
    folder = shown(path.parent)
    try:
        _check_kind(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot write {shown(path)}: there is no folder {folder}")
        with suppress(FileNotFoundError):
            path.lstat()  # finds a name that is too long
        unfinished, file = _create(path)
        file.close()
        unfinished.unlink(missing_ok=True)  # others may take it for a leftover, once it is closed
    except OSError as error:
        if error.errno is None:  # one from above
            raise
        raise _kind_of(error)(
            f"cannot write {shown(path)}: no file can be made in {folder} ({refusal(error)})"
        ) from error


def _check_kind(path: Path) -> None:
    """Raise OSError for paths that must not be replaced: folders, devices, protected files."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {shown(path)}: it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {shown(path)}: it is no regular file")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"cannot write {shown(path)}: it is write-protected")


def check_readable(path: Path) -> None:
    """Raise OSError for all but regular files; a pipe would block."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot read {shown(path)}: it is a folder")
    if not path.exists():
        raise FileNotFoundError(f"cannot read {shown(path)}: no such file")
    if not path.is_file():
        raise OSError(f"cannot read {shown(path)}: it is no regular file")


def shown(name: str | os.PathLike[str]) -> str:
    r"""A name for messages, in one line, with `\x1b` for a character that is not printable.

    These are control characters, which a terminal executes, marks that change the direction of
    text, and bytes that are no UTF-8.
    """
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not decoded
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


@contextmanager
def named_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Give errors of the operating system the message "cannot `action` `path`" and the reason."""
    try:
        yield
    except OSError as error:
        raise type(error)(f"cannot {action} {shown(path)}: {refusal(error)}") from error


def refusal(error: BaseException | None) -> str | None:
    """Reason of the operating system, also behind an error of a library.

    None for an error that does not come from the operating system.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return "the disk is full" if full else os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return None


def _kind_of(error: BaseException) -> type[OSError]:
    """Type of an OSError, such as PermissionError; OSError for other errors."""
    return type(error) if isinstance(error, OSError) else OSError


def _create(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked as long as it is open."""
    while True:
        unfinished = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}{_UNFINISHED}")
        file = os.fdopen(os.open(unfinished, _NEW | NO_LINK, 0o666), "wb")
        _lock(file.fileno())
        if os.fstat(file.fileno()).st_nlink > 0:  # not taken for a leftover before it was locked
            return unfinished, file
        file.close()


def _remove_leftovers(folder: Path) -> None:
    """Remove unfinished files of killed processes, which no longer hold their lock.

    Once per folder: to list it for every file would take quadratic time.
    """
    folder = folder.resolve()
    if folder in _cleaned or sys.platform == "win32":  # no locks to tell them from others
        return
    _cleaned.add(folder)
    with suppress(OSError):
        for name in filter(_LEFTOVER.fullmatch, os.listdir(folder)):
            leftover = folder / name
            with suppress(OSError), open(os.open(leftover, _OLD | NO_LINK), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _lock(descriptor: int) -> None:
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks, where leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _prefix(path: Path) -> str:
    """Prefix of the names of its unfinished files, cut to a legal length."""
    encoded = os.fsencode(path.name)[:200]
    return f".{os.fsdecode(encoded)}."
