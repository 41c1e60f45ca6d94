"""Registration of the operators in the namespace `ttsr_fast`, and of their derivatives.

An operator exists with or without the compiled libraries. Derivatives are classes of
`autograd.Function`: PyTorch can register no forward-mode derivative for an operator, and under the
transforms of torch.func no reverse-mode one either; a Function has both. One level is
differentiable: the derivative of a derivative raises an error.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

LIBRARY = torch.library.Library("ttsr_fast", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)  # without the functions of a subclass
NO_SECOND_DERIVATIVE = (
    "ttsr_fast: second derivatives of search and gather_fold are not implemented; "
    "ttsr_fast.reference has the same operations in plain PyTorch, which differentiates twice"
)


def register(schema: str, work: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator, and return it.

    Args:
        schema: name, arguments and results.
        work: the implementation for every device. Autocast is off inside.
        fake: its results from shapes alone, uninitialised, for `torch.compile`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, _without_autocast(work), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ttsr_fast::{name}", fake, lib=LIBRARY)
    operator = getattr(torch.ops.ttsr_fast, name).default
    if "Tensor[]" in schema:
        _register_batching(operator, schema, work, fake)
    return operator


def _register_batching(
    operator: Any, schema: str, work: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Make vmap split an operator of lists by levels: it batches operators without lists alone."""
    name = schema.partition("(")[0]
    single = schema.replace("Tensor[]", "Tensor").replace("int[] strides", "int stride")
    lists = [a.name == "strides" or _is_tensors(a) for a in operator._schema.arguments]
    returns_list = _is_tensors(operator._schema.returns[0])

    def of_one(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = function(*([x] if n else x for x, n in zip(arguments, lists, strict=True)))
            return result[0] if returns_list else result

        return run

    level_schema = single.replace(name, f"{name}_level", 1)
    level_operator = register(level_schema, of_one(work), of_one(fake))

    def split(*arguments: Any) -> Any:
        count = len(arguments[0])
        results = [
            level_operator(
                *(_share(x, level, count, n) for x, n in zip(arguments, lists, strict=True))
            )
            for level in range(count)
        ]
        return results if returns_list else functools.reduce(torch.add, results)

    for key in ("Batched", "FuncTorchBatched"):
        LIBRARY.impl(name, split, key)


def _is_tensors(argument: Any) -> bool:
    """True for the schema of a list of tensors."""
    return str(argument.type) == "List[Tensor]"


def _share(x: Any, level: int, count: int, single: bool) -> Any:
    """The part of an argument that belongs to a level."""
    if single:
        return x[level]
    size = len(x) // count if type(x) is list else 0  # four sizes of every value
    return x[level * size : (level + 1) * size] if size else x


def register_derivative(operator: Any, differentiable: Callable[..., Any]) -> None:
    """Make an operator call `differentiable`, of the same arguments, where autograd records.

    `differentiable` calls the operator in the forward pass of a Function, where nothing records.
    """

    def run(keys: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and _any_requires_grad(arguments):
            return differentiable(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    LIBRARY.impl(operator.name().partition("::")[2], run, "Autograd", with_keyset=True)


def register_without_derivative(operator: Any) -> None:
    """Make the derivative of an operator an error."""
    register_derivative(operator, functools.partial(WithoutDerivative.call, operator))


def call_without_derivative(operator: Any, *arguments: Any) -> Any:
    """A call inside a derivative, of an operator that has none."""
    if under_transform():
        return WithoutDerivative.call(operator, *arguments)
    return operator(*arguments)


def _any_requires_grad(arguments: Any) -> bool:
    for x in arguments:
        if x.requires_grad if isinstance(x, Tensor) else type(x) is list and _any_requires_grad(x):
            return True
    return False


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`functional` resolved the precision; here autocast would round the steps in between."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            _refuse_tangents(arguments)
        first = arguments[0]
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def _refuse_tangents(arguments: Any) -> None:
    """An operator would drop tangents; a Function calls it with tensors that carry none."""
    for x in arguments:
        if type(x) is list:
            _refuse_tangents(x)
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "ttsr_fast: the operators of torch.ops.ttsr_fast have no forward-mode derivative, "
                "and no forward-mode derivative of their gradient; ttsr_fast.search, "
                "ttsr_fast.gather_fold and, for more, ttsr_fast.reference do"
            )


# --- torch.func and forward mode ---


def is_plain(*tensors: Tensor | None) -> bool:
    """True if an operator only does its work: on the CPU, not recorded, transformed or traced.

    The work can then be called itself. The two Python functions that the dispatcher calls on its
    way there take as long as a search of a few pixels.
    """
    if (
        torch.compiler.is_compiling()
        or under_transform()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    recorded = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (
            type(x) not in _PLAIN or not x.is_cpu or (recorded and x.requires_grad)
        ):
            return False
    return True


def under_transform() -> bool:
    """True if tensors may carry tangents or belong to a transform of torch.func."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def untraced(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call that the tracer of torch.compile does not enter: it cannot, with tangents."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)  # imports the compiler: not when this is loaded
    return function(*arguments)


class Function(autograd.Function):
    """A Function of operators, all of which torch.vmap can batch."""

    generate_vmap_rule = True

    @classmethod
    def record(cls, *arguments: Any) -> Any:
        """`apply`, which spends half of its time on default values outside of torch.func."""
        if torch._C._are_functorch_transforms_active():
            return cls.apply(*arguments)
        return super(autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class WithoutDerivative(Function):
    """A call of an operator whose derivative is an error."""

    @staticmethod
    def call(operator: Any, *arguments: Any) -> Any:
        """The operator's results, connected to its arguments."""
        flat, structure = pytree.tree_flatten(arguments)
        results = WithoutDerivative.record(operator, structure, *flat)
        return list(results) if _is_tensors(operator._schema.returns[0]) else results

    @staticmethod
    def forward(operator: Any, structure: Any, *flat: Any) -> Any:
        results = operator(*pytree.tree_unflatten(flat, structure))
        return tuple(results) if isinstance(results, list) else results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


class Sum(Function):
    """A sum inside a `jvp`, where other operators drop the tangents of a `jvp` around it."""

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
