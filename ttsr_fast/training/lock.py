"""One training for each folder."""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ttsr_fast.files import NO_LINK, named_errors, refusal, shown

if sys.platform != "win32":
    import fcntl

LOCK = "training.lock"
_held: set[int] = set()  # descriptors
_logger = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other trainings out of it meanwhile.

    The kernel releases the lock when the process ends, however it ends. A folder that is still
    empty in the end is removed.

    Raises:
        RuntimeError: another training is running there.
        OSError: the folder cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with named_errors("make the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    descriptor = -1
    try:
        descriptor = _locked(folder / LOCK)
        yield
    finally:
        if descriptor in _held:  # and not in a process that was forked
            with suppress(OSError):
                (folder / LOCK).unlink()  # before it is free, so that nobody else's is removed
            _held.remove(descriptor)
            os.close(descriptor)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _locked(path: Path) -> int:
    """A descriptor of the file, which is locked as long as that is open."""
    while True:
        with named_errors("write", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            if sys.platform != "win32":  # where nothing keeps a second training out
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise RuntimeError(
                f"another training is running in {shown(path.parent)} ({shown(holder)}): wait for "
                "its end, or choose another folder"
            ) from None
        except OSError as error:
            _logger.warning(
                "%s cannot be locked (%s): make sure that no other training runs in its folder",
                shown(path),
                refusal(error),
            )
        if os.fstat(descriptor).st_nlink > 0:  # not removed by its holder before it was locked
            break
        os.close(descriptor)
    with suppress(OSError):  # the text is for people
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(descriptor)
    return descriptor


def _release_in_child() -> None:
    """A process that loads data may outlive a training that is killed, and must not lock it."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)
