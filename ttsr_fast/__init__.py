"""Exact, fast, memory-linear patch search for reference-based super-resolution.

Where PyTorch is loaded already, the import loads everything and registers the operators. Elsewhere
the first use of a public name does, so that `ttsr-fast --help` answers without PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING or "torch" in sys.modules:
    from ttsr_fast.api import (
        TTSR,
        Match,
        ReferenceBank,
        ReferenceMatch,
        Result,
        SearchTransfer,
        certified,
        gather_fold,
        gather_fold_references,
        load_model,
        search,
        search_references,
        upscale,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module("ttsr_fast.api"), name)
        return value

    def __dir__() -> list[str]:
        return [*globals(), *__all__]
