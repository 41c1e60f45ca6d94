"""Forward-mode derivatives and torch.func, held to autograd through the reference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests import cases
from tests.checks import scores_at
from ttsr_fast import SearchTransfer, gather_fold, reference, search

each = pytest.mark.parametrize
SEARCHES = {
    "ttsr": {},
    "one_key": {"key_batch": 1},
    "key": {"normalize": "key", "kernel_size": 5},
    "none": {"normalize": "none", "padding": 0},
    "added_eps": {"eps": 5.0, "add_eps": True},
    "half_below_eps": {"eps": 4.6},  # about the median of the norms
}


def doubles(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


@pytest.fixture(params=SEARCHES.values(), ids=SEARCHES.keys())
def functions(request, backend):
    """`search` and the oracle as functions of query and key, and these."""
    options = {"kernel_size": 3, **request.param}
    key_batch = options.pop("key_batch", 2)
    plain = {"padding": options["kernel_size"] // 2, **options}
    return (
        lambda q, k: search(q, k, backend=backend, **options).score,
        lambda q, k: reference.search(q, k, **plain)[0],
        (doubles(2, 3, 6, 7), doubles(key_batch, 3, 5, 8)),
    )


def test_tangent_of_search(functions):
    ours, oracle, maps = functions
    tangents = tuple(torch.randn_like(x) for x in maps)
    for function in (
        lambda f: f,
        lambda f: lambda q, k: f(q, maps[1]),
        lambda f: lambda q, k: f(maps[0], k),
    ):
        actual = torch.func.jvp(function(ours), maps, tangents)
        expected = torch.func.jvp(function(oracle), maps, tangents)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
        assert expected[1].abs().max() > 0.1


def test_gradient_of_search_by_torch_func(functions):
    ours, oracle, maps = functions
    weight = doubles(*oracle(*maps).shape)
    actual, expected = (
        torch.func.grad(lambda q, k, f=f: (f(q, k) * weight).sum(), argnums=(0, 1))(*maps)
        for f in (ours, oracle)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_maps_and_jacobians_by_torch_func(functions):
    ours, oracle, (query, key) = functions
    queries = torch.stack([query, query.flip(3)])
    actual, expected = (torch.func.vmap(lambda q, f=f: f(q, key))(queries) for f in (ours, oracle))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        actual, expected = (
            transform(lambda x, f=f: f(query[:, :, :3, :4] * x, key).flatten()[:4])(
                torch.ones(1).double()
            )
            for f in (ours, oracle)
        )
        assert expected.shape == (4, 1)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_vmap_and_jacobians_of_gather_fold(backend):
    value, weight = doubles(1, 2, 6, 8), doubles(2, 1, 3, 3)
    index = torch.randint(12, (2, 1, 3, 3))

    def ours(v: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return gather_fold(v, i, stride=2, weight=w, backend=backend)

    def oracle(v: Tensor, i: Tensor, w: Tensor) -> Tensor:
        return reference.gather_fold(v, i, w, stride=2)

    def equal(of: Callable[[Callable[..., Tensor]], object]) -> None:
        torch.testing.assert_close(of(ours), of(oracle), rtol=0, atol=1e-11)

    equal(lambda f: torch.stack([f(value, i, w) for i, w in zip(index, weight, strict=True)]))
    mapped = torch.func.vmap(ours, in_dims=(None, 0, 0))(value, index, weight)
    torch.testing.assert_close(mapped[1], oracle(value, index[1], weight[1]), rtol=0, atol=1e-11)
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        equal(lambda f, t=transform: t(f, argnums=(0, 2))(value, index[0], weight[0]))
    for strategy in ("reverse-mode", "forward-mode"):
        options = {"vectorize": True, "strategy": strategy}
        equal(
            lambda f, o=options: torch.autograd.functional.jacobian(
                lambda v, w: f(v, index[0], w), (value, weight[0]), **o
            )
        )


def test_vectorised_jacobian_of_search_transfer(backend):
    query, key = doubles(1, 2, 3, 4), doubles(1, 2, 4, 3)
    values = [doubles(1, 2, 4 * s, 3 * s) for s in (4, 2, 1)]
    module = SearchTransfer(backend=backend)
    actual, expected = (
        torch.autograd.functional.jacobian(
            lambda *v, f=function: f(query, key, *v)[1:], tuple(values), vectorize=True
        )
        for function in (module, reference.search_transfer)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def test_compiled_vmap():
    query, key = torch.randn(3, 2, 4, 5), torch.randn(1, 2, 4, 5)
    mapped = torch.vmap(lambda q: search(q[None], key).score[0])
    torch._dynamo.reset()
    compiled = torch.compile(mapped, backend="aot_eager")
    torch.testing.assert_close(compiled(query), search(query, key).score)


@each("stride, divisor", [(1, "area"), (2, "overlap")])
def test_tangent_and_gradient_of_gather_fold(backend, stride, divisor):
    value, weight = doubles(1, 2, 5 * stride + 1, 6 * stride), doubles(2, 4, 3)
    index = cases.random_index(value.shape, (2, 4, 3), stride)
    options = {"stride": stride, "divisor": divisor}
    plain = {"kernel_size": 3, "padding": 1, **options}
    inputs, tangents = (value, weight), (torch.randn_like(value), torch.randn_like(weight))

    def ours(v: Tensor, w: Tensor) -> Tensor:
        return gather_fold(v, index, weight=w, backend=backend, **options)

    def oracle(v: Tensor, w: Tensor) -> Tensor:
        return reference.gather_fold(v, index, w, **plain)

    actual, expected = (torch.func.jvp(f, inputs, tangents) for f in (ours, oracle))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    actual, expected = (
        torch.func.grad(lambda v, w, f=f: f(v, w).square().sum(), argnums=(0, 1))(*inputs)
        for f in (ours, oracle)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)

    def twice(function):
        """The mixed derivative by value and weight, and that of the derivative by the value."""
        inner = lambda v, w: torch.func.jvp(function, (v, w), tangents)[1]  # noqa: E731
        return torch.func.jvp(inner, inputs, tangents)[1]

    actual, expected = twice(ours), twice(oracle)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)
    assert expected.abs().max() > 0.1


def test_dual_numbers_through_the_module(backend):
    """forward_ad without torch.func; the module's one operator becomes several."""
    maps = [doubles(1, 3, 5, 6), doubles(1, 3, 4, 7)]
    levels = [doubles(1, 2, 4 * s, 7 * s) for s in (4, 2, 1)]
    inputs = (maps[0], maps[1], *levels)
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        outs = SearchTransfer(backend=backend)(*duals)
        actual = [forward_ad.unpack_dual(out).tangent for out in outs]
        score, texture_3, texture_2, texture_1 = outs

    def oracle(q: Tensor, k: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        score, index = reference.search(q, k)
        folds = [
            reference.gather_fold(v, index, stride=s)
            for v, s in zip(values, (4, 2, 1), strict=True)
        ]
        return score.unsqueeze(1), *folds[::-1]

    expected = torch.func.jvp(oracle, inputs, tuple(tangents))
    for x, y in zip((score, texture_3, texture_2, texture_1), expected[0], strict=True):
        torch.testing.assert_close(forward_ad.unpack_dual(x).primal, y, rtol=0, atol=1e-11)
    torch.testing.assert_close(actual, list(expected[1]), rtol=0, atol=1e-11)


def test_tangents_of_lower_precision():
    query, key = torch.randn(1, 8, 6, 7), torch.randn(1, 8, 5, 5)
    tangent = torch.randn_like(query)
    index = search(query.bfloat16(), key.bfloat16()).index

    def oracle(q: Tensor) -> Tensor:
        products = scores_at(q, key.bfloat16().double(), index, normalize="none")
        q_norm, k_norm = (
            torch.nn.functional.unfold(x, 3, padding=1).norm(dim=1)
            for x in (q, key.bfloat16().double())
        )
        return products / q_norm.view_as(products) / k_norm[0][index]

    def ours(q: Tensor) -> Tensor:
        return search(q, key.bfloat16()).score

    actual = torch.func.jvp(ours, (query.bfloat16(),), (tangent.bfloat16(),))[1]
    rounded = query.bfloat16().double(), tangent.bfloat16().double()
    expected = torch.func.jvp(oracle, rounded[:1], rounded[1:])[1]
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-3)


def test_what_has_no_derivative_says_so(backend):
    query, key = doubles(1, 2, 5, 6), doubles(1, 2, 4, 5)
    index = search(query, key, backend=backend).index

    ones = torch.ones_like(query)

    def loss(q: Tensor) -> Tensor:
        return search(q, key, backend=backend).score.square().sum()

    for twice in (
        lambda: torch.func.jvp(torch.func.grad(loss), (query,), (ones,)),
        lambda: torch.func.grad(lambda q: torch.func.grad(loss)(q).sum())(query),
        lambda: torch.func.jvp(lambda q: torch.func.jvp(loss, (q,), (q,))[1], (query,), (ones,)),
    ):
        with pytest.raises(RuntimeError, match="second derivatives of search and gather_fold"):
            twice()
    # Before torch 2.6 PyTorch refuses first, in its own words.
    ops = torch.ops.ttsr_fast
    refusal = "have no forward-mode derivative|must implement the jvp function"
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        for call in (
            lambda: ops.search(dual, key, None, 3, 1, "both", 1e-12, False, "fp64", backend),
            lambda: ops.gather_dot([key], [dual], index, [1], 3, 1, "area", backend),
            lambda: ops.gather_fold(
                [key, dual[..., :4, :5]], index, None, [1, 1], 3, 1, "area", backend
            ),
        ):
            with pytest.raises(RuntimeError, match=refusal):
                call()


def test_compiled_function_under_a_transform():
    query, key = torch.randn(1, 2, 5, 6), torch.randn(1, 2, 4, 5)
    tangent = torch.randn_like(query)

    def tangent_of(q: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: search(x, key).score, (q,), (tangent,))[1]

    expected = tangent_of(query)
    torch._dynamo.reset()
    actual = torch.compile(tangent_of, backend="aot_eager")(query)
    torch.testing.assert_close(actual, expected)


def test_meta_tensors():
    query, key = torch.empty(2, 4, 6, 7, device="meta"), torch.empty(1, 4, 5, 8, device="meta")
    score, index = search(query, key, kernel_size=5, padding=0)
    assert (score.shape, score.dtype, score.device.type) == ((2, 2, 3), torch.float32, "meta")
    assert (index.shape, index.dtype, index.device.type) == ((2, 2, 3), torch.int64, "meta")
    value = torch.empty(1, 3, 10, 17, dtype=torch.float16, device="meta")
    out = gather_fold(value, index, stride=2, kernel_size=5, padding=0)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 12, 14), torch.float16, "meta")
