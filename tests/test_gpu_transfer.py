"""What only a GPU can show of the transfer and of the whole module."""

import os
import subprocess
import sys

import pytest
import torch

from tests.checks import assert_no_worse
from ttsr_fast import SearchTransfer, gather_fold, reference
from ttsr_fast.operators import cpp
from ttsr_fast.operators.index import CHECK_INDEX_VARIABLE, InverseIndex
from ttsr_fast.operators.patch import Patch, Transfer

pytestmark = pytest.mark.gpu
each = pytest.mark.parametrize
DEVICES = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
INDICES = {
    "random": lambda n, h, w: torch.randint(h * w, (n, h, w)),
    "coherent": lambda n, h, w: torch.arange(h * w).view(1, h, w).repeat(n, 1, 1),
    "same_key": lambda n, h, w: torch.full((n, h, w), h * w // 2),
}


def levels(n=9, size=40, device="cuda", dtype=torch.float32, channels=(256, 128, 64)):
    """The five maps of `SearchTransfer` at the size of training, all with gradients."""
    c3, c2, c1 = channels
    sizes = [(c3, size), (c3, size), (c1, 4 * size), (c2, 2 * size), (c3, size)]
    return [
        torch.randn(n, c, s, s, device=device).to(dtype).relu().requires_grad_() for c, s in sizes
    ]


def step(module, inputs, grads=None):
    """Results and all gradients."""
    out = module(*inputs)
    return *out, *torch.autograd.grad(out, inputs, grads or [torch.ones_like(x) for x in out])


@each("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@each("kind", INDICES)
@each("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_levels_at_the_size_of_training(dtype, kind, layout):
    index = INDICES[kind](3, 40, 40).cuda()
    for stride, channels in ((4, 64), (2, 128), (1, 256)):
        size = (3, channels, 40 * stride, 40 * stride)
        value, grad = (
            torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=layout)
            for _ in range(2)
        )
        results = []
        for v in (value.double(), value, value):
            v = v.detach().requires_grad_()
            fold = reference.gather_fold if len(results) < 2 else gather_fold
            options = {"stride": stride, **({"backend": "cpp"} if fold is gather_fold else {})}
            out = fold(v, index, **options)
            results.append((out, *torch.autograd.grad(out, v, grad.to(v.dtype))))
        for expected, baseline, actual in zip(*results, strict=True):
            assert_no_worse(actual, expected, baseline)
        v = value.detach().requires_grad_()
        out = gather_fold(v, index, stride=stride, backend="cpp")
        again = (out, *torch.autograd.grad(out, v, grad))
        assert all(torch.equal(x, y) for x, y in zip(results[2], again, strict=True))


def test_a_training_step_waits_for_nothing():
    module, inputs = SearchTransfer(), levels()
    expected = step(module, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step(module, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_a_training_step_is_captured_in_a_graph():
    module, inputs = SearchTransfer(), levels(n=2, size=48)  # more than PyTorch sorts at once
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(module, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(module, inputs)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x).relu())
    graph.replay()
    for x, y in zip(captured, step(module, inputs), strict=True):
        assert torch.equal(x, y)


@each("precision", [None, "fp16"])
@each("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_and_under_autocast(layout, precision):
    torch._dynamo.reset()
    inputs = [x.detach().contiguous(memory_format=layout) for x in levels(n=2, size=20)]
    inputs = [x.requires_grad_() for x in inputs]
    module = SearchTransfer(precision=precision)
    whole = torch.compile(module, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        actual, expected = step(whole, inputs), step(module, inputs)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_on_the_current_stream():
    value, index = torch.randn(1, 64, 60, 60, device="cuda"), INDICES["random"](1, 60, 60).cuda()
    gather_fold(value, index, backend="cpp")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late = (value + 1).requires_grad_()  # not there before the sleep ends
        out = gather_fold(late, index, backend="cpp")
        (grad,) = torch.autograd.grad(out, late, out)
    stream.synchronize()
    other = (value + 1).requires_grad_()
    expected = reference.gather_fold(other, index)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, other, expected)[0])


@each("device", DEVICES)
def test_on_every_device(device):
    inputs = levels(n=1, size=12, device=device)
    for x, y in zip(SearchTransfer()(*inputs), reference.search_transfer(*inputs), strict=True):
        assert x.device == torch.device(device)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@each("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_more_than_two_to_the_31_elements(layout):
    """The last rows are those of a transfer by themselves, forward and back."""
    h, w, c = 8_500, 4_100, 64
    value = torch.randn(1, c, h, w, device="cuda", dtype=torch.float16)
    value = value.contiguous(memory_format=layout)
    assert value.numel() > 2**31
    index = torch.arange(h * w, device="cuda").view(1, h, w)
    out = gather_fold(value, index, divisor="overlap", backend="cpp")
    torch.testing.assert_close(out[:, :, -9:], value[:, :, -9:], rtol=1e-3, atol=1e-3)
    assert out.is_contiguous(memory_format=layout)
    del out
    grad = torch.empty_like(value)
    transfer = Transfer([1], Patch(3, 1), "overlap")
    cpp.gather_fold_adjoint([value], InverseIndex(index), None, [grad], transfer)
    torch.testing.assert_close(grad[:, :, -9:], value[:, :, -9:], rtol=1e-3, atol=1e-3)


OUTSIDE = """
import torch
from ttsr_fast import gather_fold
index = torch.zeros(1, 4, 5, dtype=torch.int64, device="cuda")
index[0, 2, 2] = 4 * 5
value = torch.randn(1, 8, 4, 5, device="cuda")
out = gather_fold(value, index, backend="cpp")
torch.cuda.synchronize()
print("finite", bool(out.isfinite().all()))
"""


@each(("check", "stops"), [("1", True), ("0", False)])
def test_index_outside_the_grid(check, stops):
    """The kernel stops, which ends the process's use of CUDA, unless told not to look."""
    environment = {**os.environ, CHECK_INDEX_VARIABLE: check}
    command = [sys.executable, "-c", OUTSIDE]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if stops:
        assert result.returncode != 0 and "index outside the key grid" in result.stderr
    else:
        assert result.stdout == "finite True\n", result.stderr
