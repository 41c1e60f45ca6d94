"""Exact, fast, memory-linear patch search for reference-based super-resolution."""

from ttsr_fast.bank import ReferenceBank
from ttsr_fast.certify import certified
from ttsr_fast.functional import Match, gather_fold, search
from ttsr_fast.model import TTSR, load_model
from ttsr_fast.modules import SearchTransfer
from ttsr_fast.references import ReferenceMatch, gather_fold_references, search_references
from ttsr_fast.upscale import Result, upscale

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
