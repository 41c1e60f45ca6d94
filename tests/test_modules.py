"""`SearchTransfer` against the oracle's version of the same module."""

import itertools

import pytest
import torch

from tests import cases
from tests.checks import assert_no_worse, assert_same_choice
from ttsr_fast import Match, SearchTransfer, gather_fold, reference, search
from ttsr_fast.operators import backends, pytorch
from ttsr_fast.operators.index import InverseIndex

SIZES = {
    "square": ((2, 6, 5), (2, 6, 5), (0, 0)),
    "unequal": ((1, 7, 9), (1, 5, 8), (0, 0)),
    "odd_reference": ((2, 5, 6), (2, 6, 4), (3, 2)),
    "one_reference": ((3, 4, 5), (1, 6, 7), (1, 3)),
}


ops = torch.ops.ttsr_fast


def levels(query_size, key_size, rest, dtype=torch.float64):
    """lrsr_lv3, refsr_lv3, ref_lv1, ref_lv2, ref_lv3; with `rest` more rows and columns in lv1."""
    (n, h, w), (n_k, hk, wk), (rows, columns) = query_size, key_size, rest
    sizes = [
        (n, 8, h, w),
        (n_k, 8, hk, wk),
        (n_k, 2, 4 * hk + rows, 4 * wk + columns),
        (n_k, 4, 2 * hk + rows // 2, 2 * wk + columns // 2),
        (n_k, 8, hk, wk),
    ]
    return [torch.randn(size, dtype=dtype).relu().requires_grad_() for size in sizes]


@pytest.mark.double
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_equals_the_oracle(backend, sizes):
    inputs = levels(*sizes)
    actual = SearchTransfer(backend=backend)(*inputs)
    expected = reference.search_transfer(*inputs)
    grads = [torch.randn_like(x) for x in expected]
    actual_grads = torch.autograd.grad(actual, inputs, grads)
    expected_grads = torch.autograd.grad(expected, inputs, grads)
    pairs = zip((*actual, *actual_grads), (*expected, *expected_grads), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@pytest.mark.double
@pytest.mark.parametrize("masks", [1, 3])
def test_masked_keys_are_never_matched(backend, masks):
    """Results and gradients are those of a reference that ends where the mask does.

    There its padding begins: a column of zeros. Behind it lies what is searched for.
    """
    inputs = [x.detach() for x in levels((3, 4, 5), (3, 4, 10), (0, 0))]
    few = [x[..., : 4 * x.shape[3] // 10].clone() for x in inputs[1:]]
    for x, kept in zip(inputs[1:], few, strict=True):
        x[..., kept.shape[3] : 5 * x.shape[3] // 10] = 0
    inputs[1][..., 5:] = inputs[0]
    key_mask = torch.ones(masks, 4, 10, dtype=torch.bool)
    key_mask[..., 4:] = False
    few = [x.requires_grad_() for x in (inputs[0].clone(), *few)]
    inputs = [x.requires_grad_() for x in inputs]
    actual, expected = (
        SearchTransfer(backend=backend)(*inputs, key_mask=key_mask),
        reference.search_transfer(*few),
    )
    assert (SearchTransfer(backend=backend)(*inputs)[0] > actual[0]).any()
    grads = [torch.randn_like(x) for x in expected]
    pairs = zip(
        (*actual, *torch.autograd.grad(actual, inputs, grads)),
        (*expected, *torch.autograd.grad(expected, few, grads)),
        strict=True,
    )
    for x, y in pairs:
        torch.testing.assert_close(x[..., : y.shape[3]], y, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        (
            (1, 5, 7),
            torch.bool,
            ValueError,
            r"key_mask must be \[1 or 1, 5, 8\] .*, got \[1, 5, 7\]",
        ),
        (
            (2, 5, 8),
            torch.bool,
            ValueError,
            r"key_mask must be \[1 or 1, 5, 8\] .*, got \[2, 5, 8\]",
        ),
        ((1, 5, 8), torch.float32, TypeError, "key_mask must be a bool tensor, got torch.float32"),
    ],
)
def test_masks_that_are_refused(shape, dtype, error, message):
    with pytest.raises(error, match=message):
        SearchTransfer()(*levels(*SIZES["unequal"]), key_mask=torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_dtypes(backend, dtype):
    inputs = levels(*SIZES["odd_reference"], dtype=dtype)
    query, key, *values = (x.detach() for x in inputs)
    score, *textures = SearchTransfer(backend=backend)(*inputs)
    assert score.shape == (2, 1, 5, 6) and score.dtype == dtype

    expected, index = reference.search(query.double(), key.double())
    if dtype == torch.float32:
        assert_same_choice(Match(score[:, 0], index), query, key)
    assert_no_worse(
        score[:, 0], expected, reference.search(query.float(), key.float())[0].to(dtype)
    )
    for texture, value, stride in zip(textures, values[::-1], (1, 2, 4), strict=True):
        results = (reference.gather_fold(v, index, stride=stride) for v in (value.double(), value))
        assert_no_worse(texture, *results)


def test_precision_and_backend_are_passed_on(backend):
    inputs = [x.float() for x in levels(*SIZES["unequal"])]
    module = SearchTransfer(precision="bf16", backend=backend)
    score = module(*inputs)[0]
    expected = SearchTransfer(backend=backend)(*(x.bfloat16() for x in inputs))[0]
    torch.testing.assert_close(score, expected.float(), rtol=0.01, atol=0.01)
    assert repr(module) == f"SearchTransfer(precision='bf16', backend={backend!r})"
    assert not list(module.parameters()) and not module.state_dict()
    with pytest.raises(ValueError, match="precision"):
        SearchTransfer(precision="fp8")(*inputs)
    with pytest.raises(ValueError, match="backend"):
        SearchTransfer(backend="cuda")(*inputs)


@pytest.mark.parametrize(
    ("position", "name", "crop"), [(2, "ref_lv1", 1), (3, "ref_lv2", 1), (4, "ref_lv3", 1)]
)
def test_sizes_that_do_not_fit(position, name, crop):
    inputs = levels(*SIZES["square"])
    inputs[position] = inputs[position][..., crop:]
    with pytest.raises(ValueError, match=f"{name} .* size of key"):
        SearchTransfer()(*inputs)


def test_one_row_too_many():
    inputs = levels((1, 4, 4), (1, 5, 5), (3, 3))
    inputs[2] = torch.zeros(1, 2, 24, 20)
    with pytest.raises(ValueError, match="ref_lv1 .* up to 3 more rows and columns"):
        SearchTransfer()(*inputs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_is_search_and_gather_fold(backend, layout):
    """The same numbers, bit by bit, and the same gradients."""
    inputs = [cases.LAYOUTS[layout](x.detach().float()) for x in levels(*SIZES["odd_reference"])]
    inputs = [x.requires_grad_() for x in inputs]
    query, key, *values = inputs
    match = search(query, key, backend=backend)
    expected = [match.score.unsqueeze(1)]
    for value, stride in zip(values[::-1], (1, 2, 4), strict=True):
        expected.append(gather_fold(value, match.index, stride=stride, backend=backend))
    actual = SearchTransfer(backend=backend)(*inputs)
    grads = [torch.randn_like(x) for x in expected]
    pairs = zip(
        (*actual, *torch.autograd.grad(actual, inputs, grads)),
        (*expected, *torch.autograd.grad(expected, inputs, grads)),
        strict=True,
    )
    for x, y in pairs:
        assert torch.equal(x, y) and x.stride() == y.stride()


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradients_that_are_needed(backend, needed):
    """Of query, key and values, each with or without the others."""
    inputs = [x.detach().float() for x in levels(*SIZES["one_reference"])]
    wanted = [inputs[i] for i, need in enumerate((*needed[:2], *[needed[2]] * 3)) if need]
    for x in wanted:
        x.requires_grad_()
    actual, expected = SearchTransfer(backend=backend)(*inputs), reference.search_transfer(*inputs)
    grads = [torch.randn_like(x) for x in expected]
    used = [n for n, x in enumerate(expected) if x.requires_grad]
    results = (
        torch.autograd.grad([out[n] for n in used], wanted, [grads[n] for n in used])
        for out in (actual, expected)
    )
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_only_one_output_is_used(backend):
    inputs = levels(*SIZES["unequal"], dtype=torch.float32)
    texture = SearchTransfer(backend=backend)(*inputs)[2]
    expected = reference.search_transfer(*inputs)[2]
    grad = torch.randn_like(texture)
    (x,), (y,) = (torch.autograd.grad(out, inputs[3], grad) for out in (texture, expected))
    torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_opcheck(backend):
    inputs = levels(*SIZES["odd_reference"], dtype=torch.float32)
    query, key, *values = inputs
    strides = [4, 2, 1]
    for key_mask in (torch.rand(1, *key.shape[2:]) < 0.5, None):
        arguments = (query, key, key_mask, 3, 1, "both", 1e-12, False, "fp32", backend)
        results = torch.library.opcheck(ops.search, arguments)
        assert set(results.values()) == {"SUCCESS"}
    _, index = ops.search(*arguments)
    transfer = (strides, 3, 1, "area", backend)
    results = torch.library.opcheck(ops.gather_fold, (values, index, None, *transfer))
    assert set(results.values()) == {"SUCCESS"}
    for needed in ([0, 1, 2], [0, 2]):
        chosen = [values[level].detach() for level in needed]
        grads = [
            torch.randn(len(query), x.shape[1], *(strides[level] * n for n in query.shape[2:]))
            for x, level in zip(chosen, needed, strict=True)
        ]
        sizes = [n for value in chosen for n in value.shape]
        transfer = ([strides[level] for level in needed], 3, 1, "area", backend)
        arguments = (grads, index, None, sizes, *transfer)
        results = torch.library.opcheck(
            ops.gather_fold_adjoint, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert set(results.values()) == {"SUCCESS"}


def test_gradients_of_some_levels_alone(backend):
    query, key, *values = levels(*SIZES["odd_reference"])
    module = SearchTransfer(backend=backend)
    grads = [torch.randn_like(x) for x in module(query, key, *values)]
    every = torch.autograd.grad(module(query, key, *values), (query, key, *values), grads)
    for needed in ([1, 2, 4], [3]):
        inputs = [x.detach() for x in (query, key, *values)]
        some = [inputs[n].requires_grad_() for n in needed]
        out, of = module(*inputs), grads
        if needed == [3]:
            out, of = out[2:3], grads[2:3]
        for n, grad in zip(needed, torch.autograd.grad(out, some, of), strict=True):
            torch.testing.assert_close(grad, every[n], rtol=0, atol=0)


@pytest.mark.torch(2, 6)
def test_compiled_without_graph_breaks(backend):
    torch._dynamo.reset()
    inputs = levels(*SIZES["square"], dtype=torch.float32)
    module = SearchTransfer(backend=backend)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), module(*inputs)
    grads = [torch.randn_like(x) for x in expected]
    results = ((*out, *torch.autograd.grad(out, inputs, grads)) for out in (actual, expected))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_autocast(backend):
    """The search may round its features; values keep their dtype."""
    inputs = levels(*SIZES["square"], dtype=torch.float32)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        score, *textures = SearchTransfer(backend=backend)(*inputs)
    expected = SearchTransfer(precision="bf16", backend=backend)(*inputs)
    for x, y in zip((score, *textures), expected, strict=True):
        assert x.dtype == torch.float32 and torch.equal(x, y)


def test_values_of_other_dtypes_and_batches(backend):
    inputs = [x.detach() for x in levels((2, 5, 6), (2, 4, 3), (0, 0), dtype=torch.float32)]
    inputs[2], inputs[3] = inputs[2].double(), inputs[3][:1].half()
    inputs = [x.requires_grad_() for x in inputs]
    out = SearchTransfer(backend=backend)(*inputs)
    assert [x.dtype for x in out[1:]] == [torch.float32, torch.float16, torch.float64]
    _, index = reference.search(inputs[0], inputs[1])
    for texture, value, stride in zip(out[1:], inputs[:1:-1], (1, 2, 4), strict=True):
        expected = reference.gather_fold(value, index, stride=stride)
        torch.testing.assert_close(texture, expected, rtol=2e-3, atol=2e-3)
        grad = torch.randn_like(expected)
        (x,), (y,) = (
            torch.autograd.grad(o, value, grad, retain_graph=True) for o in (texture, expected)
        )
        torch.testing.assert_close(x, y, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        (2, lambda x: x.long(), TypeError, "ref_lv1 must be a float64, .* got torch.int64"),
        (3, lambda x: x[0], ValueError, r"ref_lv2 must be \[N, C, H, W\]"),
        (4, lambda x: x.to("meta"), ValueError, r"ref_lv3 must be on \S+ like query, got meta"),
        (4, lambda x: x.expand(3, -1, -1, -1), ValueError, "ref_lv3 must have batch size 1 or 2"),
    ],
)
def test_values_that_are_refused(position, change, error, message):
    inputs = [x.detach()[:1] for x in levels(*SIZES["square"])]
    inputs[0] = inputs[0].repeat(2, 1, 1, 1)
    inputs[position] = change(inputs[position])
    with pytest.raises(error, match=message):
        SearchTransfer()(*inputs)


def test_index_is_sorted_once_for_each_operation(backend, monkeypatch):
    """For the three levels, and for the gradient to the key, whose norms need it as well."""
    module = backends.MODULES[backend]
    module = module if hasattr(module, "gather_fold_adjoint") else pytorch
    sorts, run = [], module.gather_fold_adjoint
    sort = InverseIndex._sort

    def counted(self, keys, groups):
        sorts.append((keys, groups))
        return sort(self, keys, groups)

    def adjoint(grads, inverse, *rest):
        inverse.csr(35, len(grads[0]))
        run(grads, inverse, *rest)

    monkeypatch.setattr(InverseIndex, "_sort", counted)
    monkeypatch.setattr(module, "gather_fold_adjoint", adjoint)
    inputs = levels((2, 5, 6), (2, 5, 7), (0, 0), dtype=torch.float32)
    out = SearchTransfer(backend=backend)(*inputs)
    torch.autograd.grad([x.sum() for x in out], inputs)
    assert sorts == [(35, 2)] * 2
