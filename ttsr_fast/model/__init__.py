"""TTSR: the texture extractor, the main network, the whole model and its checkpoints."""

from ttsr_fast.model.checkpoint import convert_checkpoint, load_model, save_model
from ttsr_fast.model.lte import LTE
from ttsr_fast.model.main_net import MainNet
from ttsr_fast.model.ttsr import TTSR

__all__ = ["LTE", "TTSR", "MainNet", "convert_checkpoint", "load_model", "save_model"]
