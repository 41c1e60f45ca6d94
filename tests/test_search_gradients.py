"""Gradients of `search` against finite differences and the oracle's, on every backend."""

import pytest
import torch

from tests import cases
from tests.checks import assert_no_worse, scores_at
from ttsr_fast import reference, search


def features(shapes, dtype=torch.float32):
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in shapes]


def assert_gradients(grads, query, key, index, grad_score, **options):
    """Gradients as good as PyTorch's own, for the choice that was made."""
    results = []
    for dtype in (torch.float64, query.dtype):
        q, k = (x.detach().to(dtype).requires_grad_() for x in (query, key))
        score = scores_at(q, k, index, **options)
        results.append(torch.autograd.grad(score, (q, k), grad_score.to(dtype)))
    for actual, expected, baseline in zip(grads, *results, strict=True):
        assert_no_worse(actual, expected, baseline)


GRADIENT_SHAPES = {
    "batch": ((2, 2, 4, 5), (2, 2, 5, 4)),
    "one_key": ((2, 3, 4, 3), (1, 3, 3, 5)),
}


@pytest.mark.double
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize("shapes", GRADIENT_SHAPES.values(), ids=GRADIENT_SHAPES)
def test_gradcheck(backend, shapes, normalize):
    query, key = (x.requires_grad_() for x in features(shapes, dtype=torch.float64))

    def score(q, k):
        return search(q, k, normalize=normalize, backend=backend).score

    assert torch.autograd.gradcheck(score, (query, key))


@pytest.mark.double
@pytest.mark.parametrize("add_eps", [False, True])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_gradcheck_across_eps(backend, normalize, add_eps):
    """Norms on both sides of eps."""
    query, key = features(((1, 2, 5, 6), (1, 2, 4, 7)), dtype=torch.float64)
    for x in (query, key):
        x[..., :3] *= 0.1
    query.requires_grad_(), key.requires_grad_()
    norm = torch.nn.functional.unfold(query, 3, padding=1).norm(dim=1)
    assert (norm < 2).any() and (norm > 2).any()

    def score(q, k):
        options = {"normalize": normalize, "eps": 2.0, "add_eps": add_eps}
        return search(q, k, backend=backend, **options).score

    assert torch.autograd.gradcheck(score, (query, key))


@pytest.mark.double
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize("add_eps", [False, True])
@pytest.mark.parametrize(("kernel_size", "padding"), cases.PATCHES)
def test_gradients_of_options(backend, kernel_size, padding, normalize, add_eps):
    options = {"kernel_size": kernel_size, "padding": padding, "normalize": normalize}
    options |= {"eps": 1e-3, "add_eps": add_eps}
    query, key = features(((2, 3, 8, 9), (1, 3, 9, 11)), dtype=torch.float64)
    query[0, :, :5, :4] = 0
    query.requires_grad_(), key.requires_grad_()
    mask = torch.rand(1, *(n + 2 * padding - kernel_size + 1 for n in key.shape[2:])) < 0.5
    score = search(query, key, key_mask=mask, backend=backend, **options).score
    grad_score = torch.randn_like(score)
    actual = torch.autograd.grad(score, (query, key), grad_score)
    score, _ = reference.search(query, key, mask, **options)
    expected = torch.autograd.grad(score, (query, key), grad_score)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "surrounded", "transposed"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_gradients_of_dtypes(backend, normalize, layout, dtype):
    query, key = features(((2, 32, 7, 9), (1, 32, 8, 6)), dtype=dtype)
    q, k = (cases.LAYOUTS[layout](x).requires_grad_() for x in (query, key))
    match = search(q, k, normalize=normalize, backend=backend)
    grad_score = torch.randn_like(match.score)
    grads = torch.autograd.grad(match.score, (q, k), grad_score)
    assert_gradients(grads, query, key, match.index, grad_score, normalize=normalize)


@pytest.mark.double
def test_gradient_of_one_input_only(backend):
    query, key = features(((1, 3, 5, 6), (1, 3, 4, 7)), dtype=torch.float64)
    q, k = (x.clone().requires_grad_() for x in (query, key))
    both = torch.autograd.grad(search(q, k, backend=backend).score.sum(), (q, k))
    alone = torch.autograd.grad(search(q, key, backend=backend).score.sum(), q)
    assert torch.equal(alone[0], both[0])
    alone = torch.autograd.grad(search(query, k, backend=backend).score.sum(), k)
    assert torch.equal(alone[0], both[1])
    match = search(q, k, backend=backend)
    assert match.score.requires_grad and not match.index.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_gradient_beside_a_masked_nan(backend, bad):
    query, key = features(((1, 3, 5, 6), (1, 3, 7, 9)))
    key[0, 1, 3, 4] = bad
    mask = torch.ones(1, 7, 9, dtype=torch.bool)
    mask[0, 2:5, 3:6] = False
    query.requires_grad_()
    search(query, key, key_mask=mask, backend=backend).score.sum().backward()
    clean = query.detach().clone().requires_grad_()
    search(clean, key.nan_to_num(0, 0, 0), key_mask=mask, backend=backend).score.sum().backward()
    torch.testing.assert_close(query.grad, clean.grad, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_torch_backend_on_cuda(dtype):
    query, key = features(((2, 64, 13, 17), (1, 64, 11, 19)), dtype=dtype)
    q, k = (x.cuda().requires_grad_() for x in (query, key))
    match = search(q, k, backend="torch")
    grad_score = torch.randn(2, 13, 17)
    grads = torch.autograd.grad(match.score, (q, k), grad_score.to(match.score))
    assert_gradients(grads, query, key, match.index.to(query.device), grad_score)
