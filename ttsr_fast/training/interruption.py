"""Signals that ask a training to end: it finishes its step first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Remembers SIGTERM and SIGINT instead of ending the program; a second one ends it.

    A context manager. Outside the main thread, where Python sets no handlers, it does nothing.

    Attributes:
        signal: the number of the signal that has come, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Ended(BaseException):
    """A signal has come where nothing waits for the end of a step.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGINT raise `Ended` meanwhile, in the main thread; `Interruption` goes before.

    Outside the main thread, where Python sets no handlers, they do what they did.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait meanwhile: in this thread, and in a process that is forked in it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_first_signals(worker: int) -> None:
    """For a process that loads data: a signal to the whole group is the training's to answer.

    SIGTERM is ignored once only, so that a loader that is stuck can be ended.

    Args:
        worker: its number, as `torch.utils.data.DataLoader` tells it.
    """

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which may have been held back until now
