"""`gather_fold` at several levels, its two transposes, and its gradient: schema, work, fake.

Values come and go as lists, one for every level: a backend may do all levels in one launch, and
they share the inverse of the index.
"""

from typing import Any

import torch
from torch import Tensor

from ttsr_fast.operators import backends
from ttsr_fast.operators.index import InverseIndex, check_index
from ttsr_fast.operators.patch import TRANSFER, Patch, Transfer, empty_like, sum_dtype
from ttsr_fast.operators.registry import (
    Function,
    Sum,
    call_without_derivative,
    register,
    register_derivative,
    register_without_derivative,
    under_transform,
    untraced,
)


def _split(options: tuple[Any, ...]) -> tuple[Transfer, str | None]:
    strides, kernel_size, padding, divisor, backend = options
    return Transfer(strides, Patch(kernel_size, padding), divisor), backend


# --- gather_fold ---

GATHER_FOLD = (
    f"gather_fold(Tensor[] values, Tensor index, Tensor? weight, {TRANSFER}, "
    "str? backend) -> Tensor[]"
)


def _gather_fold(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    *options: Any,
) -> list[Tensor]:  # [N, C, stride*H, stride*W] each
    transfer, backend = _split(options)
    try:
        return fold(values, index, weight, transfer, backend)
    except (IndexError, RuntimeError, ValueError):
        if index.device.type == "cpu":  # a likely reason, which backends put in their own words
            rows, columns = transfer.key_grid(values[0].shape)
            value, stride = list(values[0].shape), transfer.strides[0]
            where = f" for the {rows} x {columns} key grid of value {value} at stride {stride}"
            check_index(index, rows * columns, where)
        raise


def fold(
    values: list[Tensor],
    index: Tensor,
    weight: Tensor | None,
    transfer: Transfer,
    backend: str | None,
) -> list[Tensor]:
    """The work of `gather_fold`, for other operators."""
    run = backends.choose("gather_fold", values[0], backend)
    outs = _empty_outputs(values, index, transfer)
    if index.numel():
        run(values, index, weight, outs, transfer)
    return outs


def _fake_gather_fold(values: list[Tensor], index: Tensor, weight: Any, *options: Any) -> Any:
    return _empty_outputs(values, index, _split(options)[0])


def _empty_outputs(values: list[Tensor], index: Tensor, transfer: Transfer) -> list[Tensor]:
    height, width = transfer.patch.map_size(*index.shape[1:])
    return [
        empty_like(value, [index.shape[0], value.shape[1], height * stride, width * stride])
        for value, stride in zip(values, transfer.strides, strict=True)
    ]


gather_fold = register(GATHER_FOLD, _gather_fold, _fake_gather_fold)


# --- gather_fold_adjoint: the transpose in the values ---

GATHER_FOLD_ADJOINT = (
    "gather_fold_adjoint(Tensor[] grads, Tensor index, Tensor? weight, SymInt[] value_sizes, "
    f"{TRANSFER}, str? backend) -> Tensor[]"
)


def _gather_fold_adjoint(
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    value_sizes: list[int],  # four for every value
    *options: Any,
) -> list[Tensor]:  # value_sizes
    sizes = _in_fours(value_sizes)
    return fold_adjoint(grads, InverseIndex(index), weight, sizes, *_split(options))


def fold_adjoint(
    grads: list[Tensor],
    inverse: InverseIndex,
    weight: Tensor | None,
    sizes: list[list[int]],
    transfer: Transfer,
    backend: str | None,
) -> list[Tensor]:
    """`gather_fold_adjoint` with an inverse index, which several calls can share."""
    run = backends.choose("gather_fold_adjoint", grads[0], backend)
    outs = [empty_like(grad, size) for grad, size in zip(grads, sizes, strict=True)]
    if inverse.index.numel() == 0:
        return [out.zero_() for out in outs]
    run(grads, inverse, weight, outs, transfer)
    return outs


def _fake_adjoint(grads: list[Tensor], index: Any, weight: Any, sizes: list[int], *_: Any) -> Any:
    return [empty_like(x, size) for x, size in zip(grads, _in_fours(sizes), strict=True)]


def _in_fours(sizes: list[int]) -> list[list[int]]:
    return [sizes[i : i + 4] for i in range(0, len(sizes), 4)]


gather_fold_adjoint = register(GATHER_FOLD_ADJOINT, _gather_fold_adjoint, _fake_adjoint)
register_without_derivative(gather_fold_adjoint)


# --- gather_dot: the transpose in the weight ---

GATHER_DOT = (
    f"gather_dot(Tensor[] values, Tensor[] grads, Tensor index, {TRANSFER}, str? backend) -> Tensor"
)


def _gather_dot(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    index: Tensor,  # [N, Ho, Wo]
    *options: Any,
) -> Tensor:  # [N, Ho, Wo]
    """Inner product of every output patch with the value patch at its index, over all levels."""
    transfer, backend = _split(options)
    run = backends.choose("gather_dot", values[0], backend)
    out = _fake_dot(values, grads, index)
    if out.numel():
        run(values, grads, index, out, transfer)
    return out


def _fake_dot(values: list[Tensor], grads: Any, index: Tensor, *_: Any) -> Tensor:
    dtype = sum_dtype(values[0].dtype)
    return torch.empty(index.shape, dtype=dtype, device=index.device)


gather_dot = register(GATHER_DOT, _gather_dot, _fake_dot)
register_without_derivative(gather_dot)


# --- derivative ---


class GatherFold(Function):
    """`gather_fold`, linear in values and weight, with its gradient and its tangent."""

    @staticmethod
    def call(values: list[Tensor], *rest: Any) -> list[Tensor]:
        """The operator's results, connected to its arguments."""
        return list(GatherFold.record(*rest, *values))

    @staticmethod
    def forward(index: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        options, values = rest[:5], list(rest[5:])
        return tuple(gather_fold(values, index, weight, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        index, weight, *rest = inputs
        ctx.options, values = rest[:5], rest[5:]
        ctx.value_sizes = [list(value.shape) for value in values]
        kept = (index, weight, *(values if weight is not None else ()))
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        index, weight, *values = ctx.saved_tensors
        strides, *options = ctx.options
        grad_values: list[Tensor | None] = [None] * len(grads)
        needed = [level for level, need in enumerate(ctx.needs_input_grad[7:]) if need]
        if needed:
            made = call_without_derivative(
                gather_fold_adjoint,
                [grads[level] for level in needed],
                index,
                weight,
                [size for level in needed for size in ctx.value_sizes[level]],
                [strides[level] for level in needed],
                *options,
            )
            for level, grad in zip(needed, made, strict=True):
                grad_values[level] = grad
        grad_weight = None
        if ctx.needs_input_grad[1]:
            arguments = (values, list(grads), index, *ctx.options)
            grad_weight = call_without_derivative(gather_dot, *arguments).to(weight.dtype)
        return None, grad_weight, *[None] * 5, *grad_values

    @staticmethod
    def jvp(ctx: Any, _: None, d_weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        """T(d_value, weight) + T(value, d_weight); under a transform there is one value."""
        index, weight, *values = ctx.saved_tensors
        (d_value,), parts = rest[5:], []
        if d_value is not None:
            parts += GatherFold.apply(index, weight, *ctx.options, d_value)
        if d_weight is not None:
            parts += GatherFold.apply(index, d_weight, *ctx.options, *values)
        return (parts[0] if len(parts) == 1 else Sum.apply(*parts),)


register_derivative(gather_fold, GatherFold.call)


def call_gather_fold(
    values: list[Tensor], index: Tensor, weight: Tensor | None, strides: list[int], *options: Any
) -> list[Tensor]:
    """The operator, or under a transform of torch.func what that can differentiate."""
    if not under_transform():
        return gather_fold(values, index, weight, strides, *options)
    return [
        untraced(GatherFold.call, [value], index, weight, [stride], *options)[0]
        for value, stride in zip(values, strides, strict=True)
    ]
