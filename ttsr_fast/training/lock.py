"""Lock of a folder: one training at a time."""

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
    """Make and lock the folder of a training.

    The operating system releases the lock when the process ends, even if it is killed. A folder
    that stays empty is removed.

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
        if descriptor in _held:  # not in a forked process
            with suppress(OSError):
                (folder / LOCK).unlink()  # still locked, so it is not another training's
            _held.remove(descriptor)
            os.close(descriptor)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _locked(path: Path) -> int:
    """Descriptor of the file, locked until it is closed."""
    while True:
        with named_errors("write", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
        try:
            if sys.platform != "win32":  # without a lock there
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
        if os.fstat(descriptor).st_nlink > 0:  # its holder has not removed it before the lock
            break
        os.close(descriptor)
    with suppress(OSError):  # for the message above only
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(descriptor)
    return descriptor


def _release_in_child() -> None:
    """A loader process may outlive a killed training, and must not hold its lock."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_release_in_child)
