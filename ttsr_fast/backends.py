"""What can run here and why not, and the choice among it.

The only file that loads the compiled library and imports the Triton kernels, when they are first
asked for. `can_run` both chooses and explains.
"""

import importlib
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import build, portable, reference

BACKENDS = ("cpp", "triton", "torch", "reference")  # in order of preference
OLDEST_TRITON = (3, 6)
ENVIRONMENT_VARIABLE = "TTSR_FAST_BACKEND"


def choose(op: str, x: Tensor, backend: str | None) -> Callable[..., None]:
    """The implementation of `op` for tensors like `x`: of `backend`, or of the first that can run.

    Raises:
        ValueError: `backend`, or the environment variable that stands in for it, is unknown.
        RuntimeError: that backend cannot run here; the reason is in the message.
    """
    # Of types only the Triton search is choosy: the other operators are PyTorch's there.
    dtype = x.dtype if op == "search" else torch.float32
    if backend is None:
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if backend is None:
        # The interpreter of Triton is for those who ask for it by name.
        names = [name for name in BACKENDS if name != "triton" or x.device.type == "cuda"]
        backend = next(name for name in names if can_run(name, x.device, dtype))
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    can_run(backend, x.device, dtype, raise_error=True)
    return _IMPLEMENTATIONS[backend][op]


def can_run(
    backend: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    raise_error: bool = False,
) -> bool:
    """Whether `backend` runs on `device`; with `raise_error`, a RuntimeError that says why not."""
    reason = why_not(backend, device, dtype)
    if reason is not None and raise_error:
        raise RuntimeError(f"backend {backend!r} cannot run on {device}: {reason}")
    return reason is None


def why_not(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run on `device` for tensors of `dtype`, None if it can."""
    if backend == "cpp":
        return "the compiled kernels are for the CPU" if device.type != "cpu" else load_library()
    if backend == "triton":
        if dtype == torch.float64:
            return "its kernels are for float32, float16 and bfloat16"
        return _why_not_triton(device)
    return None


@cache
def _why_not_triton(device: torch.device) -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton>=3.6 or use backend='torch'"
    version = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST_TRITON:
        return f"it needs Triton 3.6 or newer, this is {triton.__version__}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return "its kernels are for CUDA and ROCm; TRITON_INTERPRET=1 interprets them on the CPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, this device has {capability}"
    return None


@cache
def load_library() -> str | None:
    """Load the compiled kernels once; the reason if that is not possible."""
    library = _library()
    if library is None:
        return (
            "the compiled library is not part of this installation; install ttsr-fast with a C++ "
            "compiler at hand and TTSR_FAST_BUILD=cpu, or run `ttsr-fast env --build`"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        reason = error.__cause__ or error
        return f"{library.name} does not load under torch {torch.__version__}: {reason}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not all(has_kernel(f"ttsr_fast::cpp_{op}", "CPU") for op in _IMPLEMENTATIONS["cpp"]):
        return f"{library} was compiled from other sources; compile it again"
    return None


def instruction_set() -> str:
    """What the compiled kernels use of this processor, or what TTSR_FAST_ISA asks for of it."""
    return torch.ops.ttsr_fast.cpp_isa()


def _library() -> Path | None:
    """What TTSR_FAST_LIBRARY names, the library installed, or the one that was built afterwards."""
    named = os.environ.get("TTSR_FAST_LIBRARY")
    if named:
        return Path(named)
    installed = Path(__file__).parent / build.LIBRARY
    return installed if installed.is_file() else build.cached_library()


def _triton_search(*arguments):
    importlib.import_module("ttsr_fast.kernels.search").search(*arguments)


def _reference_search(query, key, key_mask, score, index, kernel_size, padding, normalize, eps, _):
    # In higher precision; an infinity counts as NaN, with any normalisation.
    q, k = (torch.where(x.isfinite(), x.double(), torch.nan) for x in (query, key))
    result = reference.search(
        q, k, key_mask, kernel_size=kernel_size, padding=padding, normalize=normalize, eps=eps
    )
    score.copy_(result[0])
    index.copy_(result[1])


def _reference_gather_fold(value, index, weight, out, *options):
    value = value.to(portable.work_dtype(value.dtype))
    out.copy_(reference.gather_fold(value, index, weight, **_named(options)))


def _reference_adjoint(grad, index, weight, out, *options):
    grad, size = grad.to(portable.work_dtype(grad.dtype)), list(out.shape)
    out.copy_(reference.gather_fold_adjoint(grad, index, weight, size, **_named(options)))


def _reference_dot(value, grad, index, out, *options):
    value, grad = value.to(out.dtype), grad.to(out.dtype)
    out.copy_(reference.gather_dot(value, grad, index, **_named(options)))


def _named(options: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("stride", "kernel_size", "padding", "divisor"), options, strict=True))


def _cpp_search(
    query, key, key_mask, score, index, kernel_size, padding, normalize, eps, precision
):
    torch.ops.ttsr_fast.cpp_search(
        query,
        key,
        key_mask,
        score,
        index,
        kernel_size,
        padding,
        normalize == "both",
        normalize != "none",
        eps,
        precision == "bf16",
    )
    if precision == "bf16" and query.dtype != torch.bfloat16:
        _rescore(query, key, score, index, kernel_size, padding, normalize, eps)


def _rescore(query, key, score, index, kernel_size, padding, normalize, eps):
    """The score of the chosen pairs from the features as given, not as rounded for the choice."""
    patch = (kernel_size, padding)
    exact = torch.empty_like(score)
    _cpp_dot(key, query, index, exact, 1, *patch, "none")
    if normalize in ("both", "key"):
        norm, chosen = portable.patch_norm(key, *patch), torch.empty_like(score.unsqueeze(1))
        _cpp_gather_fold(norm.clamp_(min=eps), index, None, chosen, 1, 1, 0, "none")
        exact /= chosen[:, 0]
    if normalize == "both":
        exact /= portable.patch_norm(query, *patch)[:, 0].clamp(min=eps)
    score.copy_(torch.where(score.isnan(), score, exact))


def _cpp_gather_fold(value, index, weight, out, stride, kernel_size, padding, divisor):
    torch.ops.ttsr_fast.cpp_gather_fold(
        _laid_out_like(out, _whole_blocks(value, stride)),
        index.contiguous(),
        weight,
        out,
        stride,
        kernel_size,
        padding,
        *_key_grid(value, stride, kernel_size, padding),
        divisor,
    )


def _cpp_adjoint(grad, index, weight, out, stride, kernel_size, padding, divisor):
    padded = _whole_blocks(out, stride)
    torch.ops.ttsr_fast.cpp_gather_fold_adjoint(
        _laid_out_like(out, grad),
        index.contiguous(),
        weight,
        padded,
        stride,
        kernel_size,
        padding,
        *_key_grid(out, stride, kernel_size, padding),
        divisor,
    )
    if padded is not out:
        out.copy_(padded[:, :, : out.shape[2], : out.shape[3]])


def _cpp_dot(value, grad, index, out, stride, kernel_size, padding, divisor):
    torch.ops.ttsr_fast.cpp_gather_dot(
        _whole_blocks(value, stride),
        grad,
        index.contiguous(),
        out,
        stride,
        kernel_size,
        padding,
        *_key_grid(value, stride, kernel_size, padding),
        divisor,
    )


def _key_grid(value: Tensor, stride: int, kernel_size: int, padding: int) -> list[int]:
    return [size // stride + 2 * padding - kernel_size + 1 for size in value.shape[2:]]


def _whole_blocks(x: Tensor, stride: int) -> Tensor:
    """`x`, or a zero-padded copy if its last blocks are not whole."""
    missing = [-size % stride for size in x.shape[2:]]
    return F.pad(x, [0, missing[1], 0, missing[0]]) if any(missing) else x


def _laid_out_like(out: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory format of `out`; rows, images and channels may lie anywhere.

    To be called last: padding may change the layout.
    """
    if out.is_contiguous():
        return x if x.stride(3) == 1 else x.contiguous()
    return x.contiguous(memory_format=torch.channels_last)


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., None]]] = {
    "cpp": {
        "search": _cpp_search,
        "gather_fold": _cpp_gather_fold,
        "gather_fold_adjoint": _cpp_adjoint,
        "gather_dot": _cpp_dot,
    },
    "triton": {  # the search; the rest as "torch" does it
        "search": _triton_search,
        "gather_fold": portable.gather_fold,
        "gather_fold_adjoint": portable.gather_fold_adjoint,
        "gather_dot": portable.gather_dot,
    },
    "torch": {
        "search": portable.search,
        "gather_fold": portable.gather_fold,
        "gather_fold_adjoint": portable.gather_fold_adjoint,
        "gather_dot": portable.gather_dot,
    },
    "reference": {
        "search": _reference_search,
        "gather_fold": _reference_gather_fold,
        "gather_fold_adjoint": _reference_adjoint,
        "gather_dot": _reference_dot,
    },
}
