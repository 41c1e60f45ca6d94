"""Random calls of the operators: right ones held to float64, broken ones to an error.

    python -m tests.campaigns.fuzz_operators --calls 4000 --broken 1000 --seed 0

A broken call is a right one with one argument changed. It must end with an exception or a result,
not with a signal, within a few seconds. Under the address sanitizer (see `make sanitize`) a read or
a write outside of a tensor is a signal, too.
"""

import argparse
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import cases, checks
from tests.checks import assert_no_worse, assert_same_choice
from ttsr_fast import Match, reference
from ttsr_fast.operators import library
from ttsr_fast.operators.patch import sum_dtype

LIMIT = 20  # seconds for a call
ops = torch.ops.ttsr_fast
BACKENDS = os.environ.get("TTSR_FAST_TEST_BACKENDS", "cpp,torch").split(",")
Call = tuple[str, Callable[..., Any], list[Any]]


def right_call(rng: random.Random) -> Call:
    """Name, operator and arguments of a call that has to succeed."""
    torch.manual_seed(rng.randrange(2**31))
    kernel_size, padding = patch = rng.choice(cases.PATCHES)
    shrink = kernel_size - 1 - 2 * padding
    dtype, channels = rng.choice(cases.DTYPES), rng.choice((1, 2, 3, 5, 8, 17))
    layouts = [name for name in cases.LAYOUTS if not name.startswith("expanded")]

    def tensor(*size: int) -> Tensor:
        return cases.LAYOUTS[rng.choice(layouts)](torch.randn(size).to(dtype))

    def side() -> int:
        return shrink + rng.choice((1, 2, 3, 5, 9, 16, 33))

    images, h, w, hk, wk = rng.randint(1, 3), side(), side(), side(), side()
    keys = rng.choice((1, images))
    index = cases.random_index(
        (keys, channels, hk, wk), (images, h - shrink, w - shrink), 1, *patch
    )
    backend = rng.choice(BACKENDS)
    name = rng.choice(("search", "gather_fold", "gather_fold_adjoint", "gather_dot"))
    if name == "search":
        mask = torch.rand(keys, hk - shrink, wk - shrink) < 0.7
        mask[:, -1, -1] = True
        score = (rng.choice(cases.NORMALIZATIONS), rng.choice((1e-12, 0.5)), rng.random() < 0.2)
        precision = "fp64" if dtype == torch.float64 else "fp32"
        arguments = [
            *(tensor(images, channels, h, w), tensor(keys, channels, hk, wk)),
            *(rng.choice((None, mask)), *patch, *score, precision, backend),
        ]
        return name, ops.search, arguments
    stride = rng.choice((1, 1, 2, 3, 4))
    ragged = rng.randrange(stride)
    value = tensor(keys, channels, hk * stride + ragged, wk * stride)
    grad = tensor(images, channels, h * stride, w * stride)
    weight = rng.choice((None, torch.rand(index.shape)))
    options = [[stride], *patch, rng.choice(cases.DIVISORS), backend]
    if name == "gather_fold":
        return name, ops.gather_fold, [[value], index, weight, *options]
    if name == "gather_dot":
        return name, ops.gather_dot, [[value], [grad], index, *options]
    return name, ops.gather_fold_adjoint, [[grad], index, weight, list(value.shape), *options]


def check(call: Call) -> None:
    """Compare the result of a right call with the reference in float64."""
    name, operator, arguments = call
    result = operator(*arguments)
    if name == "search":
        query, key, mask, kernel_size, padding, normalize, eps, add_eps, *_ = arguments
        assert_same_choice(
            Match(*result),
            *(query, key, mask),
            kernel_size=kernel_size,
            padding=padding,
            normalize=normalize,
            eps=eps,
            add_eps=add_eps,
        )
        return
    oracle = {
        "gather_fold": reference.gather_fold,
        "gather_fold_adjoint": checks.adjoint,
        "gather_dot": checks.dot,
    }[name]
    (stride,), kernel_size, padding, divisor, _ = arguments[-5:]
    options = {"kernel_size": kernel_size, "padding": padding, "divisor": divisor}
    inputs = [x[0] if isinstance(x, list) and len(x) == 1 else x for x in arguments[:-5]]
    (result,) = result if isinstance(result, list) else (result,)

    def expected(dtype: Callable[[torch.dtype], torch.dtype]) -> Tensor:
        floats = (torch.is_tensor(x) and x.is_floating_point() for x in inputs)
        converted = (
            x.to(dtype(x.dtype)) if floating else x
            for x, floating in zip(inputs, floats, strict=True)
        )
        return oracle(*converted, stride=stride, **options)

    exact = expected(lambda _: torch.float64)
    assert_no_worse(result, exact, expected(sum_dtype).to(result.dtype))


def compiled_call(rng: random.Random) -> Call:
    """A call of an operator of the compiled library, which has outputs to fill."""
    patch, size = (3, 1), (2, 3, rng.choice((4, 9)), rng.choice((5, 17)))
    x, y, out = torch.randn(size), torch.randn(size), torch.randn(size)
    index = torch.randint(size[2] * size[3], (2, *size[2:]))
    options = [1, *patch, size[2], size[3], "area"]
    search = [True, True, 1e-12, False, False, None]
    name = rng.choice(
        ("cpp_search", "cpp_gather_fold", "cpp_gather_fold_adjoint", "cpp_gather_dot")
    )
    arguments = {
        "cpp_search": [x, y, None, torch.zeros(index.shape), index, *patch, *search],
        "cpp_gather_fold": [x, index, torch.rand(index.shape), out, *options],
        "cpp_gather_fold_adjoint": [x, index, None, out, *options],
        "cpp_gather_dot": [x, y, index, torch.zeros(index.shape), *options],
    }[name]
    return name, getattr(torch.ops.ttsr_fast, name), arguments


def broken_call(rng: random.Random) -> tuple[str, Call]:
    """A right call with one argument changed, and what was done to it."""
    compiled = "cpp" in BACKENDS and rng.random() < 0.5
    name, operator, arguments = compiled_call(rng) if compiled else right_call(rng)
    if not compiled and rng.random() < 0.3:
        name, operator, arguments = _backward(rng)
    place = rng.randrange(len(arguments))
    value = arguments[place]
    if isinstance(value, Tensor):
        how, change = rng.choice(_TENSOR_CHANGES)
    else:
        how, change = "other value", _other
    arguments = [*arguments[:place], change(value, rng), *arguments[place + 1 :]]
    return f"{name}, argument {place}: {how}", (name, operator, arguments)


def _backward(rng: random.Random) -> Call:
    x, y = torch.randn(2, 3, 6, 7), torch.randn(rng.choice((1, 2)), 3, 5, 4)
    index = torch.randint(20, (2, 6, 7))
    scores = [torch.randn(2, 6, 7), x, y, torch.rand(2, 6, 7), index]
    backend = rng.choice(BACKENDS)
    if rng.random() < 0.5:
        options = [3, 1, "both", 1e-12, False, backend, [True, True]]
        return "search_backward", ops.search_backward, scores + options
    grads = [torch.randn(2, 3, 6 * s, 7 * s) for s in (1, 2)]
    sizes = [2, 3, 5, 4, 2, 3, 10, 8]
    arguments = [grads, index, None, sizes, [1, 2], 3, 1, "area", backend]
    return "gather_fold_adjoint", ops.gather_fold_adjoint, arguments


def _sized(x: Tensor, rng: random.Random) -> Tensor:
    """Another size along one axis: nothing, one less, one more, or stored once and enormous."""
    axis = rng.randrange(x.dim())
    size = rng.choice((0, 1, x.shape[axis] - 1, x.shape[axis] + 1, 2**40, 2**61))
    shape = list(x.shape)
    if size < 2**40:
        shape[axis] = size
        return torch.ones(shape, dtype=x.dtype)
    try:
        return x.narrow(axis, 0, 1).expand(*shape[:axis], size, *shape[axis + 1 :])
    except RuntimeError:  # too large for PyTorch itself
        return x.narrow(axis, 0, 1)


def _indexed(x: Tensor, rng: random.Random) -> Tensor:
    """A number out of range, at one place."""
    if x.dtype != torch.int64:
        return x * float("nan") if x.is_floating_point() else ~x
    x = x.clone()
    wrong = rng.choice((-1, -(10**6), 10**4, 10**9, 2**40, -(2**62), 2**63 - 1))
    x.view(-1)[rng.randrange(x.numel())] = wrong
    return x


def _typed(x: Tensor, rng: random.Random) -> Tensor:
    types = [torch.bool, torch.int32, torch.int64, torch.complex64, torch.uint8, *cases.DTYPES]
    return x.to(rng.choice([dtype for dtype in types if dtype != x.dtype]))


_TENSOR_CHANGES: list[tuple[str, Callable[[Tensor, random.Random], Any]]] = [
    ("another size", _sized),
    ("another number", _indexed),
    ("another type", _typed),
    ("fewer axes", lambda x, rng: x[0]),
    ("more axes", lambda x, rng: x[None]),
    ("strided", lambda x, rng: torch.stack([x, x], -1)[..., 0]),
    ("on another device", lambda x, rng: x.to("meta")),
    ("sparse", lambda x, rng: x.to_sparse()),
    ("none", lambda x, rng: None),
]


def _other(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((0, -1, 2, 4, 9, 2**31, 2**62, -(2**63)))
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e308))
    if isinstance(value, list):
        if value and isinstance(value[0], Tensor):
            if rng.random() < 0.6:
                return [rng.choice(_TENSOR_CHANGES)[1](value[0], rng), *value[1:]]
            return rng.choice(([], value[:1], value[::-1], value * 2))
        return rng.choice(([], [*value, 1], value[1:], [0 for _ in value], [2**40 for _ in value]))
    return rng.choice(("", "x", "cpp", None))


def run(calls: int, broken: int, seed: int) -> Counter[str]:
    """How calls ended.

    Raises:
        AssertionError: a right call has a wrong result, or a broken one does not end.
    """
    library.load_library()
    ends: Counter[str] = Counter()
    for number in range(calls):
        call = right_call(random.Random(f"right {seed} {number}"))
        try:
            check(call)
        except Exception as error:
            raise AssertionError(f"call {number} of seed {seed}: {_text(call)}") from error
        ends["right"] += 1
    for number in range(broken):
        how, (_, operator, arguments) = broken_call(random.Random(f"broken {seed} {number}"))
        sys.stderr.write(
            f"\rbroken call {number}: {how:<70}"
        )  # the last one that is seen is the fault
        signal.alarm(LIMIT)  # by default the end of the process
        try:
            operator(*arguments)
        except Exception as error:
            ends[f"refused: {type(error).__name__}"] += 1
        else:
            ends["accepted"] += 1
        signal.alarm(0)
    return ends


def _text(call: Call) -> str:
    shown = [list(x.shape) if torch.is_tensor(x) else x for x in call[2]]
    return f"{call[0]}{tuple(shown)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--broken", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for end, count in run(given.calls, given.broken, given.seed).most_common():
        sys.stdout.write(f"\n{count:6d} {end}")
    sys.stdout.write("\n")
