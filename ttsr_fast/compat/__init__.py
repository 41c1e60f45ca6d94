"""Drop-ins for the patch search of other reference-based super-resolution code.

One file per neighbour, with its own names, arguments and results; each docstring shows the lines to
change there. Memory is linear in the inputs.
"""

from ttsr_fast.compat import masa
from ttsr_fast.compat.c2_matching import feature_match_index
from ttsr_fast.compat.mmagic import SearchTransformer

__all__ = ["SearchTransformer", "feature_match_index", "masa"]
