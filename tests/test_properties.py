"""Both operations over shapes, layouts, dtypes and options that nobody thought of."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import cases
from tests.checks import assert_no_worse, assert_same_choice
from ttsr_fast import gather_fold, reference, search
from ttsr_fast.operators import backends

settings.register_profile("ttsr_fast", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ttsr_fast")

SIDES = st.integers(1, 20)
CHANNELS = st.integers(1, 9)


def _on_device(x: Tensor) -> Tensor:
    """Drawn on the CPU, which has a generator everywhere, and moved to the device under test."""
    return x.to(torch.get_default_device())


@st.composite
def tensors(draw, n: int, c: int, h: int, w: int, dtype: torch.dtype, integers: bool = False):
    """[n, c, h, w] in permuted memory with steps and gaps of NaN, or expanded from less."""
    order = draw(st.permutations(range(4)))
    steps = [draw(st.integers(1, 3)) for _ in range(4)]
    margins = [draw(st.integers(0, 2)) for _ in range(4)]
    expanded = [draw(st.booleans()) and draw(st.booleans()) for _ in range(4)]
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    kept = [1 if e else size for e, size in zip(expanded, (n, c, h, w), strict=True)]
    if integers:
        content = torch.randint(-2, 3, kept, generator=generator, device="cpu")
    else:
        content = torch.randn(kept, generator=generator, dtype=torch.float64, device="cpu")
    whole = [size * step + margin for size, step, margin in zip(kept, steps, margins, strict=True)]
    memory = torch.full([whole[i] for i in order], float("nan"), dtype=dtype)
    view = memory.permute([order.index(i) for i in range(4)])
    for dim, (size, step, margin) in enumerate(zip(kept, steps, margins, strict=True)):
        view = view.narrow(dim, margin, size * step)
        view = view[(slice(None),) * dim + (slice(None, None, step),)]
    view.copy_(content)
    return view.expand(n, c, h, w)


@st.composite
def searches(draw, dtypes=cases.DTYPES, integers: bool = False):
    """Query, key, mask and the options."""
    kernel_size, padding = draw(st.sampled_from(cases.PATCHES))
    short = kernel_size - 2 * padding  # the smallest side that holds a patch
    n, c, dtype = draw(st.integers(1, 3)), draw(CHANNELS), draw(st.sampled_from(dtypes))
    h, w, hk, wk = (max(draw(SIDES), short) for _ in range(4))
    n_k = draw(st.sampled_from([1, n]))
    query = draw(tensors(n, c, h, w, dtype, integers))
    key = draw(tensors(n_k, c, hk, wk, dtype, integers))
    mask = None
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
        size = (draw(st.sampled_from([1, n_k])), wk - short + 1, hk - short + 1)
        mask = _on_device(torch.rand(size, generator=generator, device="cpu"))
        mask = mask.mT < draw(st.sampled_from([0.1, 0.9]))
        mask[:, -1, -1] |= ~mask.flatten(1).any(1)
    return query, key, mask, {"kernel_size": kernel_size, "padding": padding}


@st.composite
def transfers(draw):
    """Value, index, weight, gradient of the output and the options."""
    kernel_size, padding = draw(st.sampled_from(cases.PATCHES))
    short = kernel_size - 2 * padding
    n, c, dtype = draw(st.integers(1, 3)), draw(CHANNELS), draw(st.sampled_from(cases.DTYPES))
    h, w, hk, wk = (draw(st.integers(1, 9)) for _ in range(4))
    stride = draw(st.integers(1, 4))
    rest = [draw(st.integers(0, stride - 1)) for _ in range(2)]
    value_size = (
        draw(st.sampled_from([1, n])),
        c,
        (hk + short - 1) * stride + rest[0],
        (wk + short - 1) * stride + rest[1],
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    index = _on_device(torch.randint(hk * wk, (n, h, w), generator=generator, device="cpu"))
    weight = None
    if draw(st.booleans()):
        weight = _on_device(torch.rand((n, h, w), generator=generator, device="cpu")).to(dtype)
    options = {"stride": stride, "kernel_size": kernel_size, "padding": padding}
    options["divisor"] = draw(st.sampled_from(cases.DIVISORS))
    out_size = (n, c, (h + short - 1) * stride, (w + short - 1) * stride)
    value, grad = draw(tensors(*value_size, dtype)), draw(tensors(*out_size, dtype))
    return value, index, weight, grad, options


@given(arguments=searches(), normalize=st.sampled_from(cases.NORMALIZATIONS))
def test_search_finds_a_maximum(backend, arguments, normalize):
    query, key, mask, options = arguments
    assume(backends.can_run(backend, query.device, query.dtype))
    match = search(query, key, key_mask=mask, normalize=normalize, backend=backend, **options)
    assert_same_choice(match, query, key, mask, normalize=normalize, **options)


@given(arguments=searches(integers=True))
def test_search_of_integers_is_exact(backend, arguments):
    query, key, mask, options = arguments
    assume(backends.can_run(backend, query.device, query.dtype))
    match = search(query, key, key_mask=mask, normalize="none", backend=backend, **options)
    score, index = reference.search(query.double(), key.double(), mask, normalize="none", **options)
    assert torch.equal(match.score.double(), score) and torch.equal(match.index, index)


@pytest.mark.double
@given(arguments=searches(dtypes=(torch.float64,)), normalize=st.sampled_from(cases.NORMALIZATIONS))
def test_search_gradient_is_the_oracles(backend, arguments, normalize):
    query, key, mask, options = arguments
    query.requires_grad_(), key.requires_grad_()
    options["normalize"] = normalize
    score, index = search(query, key, key_mask=mask, backend=backend, **options)
    expected, expected_index = reference.search(query, key, mask, **options)
    same = (index == expected_index).double()  # expanded maps tie, and rounding then decides
    for x, y in zip(
        torch.autograd.grad((score * same).sum(), (query, key)),
        torch.autograd.grad((expected * same).sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def _transfer_gradients(
    operation, value: Tensor, index: Tensor, weight: Tensor | None, grad: Tensor, **options
) -> tuple[Tensor, ...]:
    """The output, and its gradients to value and weight."""
    inputs = [x.detach().requires_grad_() for x in (value, weight) if x is not None]
    out = operation(inputs[0], index, weight=inputs[1] if len(inputs) == 2 else None, **options)
    return out, *torch.autograd.grad(out, inputs, grad)


@given(arguments=transfers())
def test_gather_fold_and_its_gradients(backend, arguments):
    value, index, weight, grad, options = arguments
    actual = _transfer_gradients(
        gather_fold, value, index, weight, grad, backend=backend, **options
    )
    exact = (None if x is None else x.double() for x in (value, index, weight, grad))
    value64, _, weight64, grad64 = exact
    expected = _transfer_gradients(
        reference.gather_fold, value64, index, weight64, grad64, **options
    )
    baseline = _transfer_gradients(reference.gather_fold, value, index, weight, grad, **options)
    for three in zip(actual, expected, baseline, strict=True):
        assert_no_worse(*three)
