"""Signals before a command begins and while it imports modules.

An import may lose an exception raised by a signal handler, so these signals end the process.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

from ttsr_fast.training.signals import signal_handler

at_start = ExitStack()  # closed when a command begins


@contextmanager
def exit_at_signals(line: Callable[[str], str], *numbers: int) -> Iterator[None]:
    """End the process at a signal, with a line on stderr and 128 + its number as exit code.

    An ignored signal stays ignored. Outside the main thread nothing changes.

    Args:
        line: makes the line from the signal's name.
        numbers: the signals.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{line(signal.Signals(number).name)}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)

    untouched = (signal.SIG_IGN, None)  # None: not set by Python
    handled = [number for number in numbers if signal.getsignal(number) not in untouched]
    with signal_handler(end, handled):
        yield
