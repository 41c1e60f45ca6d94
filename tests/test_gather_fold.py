"""`gather_fold`, its adjoint and its inner product against the oracle, on every backend."""

import pytest
import torch

from tests import cases
from tests.checks import assert_no_worse
from ttsr_fast import gather_fold, reference

PATCH_OPTIONS = [(k, p, s) for k, p in cases.PATCHES for s in (1, 2)]


@pytest.fixture
def backend(backend):
    """On a GPU Triton only searches: there the compiled library is to run, and not PyTorch."""
    on_gpu = torch.get_default_device().type == "cuda"
    return "cpp" if on_gpu and backend == "triton" else backend


def oracle(value, index, weight=None, *, grad=None, **options):
    """The result in float64 and in the dtype of `value`; with `grad`, all gradients instead."""
    results = []
    for dtype in (torch.float64, value.dtype):
        v = value.detach().to(dtype).requires_grad_()
        w = None if weight is None else weight.detach().to(dtype).requires_grad_()
        out = reference.gather_fold(v, index, w, **options)
        if grad is not None:
            inputs = (v,) if w is None else (v, w)
            results.append(torch.autograd.grad(out, inputs, grad.to(dtype)))
        else:
            results.append(out.detach())
    return results


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shapes", cases.TRANSFER_SHAPES.values(), ids=cases.TRANSFER_SHAPES)
def test_shapes_and_dtypes(backend, shapes, dtype):
    value_size, index_size, stride = shapes
    value = torch.randn(value_size).to(dtype)
    index = cases.random_index(value_size, index_size, stride)
    out = gather_fold(value, index, stride=stride, backend=backend)
    assert_no_worse(out, *oracle(value, index, stride=stride))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shapes", cases.TRANSFER_SHAPES.values(), ids=cases.TRANSFER_SHAPES)
def test_gradients_of_shapes_and_dtypes(backend, shapes, dtype):
    value_size, index_size, stride = shapes
    value = torch.randn(value_size).to(dtype).requires_grad_()
    index = cases.random_index(value_size, index_size, stride)
    weight = torch.rand(index_size).to(dtype).requires_grad_()
    out = gather_fold(value, index, stride=stride, weight=weight, backend=backend)
    grad = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, (value, weight), grad)
    expected, baseline = oracle(value, index, weight, grad=grad, stride=stride)
    for name, *three in zip(("value", "weight"), actual, expected, baseline, strict=True):
        assert three[0].dtype == dtype, name
        assert_no_worse(*three)


@pytest.mark.parametrize("divisor", cases.DIVISORS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(("kernel_size", "padding", "stride"), PATCH_OPTIONS)
def test_options(backend, kernel_size, padding, stride, weighted, divisor):
    options = {"stride": stride, "kernel_size": kernel_size, "padding": padding}
    value_size = (2, 3, 8 * stride + stride // 2, 9 * stride)
    value = torch.randn(value_size, dtype=torch.float64, requires_grad=True)
    index = cases.random_index(value_size, (2, 7, 8), **options)
    weight = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True) if weighted else None
    options["divisor"] = divisor
    out = gather_fold(value, index, weight=weight, backend=backend, **options)
    torch.testing.assert_close(out, oracle(value, index, weight, **options)[0], rtol=0, atol=1e-12)

    grad = torch.randn_like(out)
    inputs = (value, weight) if weighted else (value,)
    actual = torch.autograd.grad(out, inputs, grad)
    for x, y in zip(actual, oracle(value, index, weight, grad=grad, **options)[0], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout, dtype):
    value = cases.LAYOUTS[layout](torch.randn(2, 6, 10, 15).to(dtype)).requires_grad_()
    index = cases.random_index((2, 6, 10, 15), (2, 4, 6), 2).mT
    weight = torch.rand(2, 4, 6).mT
    out = gather_fold(value, index, stride=2, weight=weight, backend=backend)
    assert_no_worse(out, *oracle(value, index, weight, stride=2))
    last = layout == "channels_last"
    assert out.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    grad = cases.LAYOUTS[layout](torch.randn(out.shape).to(dtype))
    (actual,) = torch.autograd.grad(out, value, grad)
    expected, baseline = oracle(value, index, weight, grad=grad, stride=2)
    assert_no_worse(actual, expected[0], baseline[0])


@pytest.mark.parametrize("weight_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_weight_of_another_dtype(backend, dtype, weight_dtype):
    value = torch.randn(1, 5, 6, 7).to(dtype).requires_grad_()
    index = cases.random_index((1, 5, 6, 7), (1, 5, 4), 1)
    weight = torch.rand(1, 5, 4).to(weight_dtype).requires_grad_()
    out = gather_fold(value, index, weight=weight, backend=backend)
    assert_no_worse(out, *oracle(value, index, weight))
    grad = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, (value, weight), grad)
    expected, baseline = oracle(value, index, weight, grad=grad)
    assert_no_worse(actual[0], expected[0], baseline[0])
    assert actual[1].dtype == weight_dtype
    assert_no_worse(actual[1], expected[1], baseline[1].to(weight_dtype))


@pytest.mark.parametrize("divisor", cases.DIVISORS)
@pytest.mark.parametrize("value_batch", [1, 2])
def test_gradcheck(backend, value_batch, divisor):
    value_size = (value_batch, 2, 7, 9)
    value = torch.randn(value_size, dtype=torch.float64, requires_grad=True)
    index = cases.random_index(value_size, (2, 3, 4), 2)
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def transfer(v, w):
        return gather_fold(v, index, stride=2, weight=w, divisor=divisor, backend=backend)

    assert torch.autograd.gradcheck(transfer, (value, weight))


@pytest.mark.parametrize("divisor", cases.DIVISORS)
@pytest.mark.parametrize(("kernel_size", "padding", "stride"), [(1, 0, 2), (3, 1, 4), (5, 1, 1)])
def test_adjoint_identity(backend, kernel_size, padding, stride, divisor):
    """<gather_fold(v), g> = <v, adjoint(g)> = <weight, gather_dot(v, g)>."""
    value_size = (1, 3, 7 * stride + stride // 2, 6 * stride)
    value = torch.randn(value_size, dtype=torch.float64)
    index = cases.random_index(value_size, (2, 6, 5), stride, kernel_size, padding)
    weight = torch.randn(2, 6, 5, dtype=torch.float64)
    ops, options = torch.ops.ttsr_fast, ([stride], kernel_size, padding, divisor, backend)
    (out,) = ops.gather_fold([value], index, weight, *options)
    grad = torch.randn_like(out)
    product = (out * grad).sum()
    (adjoint,) = ops.gather_fold_adjoint([grad], index, weight, list(value_size), *options)
    torch.testing.assert_close((value * adjoint).sum(), product, rtol=1e-12, atol=0)
    dot = ops.gather_dot([value], [grad], index, *options)
    torch.testing.assert_close((weight * dot).sum(), product, rtol=1e-12, atol=0)


def test_exact_on_integers(backend):
    """No rounding anywhere in float32 or float64, so the results are equal bit by bit."""
    value = cases.integers(1, 9, 10, 14)
    index = cases.random_index((1, 9, 10, 14), (2, 6, 5), 2)
    for dtype in (torch.float32, torch.float64):
        options = {"stride": 2, "divisor": "none"}
        out = gather_fold(value.to(dtype), index, backend=backend, **options)
        assert torch.equal(out, reference.gather_fold(value.to(dtype), index, **options))


def test_identity_index_returns_the_value(backend):
    """Every patch at its own place: with the true overlap, the value itself."""
    value = torch.randn(1, 3, 12, 14, dtype=torch.float64)
    index = torch.arange(42).view(1, 6, 7)
    out = gather_fold(value, index, stride=2, divisor="overlap", backend=backend)
    torch.testing.assert_close(out, value, rtol=0, atol=1e-14)
    out = gather_fold(value, index, stride=2, backend=backend)
    torch.testing.assert_close(out[..., 0, 0], value[..., 0, 0] * 4 / 9, rtol=0, atol=1e-14)
    torch.testing.assert_close(out[..., 4:6, 4:6], value[..., 4:6, 4:6], rtol=0, atol=1e-14)


def test_nan_reaches_only_the_patches_that_hold_it(backend):
    value = torch.randn(1, 3, 8, 9)
    value[0, 1, 4, 5] = float("nan")
    index = torch.zeros(1, 6, 7, dtype=torch.int64)
    index[0, 3, 3] = 3 * 9 + 4  # holds the NaN in its last row and column
    out = gather_fold(value, index, backend=backend)
    assert out.isnan().nonzero().tolist() == [[0, 1, 4, 4]]


def make_index(kind, n, h, w, keys):
    """A random key for every query, one after the other, one for all, or one for half of them."""
    if kind == "coherent":
        return torch.arange(n * h * w).view(n, h, w) % keys
    index = torch.randint(keys, (n, h, w))
    if kind == "same_key":
        index.fill_(keys // 2)
    if kind == "flat_areas":
        index[:, : h // 2] = keys // 2
    return index


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["random", "coherent", "same_key", "flat_areas"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bit_equal_twice_and_on_any_threads(backend, dtype, kind, layout, set_threads):
    value = cases.LAYOUTS[layout](torch.randn(1, 8, 58, 62).to(dtype))
    index = make_index(kind, 2, 61, 67, 29 * 31)
    weight = torch.rand(index.shape).to(dtype)
    grad = cases.LAYOUTS[layout](torch.randn(2, 8, 122, 134).to(dtype))
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        v, w = value.clone().requires_grad_(), weight.clone().requires_grad_()
        out = gather_fold(v, index, stride=2, weight=w, backend=backend)
        results.append((out, *torch.autograd.grad(out, (v, w), grad)))
    for other in results[1:]:
        for name, x, y in zip(("out", "value", "weight"), results[0], other, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("value_batch", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("stride", "channels"), [(1, 75), (2, 11), (3, 5), (4, 19)])
@pytest.mark.parametrize("kind", ["same_key", "flat_areas"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_many_queries_at_one_key(backend, dtype, kind, stride, channels, layout, value_batch):
    """Flat areas send hundreds of queries to one key; their sum stays accurate."""
    value = torch.randn(value_batch, channels, 6 * stride, 5 * stride).to(dtype)
    value = cases.LAYOUTS[layout](value).requires_grad_()
    index = make_index(kind, 2, 17, 33, 30)
    weight = torch.rand(index.shape)
    out = gather_fold(value, index, stride=stride, weight=weight, backend=backend)
    grad = cases.LAYOUTS[layout](torch.randn(out.shape).to(dtype))
    (actual,) = torch.autograd.grad(out, value, grad)
    expected, baseline = oracle(value, index, weight, grad=grad, stride=stride)
    assert_no_worse(actual, expected[0], baseline[0])


def test_exact_sums_of_any_number_of_queries(backend):
    """No query is lost or counted twice where a long sum is split."""
    numbers = torch.tensor([0, 1, 255, 256, 257, 512, 513, 769])
    index = torch.arange(8).repeat_interleave(numbers)
    index = index[torch.randperm(len(index))].view(1, 11, 233)
    value = torch.zeros(1, 3, 2, 4, requires_grad=True)
    options = {"kernel_size": 1, "divisor": "none"}
    out = gather_fold(value, index, backend=backend, **options)
    grad = cases.integers(*out.shape)
    (actual,) = torch.autograd.grad(out, value, grad)
    expected = oracle(value, index, grad=grad, **options, padding=0)[0][0]
    assert torch.equal(actual.double(), expected)


@pytest.mark.parametrize("keys", [1, 120])
def test_more_patches_than_are_listed_at_a_time(backend, keys):
    value = torch.randn(1, 1, 12, 10, dtype=torch.float64, requires_grad=True)
    index = torch.randint(keys, (1, 730, 760))
    out = gather_fold(value, index, backend=backend)
    assert_no_worse(out, *oracle(value, index))
    grad = torch.randn_like(out)
    (actual,) = torch.autograd.grad(out, value, grad)
    expected, baseline = oracle(value, index, grad=grad)
    assert_no_worse(actual, expected[0], baseline[0])


def test_uninitialised_workspace(backend):
    """PyTorch fills every fresh tensor with NaN here, also those of compiled code."""
    value = torch.randn(1, 5, 11, 13, requires_grad=True)
    index = cases.random_index((1, 5, 11, 13), (2, 6, 7), 2)
    weight = torch.rand(2, 6, 7, requires_grad=True)
    results = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        try:
            out = gather_fold(value, index, stride=2, weight=weight, backend=backend)
            results.append((out, *torch.autograd.grad(out.sum(), (value, weight))))
        finally:
            torch.use_deterministic_algorithms(False)
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value_batch", [0, 1])
def test_empty_batch(backend, value_batch):
    value = torch.randn(value_batch, 3, 6, 8, requires_grad=True)
    weight = torch.rand(0, 4, 5, requires_grad=True)
    index = torch.zeros(0, 4, 5, dtype=torch.int64)
    out = gather_fold(value, index, stride=2, weight=weight, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 3, 8, 10) and weight.grad.shape == weight.shape
    assert torch.equal(value.grad, torch.zeros_like(value))


def test_autocast_keeps_the_dtype(backend):
    value = torch.randn(1, 3, 6, 8, requires_grad=True)
    index = cases.random_index((1, 3, 6, 8), (1, 4, 5), 1)
    weight = torch.rand(1, 4, 5, requires_grad=True)
    expected = gather_fold(value, index, weight=weight, backend=backend)
    with torch.autocast(value.device.type, torch.bfloat16):
        out = gather_fold(value, index, weight=weight, backend=backend)
    assert out.dtype == torch.float32 and torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_torch_backend_on_cuda(dtype):
    value = torch.randn(1, 16, 27, 21).to(dtype)
    index = cases.random_index((1, 16, 27, 21), (2, 9, 11), 2)
    weight = torch.rand(index.shape).to(dtype)
    v, w = (x.cuda().requires_grad_() for x in (value, weight))
    out = gather_fold(v, index.cuda(), stride=2, weight=w, backend="torch")
    assert_no_worse(out, *oracle(value, index, weight, stride=2))
    grad = torch.randn(out.shape).to(dtype)
    actual = torch.autograd.grad(out, (v, w), grad.cuda())
    for three in zip(actual, *oracle(value, index, weight, grad=grad, stride=2), strict=True):
        assert_no_worse(*three)


def test_picture_with_channels_last_whose_blocks_are_cut(backend):
    """Padding such a view changes its layout, because of the stride of its batch of one."""
    value = torch.randn(5, 7, 3).permute(2, 0, 1).unsqueeze(0)
    index = torch.randint(6, (1, 4, 5))
    out = gather_fold(value, index, stride=2, backend=backend)
    torch.testing.assert_close(out, reference.gather_fold(value, index, stride=2))
