"""`upscale`, and what it consists of: methods, memory plan, reference cache."""

from ttsr_fast.upscaling.pipeline import Result, upscale

__all__ = ["Result", "upscale"]
