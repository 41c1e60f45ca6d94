"""The operators under PyTorch's own checks, under torch.compile, and where they refuse."""

import shutil

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases
from ttsr_fast import gather_fold, search
from ttsr_fast.operators.patch import sum_dtype
from ttsr_fast.operators.registry import is_plain

ops = torch.ops.ttsr_fast
SAMPLES = {
    "plain": {},
    "one_key": {"key_batch": 1, "normalize": "key", "divisor": "none", "needed": [True, False]},
    "added_eps": {"eps": 0.1, "add_eps": True},
    "one_pixel": {
        "kernel_size": 1,
        "padding": 0,
        "layout": "channels_last",
        "needed": [False, True],
    },
    "valid": {"kernel_size": 5, "padding": 0, "dtype": torch.float64, "normalize": "none"},
    "stride_3": {"stride": 3, "key_batch": 1, "layout": "channels_last", "divisor": "overlap"},
    "half": {"dtype": torch.bfloat16, "layout": "transposed"},
}

DEFAULTS = {
    "key_batch": 2,
    "kernel_size": 3,
    "padding": 1,
    "stride": 2,
    "dtype": torch.float32,
    "layout": "contiguous",
    "normalize": "both",
    "eps": 1e-12,
    "add_eps": False,
    "divisor": "area",
    "needed": [True, True],  # gradients of search
}


@pytest.fixture(params=SAMPLES.values(), ids=SAMPLES.keys())
def sample(request):
    """Arguments of every operator, and which gradients of search are needed."""
    s = {**DEFAULTS, **request.param}
    layout = cases.LAYOUTS[s["layout"]]
    stride, patch = s["stride"], (s["kernel_size"], s["padding"])
    shrink = s["kernel_size"] - 1 - 2 * s["padding"]
    query = layout(torch.randn(2, 3, 6, 7, dtype=s["dtype"]))
    key = layout(torch.randn(s["key_batch"], 3, 7, 6, dtype=s["dtype"]))
    mask = torch.rand(s["key_batch"], 7 - shrink, 6 - shrink) < 0.8
    value_size = (s["key_batch"], 3, 7 * stride + stride // 2, 6 * stride)
    value = layout(torch.randn(value_size, dtype=s["dtype"]))
    index = cases.random_index(value_size, (2, 6 - shrink, 7 - shrink), stride, *patch)
    grad = layout(torch.randn(2, 3, 6 * stride, 7 * stride, dtype=s["dtype"]))
    weight = torch.rand(index.shape)
    precision = "fp64" if s["dtype"] == torch.float64 else "fp32"
    transfer = ([stride], *patch, s["divisor"])
    score_options = (s["normalize"], s["eps"], s["add_eps"])
    score, grad_score = torch.rand(2, *index.shape, dtype=sum_dtype(s["dtype"]))
    return {
        "search": (query, key, mask, *patch, *score_options, precision),
        "gather_fold": ([value], index, weight, *transfer),
        "gather_fold_adjoint": ([grad], index, weight, list(value_size), *transfer),
        "gather_dot": ([value], [grad], index, *transfer),
        "search_backward": (
            *(grad_score, query, key, score, index % (key.shape[2] - shrink), *patch),
            *score_options,
        ),
        "needed": s["needed"],
    }


def differentiable(arguments):
    def leaf(x):
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.detach().requires_grad_() if floating else x

    return torch.utils._pytree.tree_map(leaf, arguments)


@pytest.mark.parametrize("name", ["search", "gather_fold"])
def test_opcheck_with_gradients(backend, sample, name):
    arguments = (*differentiable(sample[name]), backend)
    results = torch.library.opcheck(getattr(ops, name), arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["gather_fold_adjoint", "gather_dot"])
def test_opcheck_of_transposes(backend, sample, name):
    results = torch.library.opcheck(getattr(ops, name), (*sample[name], backend))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_search_backward(backend, sample):
    arguments = (*sample["search_backward"], backend, sample["needed"])
    results = torch.library.opcheck(ops.search_backward, arguments)
    assert set(results.values()) == {"SUCCESS"}


def texture(query, key, value, backend):
    """Both operations, arithmetic between them, and gradients along every way."""
    match = search(query, key, backend=backend)
    out = gather_fold(value, match.index, stride=2, weight=match.score * 2, backend=backend)
    return out, match.score, match.index


def results_and_gradients(function, inputs, backend):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out, score, index = function(*inputs, backend)
    grads = torch.autograd.grad(out.square().sum() + score.sum(), inputs)
    return out, score, index, *grads


COMPILERS = ["aot_eager"] + ["inductor"] * bool(shutil.which("c++") or shutil.which("g++"))


@pytest.mark.torch(2, 6)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_without_graph_breaks(compiler):
    torch._dynamo.reset()
    inputs = [torch.randn(2, 3, 7, 9), torch.randn(1, 3, 8, 6), torch.randn(1, 4, 17, 12)]
    expected = results_and_gradients(texture, inputs, None)
    compiled = torch.compile(texture, fullgraph=True, backend=compiler)
    actual = results_and_gradients(compiled, inputs, None)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.torch(2, 8)
def test_compiled_once_for_all_sizes(backend):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(texture, fullgraph=True, dynamic=True, backend=count)
    for h, w, hk, wk in ((7, 9, 8, 6), (5, 11, 13, 10), (12, 6, 7, 17)):
        inputs = [torch.randn(2, 3, h, w), torch.randn(2, 3, hk, wk)]
        inputs.append(torch.randn(2, 4, 2 * hk, 2 * wk))
        actual, expected = compiled(*inputs, backend), texture(*inputs, backend)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)
    assert len(graphs) == 1


@pytest.mark.parametrize("operation", ["search", "gather_fold"])
def test_second_derivative_is_refused(backend, operation):
    x, y = (torch.randn(1, 2, 5, 6, requires_grad=True) for _ in range(2))
    index = cases.random_index((1, 2, 5, 6), (1, 4, 3), 1)
    weight = torch.rand(1, 4, 3, requires_grad=True)
    if operation == "search":
        out, inputs = search(x, y, backend=backend).score, (x, y)
    else:
        out, inputs = gather_fold(x, index, weight=weight, backend=backend), (x, weight)
    for source in inputs:
        (grad,) = torch.autograd.grad(
            out.square().sum(), source, create_graph=True, retain_graph=True
        )
        with pytest.raises(RuntimeError, match="second derivatives of search and gather_fold"):
            grad.sum().backward()


def test_version_counters_guard_saved_tensors(backend):
    """Changing an input in place before the backward pass is an error, not a wrong gradient."""
    query, key = torch.randn(1, 2, 5, 6, requires_grad=True), torch.randn(1, 2, 4, 5)
    score, _ = search(query, key, backend=backend)
    key.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.sum().backward()


class Calls(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class FunctionCalls(TorchFunctionMode):
    """The same, before autograd."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name() if hasattr(function, "name") else "")
        return function(*args, **(kwargs or {}))


def test_modes_and_profiles_see_the_operator_that_plain_calls_pass_by(backend):
    query, key = torch.randn(2, 3, 6, 7), torch.randn(2, 3, 5, 9)
    assert is_plain(query, key, None) and is_plain(torch.nn.Parameter(query, requires_grad=False))
    assert not is_plain(query, query.to("meta")) and not is_plain(query.clone().requires_grad_())
    expected = search(query, key, backend=backend)
    for mode in (Calls(), FunctionCalls()):
        with mode:
            match = search(query, key, backend=backend)
        assert "ttsr_fast::search" in mode.names
        assert all(map(torch.equal, match, expected))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        match = search(query, key, backend=backend)
    assert "ttsr_fast::search" in {event.name for event in profiler.events()}
    assert all(map(torch.equal, match, expected))
    with torch.no_grad():
        assert is_plain(query.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(query)
