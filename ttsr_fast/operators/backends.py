"""What can run here and why not, and the choice among it.

The only file that loads the compiled library and imports the Triton kernels, when they are first
asked for. `can_run` both chooses and explains.
"""

import importlib
import logging
import os
import platform
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttsr_fast import reference
from ttsr_fast.choices import BACKENDS
from ttsr_fast.operators import build, cpp, pytorch
from ttsr_fast.operators.choosers import Choosers

OLDEST_TRITON = (3, 6)
OLDEST_GPU = (8, 0)
ENVIRONMENT_VARIABLE = "TTSR_FAST_BACKEND"

_logger = logging.getLogger(__name__)


def choose(op: str, x: Tensor, backend: str | None) -> Callable[..., None]:
    """The implementation of `op` for tensors like `x`: of `backend`, or of the first that can run.

    `"triton"` names a search; for the other operators it is as None.

    Raises:
        ValueError: `backend`, or the environment variable that stands in for it, is unknown.
        RuntimeError: that backend cannot run here; the reason is in the message.
    """
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    if backend is None or op not in _IMPLEMENTATIONS[backend]:
        # The interpreter of Triton is for those who ask for it by name.
        names = [
            name
            for name, operators in _IMPLEMENTATIONS.items()
            if op in operators and (name != "triton" or x.device.type == "cuda")
        ]
        backend = next(name for name in names if can_run(name, x.device, op, x.dtype))
        if backend == "torch":
            _warn_of_missing_kernels(x.device, op, x.dtype)
    can_run(backend, x.device, op, x.dtype, raise_error=True)
    return _IMPLEMENTATIONS[backend][op]


def can_run(
    backend: str,
    device: torch.device,
    op: str = "search",
    dtype: torch.dtype = torch.float32,
    *,
    raise_error: bool = False,
) -> bool:
    """Whether `backend` runs `op` on `device`; with `raise_error`, an error that says why not."""
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
    """Why `backend` cannot run `op` on `device` for tensors of `dtype`, None if it can."""
    if backend == "cpp":
        if device.type == "cpu":
            return load_library()
        if device.type != "cuda":
            return "the compiled kernels are for the CPU and for CUDA"
        if op == "search":
            return "the compiled search is for the CPU; backend='triton' searches on a GPU"
        return load_cuda_library() or _why_not_gpu(device)
    if backend == "triton":
        if dtype == torch.float64:
            return "its kernels are for float32, float16 and bfloat16"
        return _why_not_triton(device)
    return None


def _warn_of_missing_kernels(device: torch.device, op: str, dtype: torch.dtype) -> None:
    """Warn, once for each reason, where kernels could run that are not installed."""
    if device.type == "cpu" and platform.system() in build.SYSTEMS:
        reason = load_library()
        if reason is not None:
            _warn_once(
                f"ttsr-fast works without its kernels, several times slower: {reason} "
                f"({ENVIRONMENT_VARIABLE}=torch silences this)"
            )
    elif device.type == "cuda" and _why_not_gpu(device) is None:
        if op == "search":
            reason = _why_no_triton() if dtype != torch.float64 else None
            if reason is not None:
                _warn_once(f"ttsr-fast searches without its kernels, slowly: {reason}")
        elif torch.version.cuda is not None:
            reason = load_cuda_library()
            if reason is not None:
                _warn_once(f"ttsr-fast transfers without its CUDA kernels: {reason}")


@cache
def _warn_once(message: str) -> None:
    _logger.warning("%s", message)


@cache
def _why_no_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton>=3.6 or use backend='torch'"
    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST_TRITON:
        return f"it needs Triton 3.6 or newer, this is {triton.__version__}"
    return None


@cache
def _why_not_triton(device: torch.device) -> str | None:
    reason = _why_no_triton()
    if reason is not None:
        return reason
    if importlib.import_module("triton").knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "its kernels are for CUDA and ROCm; TRITON_INTERPRET=1 interprets them on the CPU"
    return _why_not_gpu(device)


@cache
def _why_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"it needs compute capability 8.0 or newer, this device has {capability}"
    return None


@cache
def load_library() -> str | None:
    """Load the kernels for the CPU once; the reason if that is not possible."""
    reason = build.why_not_under(torch.__version__)
    if reason is not None:
        return reason
    library = _library()
    if library is None:
        return f"the compiled library is not part of this installation; {build.remedy()}"
    return _load(library, ("search", "gather_fold", "gather_fold_adjoint", "gather_dot"), "CPU")


@cache
def load_cuda_library() -> str | None:
    """Load the CUDA kernels once; the reason if that is not possible."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    reason = build.why_not_under(torch.__version__)
    if reason is not None:
        return reason
    library = _library(cuda=True)
    if library is None:
        return f"the CUDA library is not part of this installation; {build.remedy(cuda=True)}"
    operators = ("gather_fold", "gather_fold_adjoint", "gather_dot", "slab_search")
    reason = _load(library, operators, "CUDA")
    theirs = torch.version.cuda
    if reason is None and cuda_library_version().split(".")[0] != theirs.split(".")[0]:
        reason = (
            f"{library.name} was compiled with CUDA {cuda_library_version()}, torch with {theirs}; "
            f"with nvcc {theirs.split('.')[0]} {build.remedy(cuda=True)}"
        )
    return reason


def cuda_library_version() -> str:
    """The version of CUDA that the library was compiled with."""
    version = torch.ops.ttsr_fast.cuda_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def _load(library: Path, operators: tuple[str, ...], key: str) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = error.__cause__ or error
        return f"{library.name} does not load under torch {torch.__version__}: {reason}"
    prefix = "ttsr_fast::cpp_" if key == "CPU" else "ttsr_fast::cuda_"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not all(has_kernel(prefix + op, key) for op in operators):
        return f"{library} was compiled from other sources; {build.remedy()}"
    return None


def instruction_set() -> str:
    """What the compiled kernels use of this processor, or what TTSR_FAST_ISA asks for of it."""
    return torch.ops.ttsr_fast.cpp_isa()


def _library(*, cuda: bool = False) -> Path | None:
    """What the environment names, what was built afterwards, or the library installed."""
    named = os.environ.get("TTSR_FAST_CUDA_LIBRARY" if cuda else "TTSR_FAST_LIBRARY")
    if named:
        return Path(named)
    installed = Path(__file__).parent.parent / (build.CUDA_LIBRARY if cuda else build.LIBRARY)
    return build.cached_library(cuda=cuda) or (installed if installed.is_file() else None)


def _triton_search(query, *arguments):
    if query.is_cuda:
        load_cuda_library()  # of which the search uses a kernel, where there is one
    importlib.import_module("ttsr_fast.kernels.search").search(query, *arguments)


def _reference_search(query, key, key_mask, score, index, *options):
    # In higher precision; an infinity counts as NaN, with any normalisation.
    q, k = (torch.where(x.isfinite(), x.double(), torch.nan) for x in (query, key))
    names = ("kernel_size", "padding", "normalize", "eps", "add_eps")
    result = reference.search(q, k, key_mask, **dict(zip(names, options[:-1], strict=True)))
    score.copy_(result[0])
    index.copy_(result[1])


def _reference_gather_fold(value, index, weight, out, *options):
    value = value.to(pytorch.work_dtype(value.dtype))
    out.copy_(reference.gather_fold(value, index, weight, **_named(options)))


def _reference_adjoint(grad, index, weight, out, *options):
    grad, size = grad.to(pytorch.work_dtype(grad.dtype)), list(out.shape)
    out.copy_(reference.gather_fold_adjoint(grad, index, weight, size, **_named(options)))


def _reference_dot(value, grad, index, out, *options):
    value, grad = value.to(out.dtype), grad.to(out.dtype)
    out.copy_(reference.gather_dot(value, grad, index, **_named(options)))


def _named(options: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("stride", "kernel_size", "padding", "divisor"), options, strict=True))


def _per_level(function: Callable[..., None]) -> Callable[..., None]:
    """`function` of one level, for lists of them."""

    def run(xs, index, weight, outs, strides, *options):
        index = index.index if isinstance(index, Choosers) else index
        for x, out, stride in zip(xs, outs, strides, strict=True):
            function(x, index, weight, out, stride, *options)

    return run


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., None]]] = {
    "cpp": {
        "search": cpp.search,
        "gather_fold": cpp.gather_fold,
        "gather_fold_adjoint": cpp.gather_fold_adjoint,
        "gather_dot": cpp.gather_dot,
    },
    "triton": {"search": _triton_search},
    "torch": {
        "search": pytorch.search,
        "gather_fold": _per_level(pytorch.gather_fold),
        "gather_fold_adjoint": _per_level(pytorch.gather_fold_adjoint),
        "gather_dot": pytorch.gather_dot,
    },
    "reference": {
        "search": _reference_search,
        "gather_fold": _per_level(_reference_gather_fold),
        "gather_fold_adjoint": _per_level(_reference_adjoint),
        "gather_dot": _reference_dot,
    },
}
