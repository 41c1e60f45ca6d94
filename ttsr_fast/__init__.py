"""Exact, fast, memory-linear patch search for reference-based super-resolution."""

import os
import sys
from typing import TYPE_CHECKING

from ttsr_fast import _moved

__version__ = "0.1.0"

__all__ = [
    "TTSR",
    "Match",
    "ReferenceBank",
    "ReferenceMatch",
    "Result",
    "SearchTransfer",
    "certified",
    "gather_fold",
    "gather_fold_references",
    "load_model",
    "search",
    "search_references",
    "upscale",
]


_moved.install()
__getattr__ = _moved.attribute


def _is_program() -> bool:
    """True in `ttsr-fast`, and in `python -m` of a module in this package."""
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return program == "-m" or os.path.basename(program) in ("ttsr-fast", "ttsr-fast.exe")


if TYPE_CHECKING or not _is_program():  # its --help needs no PyTorch
    from ttsr_fast.certify import certified
    from ttsr_fast.functional import Match, gather_fold, search
    from ttsr_fast.model import TTSR, load_model
    from ttsr_fast.modules import SearchTransfer
    from ttsr_fast.references import ReferenceMatch, gather_fold_references, search_references
    from ttsr_fast.upscaling import Result, upscale
    from ttsr_fast.upscaling.bank import ReferenceBank
