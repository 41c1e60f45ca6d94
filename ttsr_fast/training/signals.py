"""Signals that end a training: after the current step, or at once before the first one."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def signal_handler(handler: _Handler, numbers: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Handle signals inside the block, and restore their former handlers after it.

    Outside the main thread, where Python sets no handlers, nothing changes.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in numbers if in_main_thread}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Interruption(ExitStack):
    """The first SIGTERM or SIGINT is recorded; a second one has its former effect.

    A context manager. Outside the main thread it does nothing.

    Attributes:
        signal: number of the signal received, or 0.
    """

    signal = 0

    def __enter__(self) -> "Interruption":
        self.enter_context(signal_handler(self._record))
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.close()


class Ended(BaseException):
    """A signal outside the training loop.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Ended` inside the block; `Interruption` takes precedence."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    with signal_handler(end):
        yield


@contextmanager
def signals_blocked() -> Iterator[None]:
    """SIGTERM and SIGINT wait until the end of the block, in this thread and in its forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_first_signals(worker: int) -> None:
    """Initialise a loader process: a signal to the process group is for the training alone.

    SIGTERM is ignored once only, so that a second one ends a stuck loader.

    Args:
        worker: its number, from `torch.utils.data.DataLoader`.
    """

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # forked inside `signals_blocked`
