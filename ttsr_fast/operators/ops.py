"""Operators: work, shape functions and gradients; the work is done by the backend that is chosen.

`search` and `gather_fold` are the public two of the namespace `ttsr_fast`. Their gradients need two
more, linear in all they touch, so nothing is unfolded in a backward pass either:
`gather_fold_adjoint` (the transpose of `gather_fold` in its value) and `gather_dot` (the inner
product of every output patch with the value patch at its index). `search_backward` is written in
these. `search_transfer` is a search and the transfer of several levels in one: the levels share
their launches, and its gradient sorts out once which queries chose each key.

A patch at grid position (y, x) begins at row `y - padding` and column `x - padding` of its map; a
map of `size` positions therefore has `size + 2 * padding - kernel_size + 1` patches along that
axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ttsr_fast.operators import backends, pytorch, transfer
from ttsr_fast.operators.choosers import Choosers
from ttsr_fast.operators.schemas import LIBRARY

search = torch.ops.ttsr_fast.search.default
gather_fold = torch.ops.ttsr_fast.gather_fold.default
gather_fold_adjoint = torch.ops.ttsr_fast.gather_fold_adjoint.default
gather_dot = torch.ops.ttsr_fast.gather_dot.default
search_backward = torch.ops.ttsr_fast.search_backward.default
search_transfer = torch.ops.ttsr_fast.search_transfer.default
search_transfer_backward = torch.ops.ttsr_fast.search_transfer_backward.default

NO_SECOND_DERIVATIVE = (
    "ttsr_fast: second derivatives of search and gather_fold are not implemented; "
    "ttsr_fast.reference has the same operations in plain PyTorch, which differentiates twice"
)
# What TTSR fixes for its whole model: kernel_size, padding; normalize, eps, add_eps; divisor.
TTSR_PATCH, TTSR_SCORE, TTSR_DIVISOR = (3, 1), ("both", 1e-12, False), "area"


def _search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    kernel_size: int,
    padding: int,
    normalize: str,
    eps: float,
    add_eps: bool,
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
        options = (kernel_size, padding, normalize, eps, add_eps, precision)
        run(query, key, key_mask, score, index, *options)
    return score, index


def _search_outputs(query: Tensor, kernel_size: int, padding: int) -> tuple[Tensor, Tensor]:
    shrink = kernel_size - 1 - 2 * padding
    n, _, h, w = query.shape
    score = query.new_empty(n, h - shrink, w - shrink, dtype=pytorch.work_dtype(query.dtype))
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
    patch = (kernel_size, padding)
    return transfer.gather_fold([value], index, weight, [stride], patch, divisor, backend)[0]


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
    patch, sizes = (kernel_size, padding), [value_size]
    choosers = Choosers(index)
    return transfer.adjoint([grad], choosers, weight, sizes, [stride], patch, divisor, backend)[0]


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
    return torch.empty(index.shape, dtype=pytorch.work_dtype(value.dtype), device=value.device)


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
    add_eps: bool,
    backend: str | None,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:  # shapes of query and key; empty where not needed
    patch, choosers = (kernel_size, padding), Choosers(index)
    return transfer.search_gradient(
        grad_score, query, key, score, choosers, patch, normalize, eps, add_eps, backend, needed
    )


def _search_transfer(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HK, WK]
    values: list[Tensor],  # [N or 1, C, stride*HK, stride*WK] each
    strides: list[int],
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # [N, H, W] twice, [N, C, stride*H, stride*W] each
    options = (*TTSR_PATCH, *TTSR_SCORE, precision, backend)
    score, index = _search(query, key, key_mask, *options)
    outs = transfer.gather_fold(values, index, None, strides, TTSR_PATCH, TTSR_DIVISOR, backend)
    return score, index, outs


def _search_transfer_backward(
    grad_score: Tensor,  # [N, H, W]
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    score: Tensor,  # [N, H, W]
    index: Tensor,  # [N, H, W]
    value_sizes: list[int],  # four for every value
    strides: list[int],
    backend: str | None,
    needed: list[bool],  # of query, key and every value
) -> tuple[Tensor, Tensor, list[Tensor]]:  # shapes of the inputs; empty where not needed
    choosers = Choosers(index)
    sizes = _in_fours(value_sizes)
    outs = [grad.new_empty(0) for grad in grads]
    levels = [level for level, need in enumerate(needed[2:]) if need]
    if levels:
        made = transfer.adjoint(
            [grads[level] for level in levels],
            choosers,
            None,
            [sizes[level] for level in levels],
            [strides[level] for level in levels],
            TTSR_PATCH,
            TTSR_DIVISOR,
            backend,
        )
        for level, grad in zip(levels, made, strict=True):
            outs[level] = grad
    pair = transfer.search_gradient(
        grad_score, query, key, score, choosers, TTSR_PATCH, *TTSR_SCORE, backend, needed[:2]
    )
    return *pair, outs


def _search_transfer_backward_outputs(
    query: Tensor, key: Tensor, grads: list[Tensor], value_sizes: list[int], needed: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    outs = [
        transfer.like(grad, size) if need else grad.new_empty(0)
        for grad, size, need in zip(grads, _in_fours(value_sizes), needed[2:], strict=True)
    ]
    return *transfer.search_gradient_outputs(query, key, needed[:2]), outs


def _in_fours(sizes: list[int]) -> list[list[int]]:
    return [sizes[i : i + 4] for i in range(0, len(sizes), 4)]


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """The operators drop tangents; `transforms` calls them where they carry none."""
    for x in arguments:
        if isinstance(x, list | tuple):
            _refuse_tangents(tuple(x))
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "ttsr_fast: the operators of torch.ops.ttsr_fast have no forward-mode derivative, "
                "and no forward-mode derivative of their gradient; ttsr_fast.search, "
                "ttsr_fast.gather_fold and, for more, ttsr_fast.reference do"
            )


def _outside_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast has chosen the precision before; here it would round the steps in between."""

    @functools.wraps(function)
    def run(x: Tensor, *rest: Any) -> Any:
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            _refuse_tangents((x, *rest))
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
    ("search_transfer", _search_transfer),
    ("search_transfer_backward", _search_transfer_backward),
):
    LIBRARY.impl(_name, _outside_autocast(_function), "CompositeExplicitAutograd")


@torch.library.register_fake("ttsr_fast::search", lib=LIBRARY)
def _(query, key, key_mask, kernel_size, padding, normalize, eps, add_eps, precision, backend):
    return _search_outputs(query, kernel_size, padding)


@torch.library.register_fake("ttsr_fast::gather_fold", lib=LIBRARY)
def _(value, index, weight, stride, kernel_size, padding, divisor, backend):
    return transfer.outputs([value], index, [stride], (kernel_size, padding))[0]


@torch.library.register_fake("ttsr_fast::gather_fold_adjoint", lib=LIBRARY)
def _(grad, index, weight, value_size, stride, kernel_size, padding, divisor, backend):
    return transfer.like(grad, value_size)


@torch.library.register_fake("ttsr_fast::gather_dot", lib=LIBRARY)
def _(value, grad, index, stride, kernel_size, padding, divisor, backend):
    return _gather_dot_output(value, index)


@torch.library.register_fake("ttsr_fast::search_backward", lib=LIBRARY)
def _(grad_score, query, key, *rest):
    return transfer.search_gradient_outputs(query, key, rest[-1])


@torch.library.register_fake("ttsr_fast::search_transfer", lib=LIBRARY)
def _(query, key, key_mask, values, strides, precision, backend):
    score, index = _search_outputs(query, *TTSR_PATCH)
    return score, index, transfer.outputs(values, index, strides, TTSR_PATCH)


@torch.library.register_fake("ttsr_fast::search_transfer_backward", lib=LIBRARY)
def _(grad_score, grads, query, key, score, index, value_sizes, strides, backend, needed):
    return _search_transfer_backward_outputs(query, key, grads, value_sizes, needed)


def _search_setup(ctx, inputs, output):
    query, key, _, kernel_size, padding, normalize, eps, add_eps, _, backend = inputs
    score, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(query, key, score, index)
    ctx.options = (kernel_size, padding, normalize, eps, add_eps, backend)


def _search_gradient(ctx, grad_score, _):
    grads = search_backward(
        grad_score, *ctx.saved_tensors, *ctx.options, list(ctx.needs_input_grad[:2])
    )
    wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True))
    return *wanted, *[None] * 8


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


def _search_transfer_setup(ctx, inputs, output):
    query, key, _, values, strides, _, backend = inputs
    score, index, _ = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(query, key, score, index)
    ctx.value_sizes = [size for value in values for size in value.shape]
    ctx.options = (strides, backend)


def _search_transfer_gradient(ctx, grad_score, _, grads):
    query, key, score, index = ctx.saved_tensors
    strides, backend = ctx.options
    needed = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3]]
    grad_query, grad_key, grad_values = search_transfer_backward(
        grad_score, grads, query, key, score, index, ctx.value_sizes, strides, backend, needed
    )
    wanted = (g if need else None for g, need in zip((grad_query, grad_key), needed, strict=False))
    values = [g if need else None for g, need in zip(grad_values, needed[2:], strict=True)]
    return *wanted, None, values, None, None, None


def _no_setup(ctx, inputs, output):
    pass


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(NO_SECOND_DERIVATIVE)


torch.library.register_autograd(
    "ttsr_fast::search", _search_gradient, setup_context=_search_setup, lib=LIBRARY
)
torch.library.register_autograd(
    "ttsr_fast::search_transfer",
    _search_transfer_gradient,
    setup_context=_search_transfer_setup,
    lib=LIBRARY,
)
torch.library.register_autograd(
    "ttsr_fast::gather_fold",
    _gather_fold_backward,
    setup_context=_gather_fold_setup,
    lib=LIBRARY,
)
for _name in (
    "gather_fold_adjoint",
    "gather_dot",
    "search_backward",
    "search_transfer_backward",
):
    torch.library.register_autograd(
        f"ttsr_fast::{_name}", _no_second_derivative, setup_context=_no_setup, lib=LIBRARY
    )
