"""Signals while nothing has been done yet: an exception in an import is sometimes lost there."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def exit_at_signals(line: Callable[[str], str], *numbers: int) -> Iterator[None]:
    """End the process at a signal, with a line on stderr and 128 + its number as exit code.

    A signal that is ignored stays so. Outside the main thread, where Python sets no handlers,
    nothing changes.

    Args:
        line: makes the line of the signal's name.
        numbers: the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{line(signal.Signals(number).name)}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)

    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def default_signals() -> None:
    """Handle SIGINT and SIGTERM as Python does at its start, unless they are ignored."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
