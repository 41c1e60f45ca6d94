"""Derivatives for forward-mode AD and the transforms of torch.func.

PyTorch has no way to register a forward-mode derivative for an operator of a library, and its
reverse-mode one does not work under torch.func. `autograd.Function` has both, so under these
transforms `functional` calls the two functions below.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, autograd
from torch.autograd import forward_ad

from ttsr_fast.operators import ops, pytorch


def active() -> bool:
    """Whether tensors may carry tangents or belong to a transform of torch.func."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def search(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`ops.search` under a transform."""
    return _untraced(Search.apply, *arguments)


def gather_fold(*arguments: Any) -> Tensor:
    """`ops.gather_fold` under a transform."""
    return _untraced(GatherFold.apply, *arguments)


def _untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """The tracer of torch.compile does not get through these functions with tangents."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)  # imports the compiler: not when this is loaded
    return function(*arguments)


class Search(autograd.Function):
    """`ops.search` with its gradient and its tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return ops.search(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, _, *options, _, backend = inputs
        score, index = output
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(query, key, score, index)
        ctx.save_for_forward(query, key, score, index)
        ctx.options = (*options, backend)

    @staticmethod
    def backward(ctx: Any, grad_score: Tensor, _: None) -> tuple[Any, ...]:
        needed = list(ctx.needs_input_grad[:2])
        grads = WithoutDerivative.apply(
            ops.search_backward, grad_score, *ctx.saved_tensors, *ctx.options, needed
        )
        return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 8

    @staticmethod
    def jvp(ctx: Any, d_query: Tensor | None, d_key: Tensor | None, *_: None) -> tuple[Any, ...]:
        """The derivative of <q, k> / (n_q n_k) with the index as it is.

        Inside a `jvp` PyTorch's operators drop the tangents of a `jvp` around it; here every
        tangent goes through `WithoutDerivative` first, which refuses that.
        """
        query, key, score, index = ctx.saved_tensors
        kernel_size, padding, normalize, eps, add_eps, backend = ctx.options
        patch, norm = (kernel_size, padding), (eps, add_eps)
        options = (index, 1, *patch, "none", backend)
        product, pull = torch.zeros_like(score), torch.zeros_like(score)
        if d_query is not None:
            product = product + WithoutDerivative.apply(
                ops.gather_dot, key, d_query.to(key.dtype), *options
            )
        if d_key is not None:
            product = product + WithoutDerivative.apply(
                ops.gather_dot, d_key.to(key.dtype), query, *options
            )
        if normalize in ("both", "key"):
            by, d_log = (_chosen(x, index) for x in _denominator(key, d_key, patch, *norm))
            product, pull = product / by, pull + d_log
        if normalize == "both":
            by, d_log = (x[:, 0] for x in _denominator(query, d_query, patch, *norm))
            product, pull = product / by, pull + d_log
        return product - score * pull, None


class GatherFold(autograd.Function):
    """`ops.gather_fold`, linear in value and in weight, with its gradient and its tangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return ops.gather_fold(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, index, weight, *options = inputs
        ctx.save_for_backward(value, index, weight)
        ctx.save_for_forward(value, index, weight)
        ctx.options = options

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        value, index, weight = ctx.saved_tensors
        grad_value = grad_weight = None
        if ctx.needs_input_grad[0]:
            size = list(value.shape)
            arguments = (grad, index, weight, size, *ctx.options)
            grad_value = WithoutDerivative.apply(ops.gather_fold_adjoint, *arguments)
        if ctx.needs_input_grad[2]:
            grad_weight = WithoutDerivative.apply(ops.gather_dot, value, grad, index, *ctx.options)
            grad_weight = grad_weight.to(weight.dtype)
        return grad_value, None, grad_weight, *[None] * 5

    @staticmethod
    def jvp(
        ctx: Any, d_value: Tensor | None, _: None, d_weight: Tensor | None, *rest: None
    ) -> Tensor:
        value, index, weight = ctx.saved_tensors
        parts = []
        if d_value is not None:
            d_value = d_value.to(value.dtype)
            parts.append(GatherFold.apply(d_value, index, weight, *ctx.options))
        if d_weight is not None:
            parts.append(GatherFold.apply(value, index, d_weight, *ctx.options))
        return parts[0] if len(parts) == 1 else Sum.apply(*parts)


class Sum(autograd.Function):
    """A sum inside a `jvp`, where other operators drop the tangents of a `jvp` around it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, d_y: Tensor) -> Tensor:
        return Sum.apply(d_x, d_y)


class WithoutDerivative(autograd.Function):
    """An operator that has no derivative: `WithoutDerivative.apply(operator, *arguments)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Any:
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(ops.NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(ops.NO_SECOND_DERIVATIVE)


def _denominator(
    x: Tensor,  # [N, C, H, W]
    d_x: Tensor | None,
    patch: tuple[int, int],
    eps: float,
    add_eps: bool,
) -> tuple[Tensor, Tensor]:  # [N, 1, Ho, Wo] twice
    """The number that every patch is divided by, and the tangent of its logarithm."""
    kernel_size, padding = patch
    norm = pytorch.patch_norm(x, kernel_size, padding)
    by = pytorch.denominator(norm, eps, add_eps)
    if d_x is None:
        return by, torch.zeros_like(by)
    product = (x.to(norm.dtype) * d_x.to(norm.dtype)).sum(1, keepdim=True)
    product = F.pad(product, [padding] * 4)
    d_norm = F.avg_pool2d(product, kernel_size, stride=1, divisor_override=1) / norm
    return by, torch.where(norm > (0.0 if add_eps else eps), d_norm, 0) / by


def _chosen(
    x: Tensor,  # [N or 1, 1, HKo, WKo]
    index: Tensor,  # [N, Ho, Wo]
) -> Tensor:  # [N, Ho, Wo]
    """The number of the key patch at every index."""
    flat = x.flatten(1).expand(len(index), -1)
    return flat.gather(1, index.flatten(1)).view_as(index)
