"""Options of an upscaling that do not change its formula."""

from collections.abc import Callable
from typing import NamedTuple

import torch

# Called with a stage, the number of its steps that are done, and of all.
Progress = Callable[[str, int, int], None]


class Execution(NamedTuple):
    """Search, convolutions and progress of a method.

    Attributes:
        precision: of the search; None for the default, or the model's own.
        backend: of search and transfer; None as for `precision`.
        amp: type of the model's convolutions; None for its own.
        progress: callback for every step of a stage.
    """

    precision: str | None = None
    backend: str | None = None
    amp: torch.dtype | None = None
    progress: Progress | None = None
