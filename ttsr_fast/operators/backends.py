"""Backend selection.

A backend is a module with a function for each operator that it has, which fills the results that
the operator allocates, and `why_not`, which both chooses and explains.
"""

import logging
import os
import platform
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ttsr_fast.choices import BACKENDS
from ttsr_fast.operators import build, cpp, library, oracle, pytorch, triton

ENVIRONMENT_VARIABLE = "TTSR_FAST_BACKEND"
MODULES = dict(zip(BACKENDS, (cpp, triton, pytorch, oracle), strict=True))  # best first

_logger = logging.getLogger(__name__)


def choose(op: str, x: Tensor, backend: str | None) -> Callable[..., None]:
    """The function of `op` for tensors like `x`: of `backend`, or of the first that can run.

    `"triton"` names a search; for the other operators it is as None.

    Raises:
        ValueError: `backend`, or the environment variable that stands in for it, is unknown.
        RuntimeError: that backend cannot run here; the reason is in the message.
    """
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend is not None and hasattr(MODULES[backend], op):
        can_run(backend, x.device, op, x.dtype, raise_error=True)
        return getattr(MODULES[backend], op)
    for name, module in MODULES.items():
        # Triton's interpreter runs for those who name it.
        wanted = hasattr(module, op) and (name != "triton" or x.device.type == "cuda")
        if wanted and why_not(name, x.device, op, x.dtype) is None:
            if name == "torch":
                _warn_of_missing_kernels(x.device, op, x.dtype)
            return getattr(module, op)
    raise AssertionError("PyTorch runs everywhere")


def can_run(
    backend: str,
    device: torch.device,
    op: str = "search",
    dtype: torch.dtype = torch.float32,
    *,
    raise_error: bool = False,
) -> bool:
    """True if `backend` runs `op` on `device`; with `raise_error` an error if not."""
    reason = why_not(backend, device, op, dtype)
    if reason is not None and raise_error:
        raise RuntimeError(f"backend {backend!r} cannot run {op} on {device}: {reason}")
    return reason is None


def why_not(
    backend: str,
    device: torch.device,
    op: str = "search",
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """The reason why `backend` cannot run `op` on `device` for tensors of `dtype`, or None."""
    return MODULES[backend].why_not(op, device, dtype)


def _warn_of_missing_kernels(device: torch.device, op: str, dtype: torch.dtype) -> None:
    """One warning for each reason why kernels that could run here are missing."""
    if device.type == "cpu" and platform.system() in build.SYSTEMS:
        reason = library.load_library()
        if reason is not None:
            _warn_once(
                f"ttsr-fast works without its kernels, several times slower: {reason} "
                f"({ENVIRONMENT_VARIABLE}=torch silences this)"
            )
    elif device.type == "cuda" and library.why_not_gpu(device) is None:
        if op == "search":
            reason = triton.why_not_triton() if dtype != torch.float64 else None
            if reason is not None:
                _warn_once(f"ttsr-fast searches without its kernels, slowly: {reason}")
        elif op != "score_excluding" and torch.version.cuda is not None:
            reason = library.load_cuda_library()
            if reason is not None:
                _warn_once(f"ttsr-fast transfers without its CUDA kernels: {reason}")


@cache
def _warn_once(message: str) -> None:
    _logger.warning("%s", message)
