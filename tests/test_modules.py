"""`SearchTransfer` against the oracle's version of the same module."""

import pytest
import torch

from tests import cases
from tests.checks import assert_no_worse, assert_same_choice
from ttsr_fast import Match, SearchTransfer, reference

SIZES = {
    "square": ((2, 6, 5), (2, 6, 5), (0, 0)),
    "unequal": ((1, 7, 9), (1, 5, 8), (0, 0)),
    "odd_reference": ((2, 5, 6), (2, 6, 4), (3, 2)),
    "one_reference": ((3, 4, 5), (1, 6, 7), (1, 3)),
}


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
