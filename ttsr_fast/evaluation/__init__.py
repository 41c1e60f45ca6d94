"""Methods compared on a data set: PSNR, SSIM, a table, comparison images."""

from ttsr_fast.evaluation.runner import evaluate

__all__ = ["evaluate"]
