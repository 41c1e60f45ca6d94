"""Operator schemas, shape functions and gradients; the work is done by the backend that is chosen.

`search` and `gather_fold` are the public two of the namespace `ttsr_fast`. Their gradients need two
more, linear in all they touch, so nothing is unfolded in a backward pass either:
`gather_fold_adjoint` (the transpose of `gather_fold` in its value) and `gather_dot` (the inner
product of every output patch with the value patch at its index). `search_backward` is written in
these.

A patch at grid position (y, x) begins at row `y - padding` and column `x - padding` of its map; a
map of `size` positions therefore has `size + 2 * padding - kernel_size + 1` patches along that
axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import backends, portable

_PATCH = "int kernel_size, int padding"
_library = torch.library.Library("ttsr_fast", "DEF")
_library.define(
    "search(Tensor query, Tensor key, Tensor? key_mask, "
    f"{_PATCH}, str normalize, float eps, str precision, str? backend) -> (Tensor, Tensor)"
)
_library.define(
    "gather_fold(Tensor value, Tensor index, Tensor? weight, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
_library.define(
    "gather_fold_adjoint(Tensor grad, Tensor index, Tensor? weight, SymInt[] value_size, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
_library.define(
    "gather_dot(Tensor value, Tensor grad, Tensor index, "
    f"int stride, {_PATCH}, str divisor, str? backend) -> Tensor"
)
_library.define(
    "search_backward(Tensor grad_score, Tensor query, Tensor key, Tensor score, Tensor index, "
    f"{_PATCH}, str normalize, float eps, str? backend, bool[2] needed) -> (Tensor, Tensor)"
)
# The compiled library, where it is loaded, implements these: the same with outputs to fill.
_library.define("cpp_isa() -> str")
_library.define(
    "cpp_search(Tensor query, Tensor key, Tensor? key_mask, Tensor(a!) score, Tensor(b!) index, "
    f"{_PATCH}, bool normalize_query, bool normalize_key, float eps, bool bfloat16) -> ()"
)
_library.define(
    "cpp_gather_fold(Tensor value, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)
_library.define(
    "cpp_gather_fold_adjoint(Tensor grad, Tensor index, Tensor? weight, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)
_library.define(
    "cpp_gather_dot(Tensor value, Tensor grad, Tensor index, Tensor(a!) out, "
    f"int stride, {_PATCH}, int key_height, int key_width, str divisor) -> ()"
)

search = torch.ops.ttsr_fast.search.default
gather_fold = torch.ops.ttsr_fast.gather_fold.default
gather_fold_adjoint = torch.ops.ttsr_fast.gather_fold_adjoint.default
gather_dot = torch.ops.ttsr_fast.gather_dot.default
search_backward = torch.ops.ttsr_fast.search_backward.default


def _search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    kernel_size: int,
    padding: int,
    normalize: str,
    eps: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    # On other devices this would wait for them.
    on_cpu = query.device.type == "cpu"
    if key_mask is not None and on_cpu and not bool(key_mask.flatten(1).any(1).all()):
        raise ValueError("key_mask must leave at least one key position True in every image")
    run = backends.choose("search", query, backend)
    score, index = _search_outputs(query, kernel_size, padding)
    if score.numel():
        run(query, key, key_mask, score, index, kernel_size, padding, normalize, eps, precision)
    return score, index


def _at_index(
    per_key: Tensor,  # [N or 1, 1, HKo, WKo]
    index: Tensor,  # [N, Ho, Wo]
    backend: str | None,
) -> Tensor:  # [N, Ho, Wo]
    return gather_fold(per_key, index, None, 1, 1, 0, "none", backend)[:, 0]


def _search_outputs(query: Tensor, kernel_size: int, padding: int) -> tuple[Tensor, Tensor]:
    shrink = kernel_size - 1 - 2 * padding
    n, _, h, w = query.shape
    score = query.new_empty(n, h - shrink, w - shrink, dtype=portable.work_dtype(query.dtype))
    return score, torch.empty_like(score, dtype=torch.int64)


def _gather_fold(
    value: Tensor,  # [N or 1, C, HV, WV]
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    stride: int,
    kernel_size: int,
    padding: int,
    divisor: str,
    backend: str | None,
) -> Tensor:  # [N, C, stride*H, stride*W]
    if index.device.type == "cpu" and index.numel():
        shrink = kernel_size - 1 - 2 * padding
        height, width = (size // stride - shrink for size in value.shape[2:])
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= height * width:
            raise ValueError(
                f"index must lie in [0, {height * width}) for the {height} x {width} key grid of "
                f"value {list(value.shape)} at stride {stride}, got {low} to {high}"
            )
    run = backends.choose("gather_fold", value, backend)
    out = _gather_fold_output(value, index, stride, kernel_size, padding)
    if out.numel():
        run(value, index, weight, out, stride, kernel_size, padding, divisor)
    return out


def _gather_fold_output(
    value: Tensor, index: Tensor, stride: int, kernel_size: int, padding: int
) -> Tensor:
    shrink = kernel_size - 1 - 2 * padding
    n, h, w = index.shape
    size = (n, value.shape[1], (h + shrink) * stride, (w + shrink) * stride)
    return torch.empty(
        size, dtype=value.dtype, device=value.device, memory_format=_memory_format(value)
    )


def _gather_fold_adjoint(
    grad: Tensor,  # [N, C, stride*H, stride*W]
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    value_size: list[int],  # [N or 1, C, HV, WV]
    stride: int,
    kernel_size: int,
    padding: int,
    divisor: str,
    backend: str | None,
) -> Tensor:  # value_size
    run = backends.choose("gather_fold_adjoint", grad, backend)
    out = _adjoint_output(grad, value_size)
    if index.numel() == 0:
        return out.zero_()
    run(grad, index, weight, out, stride, kernel_size, padding, divisor)
    return out


def _adjoint_output(grad: Tensor, value_size: list[int]) -> Tensor:
    return torch.empty(
        value_size, dtype=grad.dtype, device=grad.device, memory_format=_memory_format(grad)
    )


def _gather_dot(
    value: Tensor,  # [N or 1, C, HV, WV]
    grad: Tensor,  # [N, C, stride*H, stride*W]
    index: Tensor,  # [N, Ho, Wo]
    stride: int,
    kernel_size: int,
    padding: int,
    divisor: str,
    backend: str | None,
) -> Tensor:  # [N, Ho, Wo]
    run = backends.choose("gather_dot", value, backend)
    out = _gather_dot_output(value, index)
    if out.numel():
        run(value, grad, index, out, stride, kernel_size, padding, divisor)
    return out


def _gather_dot_output(value: Tensor, index: Tensor) -> Tensor:
    return torch.empty(index.shape, dtype=portable.work_dtype(value.dtype), device=value.device)


def _search_backward(
    grad_score: Tensor,  # [N, Ho, Wo]
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    score: Tensor,  # [N, Ho, Wo]
    index: Tensor,  # [N, Ho, Wo]
    kernel_size: int,
    padding: int,
    normalize: str,
    eps: float,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # shapes of query and key; empty where not needed
    """Gradient through the two chosen patches and their norms.

    With i = index[j], g the gradient of score[j] and n = max(norm, eps): the product of the patches
    has gradient g / (n_i n_j) in each factor, and a norm above eps pulls on every pixel x of its
    patch by -g score x / norm^2, summed over the patches that hold x.
    """
    patch = (kernel_size, padding)
    weight, query_pull, key_pull = grad_score, None, None
    if normalize in ("both", "key"):
        norm = portable.patch_norm(key, *patch)
        chosen = _at_index(norm, index, backend)
        weight = weight / chosen.clamp(min=eps)
        pull = torch.where(chosen > eps, grad_score * score / chosen**2, 0).unsqueeze(1)
        key_pull = gather_fold_adjoint(
            pull, index, None, list(norm.shape), 1, 1, 0, "none", backend
        )
    if normalize == "both":
        norm = portable.patch_norm(query, *patch)[:, 0]
        weight = weight / norm.clamp(min=eps)
        query_pull = torch.where(norm > eps, grad_score * score / norm**2, 0).unsqueeze(1)

    grad_query, grad_key = query.new_empty(0), key.new_empty(0)
    if needed[0]:
        grad_query = gather_fold(key, index, weight, 1, *patch, "none", backend)
        if query_pull is not None:
            grad_query -= _spread(query, query_pull, *patch)
    if needed[1]:
        size = list(key.shape)
        grad_key = gather_fold_adjoint(query, index, weight, size, 1, *patch, "none", backend)
        if key_pull is not None:
            grad_key -= _spread(key, key_pull, *patch)
    return grad_query, grad_key


def _search_backward_outputs(query: Tensor, key: Tensor, needed: list[bool]):
    grad_query = torch.empty(
        query.shape, dtype=key.dtype, device=key.device, memory_format=_memory_format(key)
    )
    return (
        grad_query if needed[0] else query.new_empty(0),
        _adjoint_output(query, list(key.shape)) if needed[1] else key.new_empty(0),
    )


def _spread(x: Tensor, pull: Tensor, kernel_size: int, padding: int) -> Tensor:
    """x times the sum of `pull` over the patches that hold each pixel."""
    padded = F.pad(pull, [kernel_size - 1 - padding] * 4)
    total = F.avg_pool2d(padded, kernel_size, stride=1, divisor_override=1)
    return x * total.to(x.dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has chosen the precision before; here it would round the steps in between."""

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        if not torch.amp.is_autocast_available(x.device.type):
            return function(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    return run


for _name, _function in (
    ("search", _search),
    ("gather_fold", _gather_fold),
    ("gather_fold_adjoint", _gather_fold_adjoint),
    ("gather_dot", _gather_dot),
    ("search_backward", _search_backward),
):
    _library.impl(_name, _outside_autocast(_function), "CompositeExplicitAutograd")


@torch.library.register_fake("ttsr_fast::search", lib=_library)
def _(query, key, key_mask, kernel_size, padding, normalize, eps, precision, backend):
    return _search_outputs(query, kernel_size, padding)


@torch.library.register_fake("ttsr_fast::gather_fold", lib=_library)
def _(value, index, weight, stride, kernel_size, padding, divisor, backend):
    return _gather_fold_output(value, index, stride, kernel_size, padding)


@torch.library.register_fake("ttsr_fast::gather_fold_adjoint", lib=_library)
def _(grad, index, weight, value_size, stride, kernel_size, padding, divisor, backend):
    return _adjoint_output(grad, value_size)


@torch.library.register_fake("ttsr_fast::gather_dot", lib=_library)
def _(value, grad, index, stride, kernel_size, padding, divisor, backend):
    return _gather_dot_output(value, index)


@torch.library.register_fake("ttsr_fast::search_backward", lib=_library)
def _(grad_score, query, key, score, index, kernel_size, padding, normalize, eps, backend, needed):
    return _search_backward_outputs(query, key, needed)


def _search_setup(ctx, inputs, output):
    query, key, _, kernel_size, padding, normalize, eps, _, backend = inputs
    score, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(query, key, score, index)
    ctx.options = (kernel_size, padding, normalize, eps, backend)


def _search_gradient(ctx, grad_score, _):
    grads = search_backward(
        grad_score, *ctx.saved_tensors, *ctx.options, list(ctx.needs_input_grad[:2])
    )
    wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
    return *wanted, *[None] * 7


def _gather_fold_setup(ctx, inputs, output):
    value, index, weight, stride, kernel_size, padding, divisor, backend = inputs
    ctx.save_for_backward(value if weight is not None else None, index, weight)
    ctx.value_size = list(value.shape)
    ctx.options = (stride, kernel_size, padding, divisor, backend)


def _gather_fold_backward(ctx, grad):
    value, index, weight = ctx.saved_tensors
    grad_value = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_value = gather_fold_adjoint(grad, index, weight, ctx.value_size, *ctx.options)
    if weight is not None and ctx.needs_input_grad[2]:
        grad_weight = gather_dot(value, grad, index, *ctx.options).to(weight.dtype)
    return grad_value, None, grad_weight, *[None] * 5


def _no_setup(ctx, inputs, output):
    pass


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "ttsr_fast: second derivatives of search and gather_fold are not implemented; "
        "ttsr_fast.reference has the same operations in plain PyTorch, which differentiates twice"
    )


torch.library.register_autograd(
    "ttsr_fast::search", _search_gradient, setup_context=_search_setup, lib=_library
)
torch.library.register_autograd(
    "ttsr_fast::gather_fold",
    _gather_fold_backward,
    setup_context=_gather_fold_setup,
    lib=_library,
)
for _name in ("gather_fold_adjoint", "gather_dot", "search_backward"):
    torch.library.register_autograd(
        f"ttsr_fast::{_name}", _no_second_derivative, setup_context=_no_setup, lib=_library
    )
