"""The texture extractor against a restatement in plain convolutions."""

import logging

import pytest
import torch
import torch.nn.functional as F

from ttsr_fast.model import LTE, lte
from ttsr_fast.model.checkpoint import read_tensors

CHANNELS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)}


def plain_levels(vgg, image):
    """Three levels of VGG19, image in [0, 1], from weights in torchvision's naming."""

    def layer(number, x):
        weight, bias = vgg[f"features.{number}.weight"], vgg[f"features.{number}.bias"]
        return F.conv2d(x, weight, bias, padding=1).clamp(min=0)

    mean = torch.tensor((0.485, 0.456, 0.406), dtype=image.dtype).view(3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), dtype=image.dtype).view(3, 1, 1)
    lv1 = layer(0, (image - mean) / std)
    lv2 = layer(5, F.max_pool2d(layer(2, lv1), 2))
    lv3 = layer(10, F.max_pool2d(layer(7, lv2), 2))
    return lv1, lv2, lv3


@pytest.fixture
def vgg():
    """Weights shaped like VGG19's, with some of the layers that LTE does not use."""
    weights = {"classifier.0.bias": torch.ones(4096), "features.12.bias": torch.ones(256)}
    for number, (channels, out_channels) in CHANNELS.items():
        weights[f"features.{number}.weight"] = torch.randn(out_channels, channels, 3, 3) * 0.05
        weights[f"features.{number}.bias"] = torch.randn(out_channels) * 0.05
    return weights


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 9), (13, 18)])
def test_levels_are_those_of_vgg19(vgg, size):
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    levels = LTE(vgg).double()(image)
    expected = plain_levels({name: x.double() for name, x in vgg.items()}, image)
    for level, plain in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, plain, rtol=1e-6, atol=1e-6)  # sub_mean is float32
        assert 0 < (level == 0).double().mean() < 1, "a level is taken after its ReLU"


def test_vgg19_weights_come_from_a_local_file(vgg, tmp_path):
    torch.save(vgg, tmp_path / "vgg19.pth")
    state = LTE(read_tensors(tmp_path / "vgg19.pth")).state_dict()
    for slice_name, numbers in (("slice1", (0,)), ("slice2", (2, 5)), ("slice3", (7, 10))):
        for number in numbers:
            for kind in ("weight", "bias"):
                own = state[f"{slice_name}.{number}.{kind}"]
                assert torch.equal(own, vgg[f"features.{number}.{kind}"])


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_of_another_network_change_nothing(vgg, fault):
    extractor = LTE(vgg)
    before = {name: x.clone() for name, x in extractor.state_dict().items()}
    other = {name: x + 1 for name, x in vgg.items()}
    if fault == "missing":
        del other["features.10.bias"]
    else:
        other["features.10.bias"] = torch.zeros(255)
    with pytest.raises(ValueError, match=r"1 of 10 are missing.*features\.10\.bias"):
        extractor.load_vgg19(other)
    assert all(torch.equal(x, before[name]) for name, x in extractor.state_dict().items())


def test_random_start_keeps_the_variance_of_the_signal():
    state = LTE().state_dict()
    for name, x in state.items():
        if name.endswith("bias") and name.startswith("slice"):
            assert x.count_nonzero() == 0
        elif name.startswith("slice"):
            fan_in = x[0].numel()
            assert x.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


def test_random_start_is_said_once(vgg, caplog):
    lte._say_random.cache_clear()
    with caplog.at_level(logging.WARNING, "ttsr_fast"):
        LTE(vgg)
        with torch.device("meta"):
            LTE()
        assert not caplog.records
        LTE()
        LTE()
    assert [record.name for record in caplog.records] == ["ttsr_fast.model.lte"]
    assert "random weights" in caplog.text


def test_only_the_normalisation_is_frozen():
    extractor = LTE()
    counts = {
        frozen: sum(p.numel() for p in extractor.parameters() if p.requires_grad != frozen)
        for frozen in (True, False)
    }
    assert counts == {True: 12, False: 555_328}
