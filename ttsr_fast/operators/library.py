"""The compiled libraries for the CPU and for CUDA: schemas, place, loading."""

import os
from functools import cache
from pathlib import Path

import torch

from ttsr_fast.operators import build
from ttsr_fast.operators.patch import PATCH
from ttsr_fast.operators.registry import LIBRARY

OLDEST_GPU = (8, 0)  # of the kernels in Triton and in CUDA

_GRID = "int key_height, int key_width, str divisor"
_SLAB = (
    "Tensor query_rows, Tensor key_rows, Tensor scale, Tensor(a!) best, Tensor(b!) ring, "
    "int key_images, int depth, int batch, int batch_stride, int[] query_layout, int[] key_layout, "
    "int keys_per_thread, int rows_per_warp"
)
# The operators with their results to fill; `csrc` implements them.
for _schema in (
    "cpp_isa() -> str",
    "cpp_bfloat16_products(Tensor query, Tensor key, bool bfloat16) -> int",
    "cpp_search(Tensor query, Tensor key, Tensor? key_mask, Tensor(a!) score, Tensor(b!) index, "
    f"{PATCH}, bool normalize_query, bool normalize_key, float eps, bool add_eps, bool bfloat16, "
    "Tensor(c!)? second=None, Tensor(d!)? certain=None, Tensor? stop=None) -> ()",
    "cpp_gather_fold(Tensor value, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {PATCH}, {_GRID}) -> ()",
    "cpp_gather_fold_adjoint(Tensor grad, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {PATCH}, {_GRID}) -> ()",
    "cpp_gather_dot(Tensor value, Tensor grad, Tensor index, Tensor(a!) out, "
    f"int stride, {PATCH}, {_GRID}) -> ()",
    "cuda_version() -> int",
    "cuda_gather_fold(Tensor[] values, Tensor index, Tensor? weight, Tensor(a!)[] outs, "
    f"int[] strides, {PATCH}, {_GRID}, bool check_index) -> ()",
    "cuda_gather_fold_adjoint(Tensor[] grads, Tensor index, Tensor csr_offsets, "
    "Tensor csr_indices, Tensor? weight, Tensor(a!)[] outs, "
    f"int[] strides, {PATCH}, {_GRID}) -> ()",
    "cuda_gather_dot(Tensor value, Tensor grad, Tensor index, Tensor(a!) out, "
    f"int stride, {PATCH}, {_GRID}, bool check_index) -> ()",
    f"cuda_slab_search({_SLAB}) -> ()",  # see kernels/slab.py
    f"cuda_slab_argmax({_SLAB}) -> ()",
):
    LIBRARY.define(_schema)


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


@cache
def why_not_gpu(device: torch.device) -> str | None:
    """The reason why a GPU is too old for the kernels, or None."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        return f"it needs compute capability 8.0 or newer, this device has {capability}"
    return None


def cuda_library_version() -> str:
    """Version of CUDA that compiled the library."""
    version = torch.ops.ttsr_fast.cuda_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def instruction_set() -> str:
    """Instruction set of the CPU kernels: the best here, or TTSR_FAST_ISA."""
    return torch.ops.ttsr_fast.cpp_isa()


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


def _library(*, cuda: bool = False) -> Path | None:
    """The library that the environment names, compiled for this user, or installed."""
    named = os.environ.get("TTSR_FAST_CUDA_LIBRARY" if cuda else "TTSR_FAST_LIBRARY")
    if named:
        return Path(named)
    installed = Path(__file__).parent.parent / (build.CUDA_LIBRARY if cuda else build.LIBRARY)
    return build.cached_library(cuda=cuda) or (installed if installed.is_file() else None)
