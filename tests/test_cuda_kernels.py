"""The CUDA kernels of the transfer on the CPU, emulated thread by thread (see `emulated`).

The tests of `gather_fold` and `SearchTransfer`, with these kernels in place of the CPU kernels, and
tests of CUDA alone: order of threads, long lists, indices outside the key grid.
"""

import itertools

import pytest
import torch

from tests import cases, checks
from tests.checks import assert_no_worse
from tests.test_gather_fold import (  # noqa: F401  # run with the CUDA kernels
    oracle,
    test_adjoint_identity,
    test_empty_batch,
    test_exact_on_integers,
    test_gradcheck,
    test_gradients_of_shapes_and_dtypes,
    test_identity_index_returns_the_value,
    test_layouts,
    test_nan_reaches_only_the_patches_that_hold_it,
    test_options,
    test_picture_with_channels_last_whose_blocks_are_cut,
    test_shapes_and_dtypes,
    test_uninitialised_workspace,
    test_weight_of_another_dtype,
)
from tests.test_modules import test_dtypes, test_equals_the_oracle  # noqa: F401  # likewise
from ttsr_fast import gather_fold, reference
from ttsr_fast.operators import cpp
from ttsr_fast.operators.index import CHECK_INDEX_VARIABLE, InverseIndex
from ttsr_fast.operators.patch import Patch, Transfer

each = pytest.mark.parametrize


@pytest.fixture
def backend(emulator, monkeypatch):
    """Backend `cpp` with the transfer of the CUDA library."""
    monkeypatch.setattr(cpp, "gather_fold", cpp.cuda_gather_fold)
    monkeypatch.setattr(cpp, "_cpu_adjoint", cpp.cuda_gather_fold_adjoint)
    monkeypatch.setattr(torch.ops.ttsr_fast, "cpp_gather_dot", cpp.cuda_gather_dot)
    return "cpp"


def transfer_and_gradients(value, index, weight, grad, **options):
    v, w = value.clone().requires_grad_(), weight.clone().requires_grad_()
    out = gather_fold(v, index, weight=w, **options)
    return out.detach(), *torch.autograd.grad(out, (v, w), grad)


@each("kind", ["random", "coherent", "same_key"])
@each("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_does_not_depend_on_the_order_of_threads(backend, emulator, dtype, kind):
    n, h, w, keys = 2, 9, 11, 35
    index = {
        "random": torch.randint(keys, (n, h, w)),
        "coherent": torch.arange(n * h * w).view(n, h, w) % keys,
        "same_key": torch.full((n, h, w), keys // 2),
    }[kind]
    value, grad = torch.randn(1, 16, 10, 14).to(dtype), torch.randn(n, 16, 18, 22).to(dtype)
    weight = torch.rand(index.shape)
    results = []
    try:
        for order in (0, 1, 7):
            emulator.emulator_set_order(order)
            results.append(transfer_and_gradients(value, index, weight, grad, stride=2))
    finally:
        emulator.emulator_set_order(0)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@each("layout", ["contiguous", "channels_last"])
@each("stride", [1, 4])
@each("dtype", cases.DTYPES, ids=str)
def test_long_lists_beside_short_ones(backend, dtype, stride, layout):
    """Neighbouring blocks of one thread block, some with lists that all warps share."""
    value = cases.LAYOUTS[layout](torch.randn(1, 8, 3 * stride, 13 * stride).to(dtype))
    index = torch.randint(39, (3, 10, 12))
    index[:, ::2] = 6
    index[1, 1::2] = 21
    index[2, 3] = 25
    grad = cases.LAYOUTS[layout](torch.randn(3, 8, 10 * stride, 12 * stride).to(dtype))
    value.requires_grad_()
    out = gather_fold(value, index, stride=stride, backend=backend)
    (actual,) = torch.autograd.grad(out, value, grad)
    expected, baseline = oracle(value, index, grad=grad, stride=stride)
    assert_no_worse(actual, expected[0], baseline[0])


@each(("query", "key"), list(itertools.product([(1, 1), (1, 2), (2, 1), (2, 2)], [(1, 2), (2, 2)])))
def test_every_index_of_small_grids(backend, query, key):
    """Every index is one image of a batch. Forward, and the gradient of the value."""
    keys, queries = key[0] * key[1], query[0] * query[1]
    index = torch.tensor(list(itertools.product(range(keys), repeat=queries))).view(-1, *query)
    value = torch.randn(len(index), 4, *key, dtype=torch.float64, requires_grad=True)
    out = gather_fold(value, index, backend=backend)
    expected = reference.gather_fold(value, index)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    grad = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(x, value, grad)[0] for x in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)


@each("outside", [-1, 12, 2**40, -(2**40), 2**63 - 1, -(2**63)])
def test_index_outside_the_grid(backend, monkeypatch, outside):
    """The check stops the kernel. Without it the patch adds nothing."""
    value = cases.LAYOUTS["surrounded"](torch.randn(1, 3, 4, 4)).permute(0, 3, 1, 2)
    assert value.stride(1) == 1, "read in place, with NaN around"
    index = torch.randint(12, (1, 2, 5))
    index[0, 1, 2] = outside
    out, weight = torch.empty(1, 4, 2, 5), (index != outside).double()
    options = ([value], index, None, [out], Transfer([1], Patch(), "area"))
    with pytest.raises(RuntimeError, match="index outside the key grid"):
        cpp.cuda_gather_fold(*options)
    monkeypatch.setenv(CHECK_INDEX_VARIABLE, "0")
    cpp.cuda_gather_fold(*options)
    expected = reference.gather_fold(value.double(), index.clamp(0, 11), weight)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)

    grad, dot = torch.randn(1, 4, 2, 5), torch.empty(index.shape)
    cpp.cuda_gather_dot(value, grad, index, dot, 1, 3, 1, 3, 4, "area")
    clamped = index.clamp(0, 11)
    expected = checks.dot(value.double(), grad.double(), clamped) * weight
    torch.testing.assert_close(dot.double(), expected, rtol=0, atol=1e-5)


def test_arguments_that_would_reach_outside(backend):
    """Calls that the Python layers reject earlier."""
    value, index = torch.randn(1, 4, 9, 9), torch.zeros(1, 9, 9, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="kernel_size must be 1, 3, 5 or 7, got 9"):
        torch.ops.ttsr_fast.gather_fold([value], index, None, [1], 9, 4, "area", backend)
    maps = value.contiguous(memory_format=torch.channels_last)
    offsets, indices = InverseIndex(index).csr(81, 1)
    run, end = torch.ops.ttsr_fast.cuda_gather_fold_adjoint, (3, 1, 9, 9, "area")
    out = torch.empty_like(value)
    run([maps], index, offsets, indices, None, [out], [1], *end)
    torch.testing.assert_close(out, checks.adjoint(value, index, None, [1, 4, 9, 9]))
    for broken, message in (
        (
            (index, offsets[:-1], indices, None, [out], [1]),
            r"csr_offsets must be \[82\], got \[81\]",
        ),
        ((index, offsets.long(), indices, None, [out], [1]), "csr_offsets must be Int, got Long"),
        (
            (index, offsets, indices[:-1], None, [out], [1]),
            r"csr_indices must be \[81\], got \[80\]",
        ),
        ((index[:, 1:], offsets, indices, None, [out], [1]), "must be contiguous|gradient must be"),
        ((index, offsets, indices, torch.ones(1, 1, 1), [out], [1]), "weight must be"),
        ((index, offsets, indices, None, [out.double()], [1]), "must be Double, got Float"),
        ((index, offsets, indices, None, [out, out], [1]), "for every level, got 2, 1 and 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run([maps], *broken, *end)
    # Invalid offsets and indices add nothing and read nothing outside.
    for wrong in (-(2**31), 2**31 - 1):
        run([maps], index, offsets.clone().fill_(wrong), indices, None, [out], [1], *end)
        assert torch.equal(out, torch.zeros_like(out))
        run([maps], index, offsets, indices.clone().fill_(wrong), None, [out], [1], *end)
        assert torch.equal(out, torch.zeros_like(out))


def test_weight_of_another_sum(backend):
    value, index = torch.randn(1, 4, 3, 4), torch.zeros(1, 3, 4, dtype=torch.int64)
    weight, outs = torch.rand(1, 3, 4), [torch.empty(1, 4, 3, 4), torch.empty(1, 4, 3, 4).double()]
    values = [value, value.double()]
    with pytest.raises(RuntimeError, match="of the type that the values are summed in"):
        cpp.cuda_gather_fold(values, index, weight, outs, Transfer([1, 1], Patch(), "area"))
