"""Signals before a command begins and while it imports modules.

An import may lose an exception that a signal raises, so these end the process directly.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

at_start = ExitStack()  # closed when a command begins


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

    untouched = (signal.SIG_IGN, None)  # None: not set by Python
    handled = [number for number in numbers if signal.getsignal(number) not in untouched]
    before = {number: signal.signal(number, end) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
