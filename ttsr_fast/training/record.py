"""What a training tells TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

_INERTIA = 0.9  # of the average speed, for each step


class Record:
    """Scalars and pictures by step, as a context manager.

    Args:
        folder: for the files; None for a process that writes none.
        step: the step it begins after. What a run that was killed has recorded of later ones is not
            shown any more.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            self._writer = _summary_writer()(folder, purge_step=step + 1)
        self._before: float | None = None
        self._seconds: float | None = None

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values as `group/name`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(
        self,
        name: str,
        pixels: np.ndarray,  # [H, W, 3] uint8
        step: int,
    ) -> None:
        """Write a picture."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def speed(self, images: int) -> float:
        """Images per second, where so many have been worked through since the last call.

        An average of the last steps; 0 at the first call, which has nothing to go by.
        """
        now = time.perf_counter()
        if self._before is not None:
            seconds = now - self._before
            mean = seconds if self._seconds is None else self._seconds
            self._seconds = _INERTIA * mean + (1 - _INERTIA) * seconds
        self._before = now
        return 0.0 if not self._seconds else images / self._seconds


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "a training's record needs tensorboard: pip install 'ttsr-fast[train]'"
        ) from error
    return SummaryWriter
