"""Results with NaN or infinity are errors that say why."""

import math

import numpy as np
import pytest
import torch

from ttsr_fast import upscale
from ttsr_fast.model import TTSR
from ttsr_fast.upscaling import detail
from ttsr_fast.upscaling.finite import check_finite

each = pytest.mark.parametrize
LOW, REF = (np.random.default_rng(0).integers(60, 200, (n, n, 3), dtype=np.uint8) for n in (8, 32))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TTSR((1, 1, 1, 1), 4)


@each("layout", [torch.contiguous_format, torch.channels_last])
@each("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_value_is_enough(dtype, layout):
    x = torch.ones(2, 3, 5, 7, dtype=dtype).to(memory_format=layout)
    x[0, 0, 0, 0] = torch.finfo(dtype).max
    check_finite("the result holds", x, torch.zeros(4))
    for value, kind in ((math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")):
        spoiled = x.clone()
        spoiled[1, 2, 4, 6] = value
        with pytest.raises(ValueError, match=f"^the result holds {kind}: its inputs are finite"):
            check_finite("the result holds", torch.zeros(4), spoiled)


@each("value", [math.nan, math.inf, -math.inf])
@each(
    "name",
    ["MainNet.SFE.conv_tail.weight", "LTE.slice2.5.bias", "MainNet.merge_tail.conv_tail2.bias"],
)
def test_a_weight_is_named(model, name, value):
    """Also the last bias, which the network clamps to a white or black image."""
    model.get_parameter(name).data.view(-1)[0] = value
    kind = "NaN" if math.isnan(value) else "infinity"
    with pytest.raises(ValueError, match=f"the weights hold {kind} in {name}$"):
        upscale(LOW, REF, model=model)


def test_overflow_of_float16_is_named(model):
    for parameter in model.MainNet.parameters():
        parameter.data *= 40  # beyond float16, not beyond float32 and bfloat16
    with pytest.raises(ValueError, match=r"the result holds NaN: float16 overflows; use amp bf16"):
        upscale(LOW, REF, model=model, amp="fp16")
    for amp in (None, "bf16"):
        assert upscale(LOW, REF, model=model, amp=amp).image.pixels.max() > 0


@each("amp", [None, "fp16"])
def test_overflow_in_a_reference_is_named(model, amp):
    for parameter in model.LTE.slice2.parameters():
        parameter.data *= 1e3 if amp else 1e20
    reason = "float16 overflows" if amp else "the weights are finite but too large"
    message = rf"the features of the reference hold (NaN|infinity): {reason}"
    with pytest.raises(ValueError, match=message):
        upscale(LOW, REF, model=model, amp=amp)


@each("which", ["score", "texture"])
def test_a_fault_in_detail_is_an_error(monkeypatch, which):
    search, gather_fold = detail.search, detail.gather_fold

    def spoiled_search(*args, **options):
        match = search(*args, **options)
        match.score[0, 2, 3] = math.nan
        return match

    def spoiled_gather_fold(*args, **options):
        return gather_fold(*args, **options).fill_(math.nan)

    if which == "score":
        monkeypatch.setattr(detail, "search", spoiled_search)
    else:
        monkeypatch.setattr(detail, "gather_fold", spoiled_gather_fold)
    with pytest.raises(ValueError, match="the result holds .*: its inputs are finite"):
        upscale(LOW, REF)
