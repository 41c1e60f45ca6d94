"""`upscale` and its parts: methods, memory plan, reference cache."""

from ttsr_fast.upscaling.pipeline import Result, upscale

__all__ = ["Result", "upscale"]
