"""Backend `"triton"`: the search on CUDA and ROCm, and in Triton's interpreter."""

import importlib
import re
from functools import cache

import torch
from torch import Tensor

from ttsr_fast.operators import library
from ttsr_fast.operators.patch import Patch, Score

OLDEST_TRITON = (3, 6)


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # [N, Ho, Wo] twice, filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    """`kernels.search`, imported when it is first needed."""
    if query.is_cuda:
        library.load_cuda_library()  # one of the search's kernels is in CUDA, where that is at hand
    kernels = importlib.import_module("ttsr_fast.kernels.search")
    kernels.search(query, key, key_mask, match, patch, scoring, precision)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why this backend cannot run, or None."""
    if dtype == torch.float64:
        return "its kernels are for float32, float16 and bfloat16"
    return _why_not_on(device)


@cache
def why_not_triton() -> str | None:
    """The reason why Triton itself cannot be used, or None."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton>=3.6 or use backend='torch'"
    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST_TRITON:
        return f"it needs Triton 3.6 or newer, this is {triton.__version__}"
    return None


@cache
def _why_not_on(device: torch.device) -> str | None:
    reason = why_not_triton()
    if reason is not None:
        return reason
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "its kernels are for CUDA and ROCm; TRITON_INTERPRET=1 interprets them on the CPU"
    return library.why_not_gpu(device)
