"""Exact, fast, memory-linear patch search for reference-based super-resolution."""

from ttsr_fast.certify import certified
from ttsr_fast.functional import Match, gather_fold, search
from ttsr_fast.model import TTSR, load_model
from ttsr_fast.modules import SearchTransfer
from ttsr_fast.upscale import Result, upscale

__version__ = "0.1.0"

__all__ = [
    "TTSR",
    "Match",
    "Result",
    "SearchTransfer",
    "certified",
    "gather_fold",
    "load_model",
    "search",
    "upscale",
]
