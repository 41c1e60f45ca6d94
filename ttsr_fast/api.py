"""The public names, each from its module."""

from ttsr_fast.bank import ReferenceBank as ReferenceBank
from ttsr_fast.certify import certified as certified
from ttsr_fast.functional import Match as Match
from ttsr_fast.functional import gather_fold as gather_fold
from ttsr_fast.functional import search as search
from ttsr_fast.model import TTSR as TTSR
from ttsr_fast.model import load_model as load_model
from ttsr_fast.modules import SearchTransfer as SearchTransfer
from ttsr_fast.references import ReferenceMatch as ReferenceMatch
from ttsr_fast.references import gather_fold_references as gather_fold_references
from ttsr_fast.references import search_references as search_references
from ttsr_fast.upscaling import Result as Result
from ttsr_fast.upscaling import upscale as upscale
