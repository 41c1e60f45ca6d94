"""Convolutions, upscaling and networks in inference on the CPU, against float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ttsr_fast.model import LTE, MainNet
from ttsr_fast.model.bicubic import bicubic_by_products
from ttsr_fast.model.convolution import convolve

each = pytest.mark.parametrize
FLOAT, BFLOAT = torch.float32, torch.bfloat16
ERRORS = {FLOAT: 1e-6, BFLOAT: 2**-8}  # of the largest number


@pytest.fixture(autouse=True)
def on_the_cpu():
    with torch.device("cpu"):
        yield


def channels_last(*shape, dtype=FLOAT):
    return torch.randn(*shape).to(dtype, memory_format=torch.channels_last)


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)


def psnr(x, y):
    """Of images in [-1, 1]."""
    return 10 * math.log10(4 / (x.double() - y.double()).square().mean().item())


# --- convolve ---


@each("dtype", [FLOAT, BFLOAT])
@each("size", [(5, 7), (48, 37)])  # below and above the size from which on oneDNN does it all
@each("count", [1, 2, 3])
@each("relu", [False, True])
@each("adds", [None, "kept", "lost"])
def test_convolution_and_what_surrounds_it(dtype, size, count, relu, adds):
    layer = nn.Conv2d(16 * count, 24, 3, padding=1)
    maps = [channels_last(1, 16, *size, dtype=dtype) for _ in range(count)]
    add = None if adds is None else channels_last(1, 24, *size, dtype=dtype)
    before = None if add is None else add.clone()
    exact = [x.to(dtype).double() for x in (layer.weight, layer.bias)]
    expected = F.conv2d(torch.cat(maps, 1).double(), *exact, padding=1)
    expected = expected if add is None else expected + add.double()
    expected = expected.relu() if relu else expected
    with torch.no_grad():
        out = convolve(layer, *maps, add=add, relu=relu, in_place=adds == "lost")
    assert out.dtype == dtype and is_channels_last(out)
    assert (out - expected).abs().max() <= count * ERRORS[dtype] * expected.abs().max()
    assert adds != "kept" or torch.equal(add, before)


@each("alias", [False, True])
def test_float32_is_rounded_as_in_training(alias):
    layer, x = nn.Conv2d(16, 16, 3, padding=1), channels_last(1, 16, 48, 37)
    add = x if alias else channels_last(1, 16, 48, 37)
    expected = (layer(x) + add).relu()
    assert torch.equal(convolve(layer, x, add=add, relu=True), expected)
    with torch.no_grad():
        assert torch.equal(convolve(layer, x, add=add, relu=True, in_place=True), expected)


@each("dtype", [FLOAT, BFLOAT])
@each("everywhere", [False, True])
def test_hooks_are_called(dtype, everywhere):
    layer, x, seen = nn.Conv2d(16, 16, 3, padding=1), channels_last(1, 16, 48, 37, dtype=dtype), []
    register = register_module_forward_hook if everywhere else layer.register_forward_hook
    hook = register(lambda module, inputs, out: seen.append(out) or 2 * out)
    with torch.no_grad():
        assert torch.equal(convolve(layer, x), 2 * seen[0])
    hook.remove()


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@each("size", [(5, 7), (48, 37)])
@each("dtype", [FLOAT, BFLOAT])
@each("change", ["class", "method", "padding", "same", "groups"])
def test_what_stands_in_for_a_convolution_is_called(size, dtype, change):
    padding, groups = "same" if change == "same" else 1, 4 if change == "groups" else 1
    kind = Doubled if change == "class" else nn.Conv2d
    layer = kind(16, 16, 3, padding=padding, groups=groups)
    if change == "method":
        forward = layer.forward
        layer.forward = lambda x: 3 * forward(x)
    elif change == "padding":
        layer.padding_mode = "circular"
    x = channels_last(1, 16, *size, dtype=dtype)
    with torch.no_grad():
        with torch.autocast("cpu", dtype, enabled=dtype != FLOAT):
            expected = layer(x)
        assert torch.equal(convolve(layer, x), expected)


def test_tangents_are_kept_without_gradients():
    net, image = LTE(), torch.rand(1, 3, 48, 40)
    tangent = torch.randn_like(image)
    expected = torch.func.jvp(net, (image,), (tangent,))[1]
    with torch.no_grad():
        for found, exact in zip(
            torch.func.jvp(net, (image,), (tangent,))[1], expected, strict=True
        ):
            torch.testing.assert_close(found, exact)


def test_blocks_keep_what_hooks_saw_and_what_passes_through():
    def net() -> MainNet:
        torch.manual_seed(0)
        net = MainNet((4, 1, 1, 1))
        net.SFE.RBs[1] = nn.Identity()
        net.SFE.RBs[0] = nn.Identity()
        return net

    image, seen, expected = channels_last(1, 3, 48, 37), [], []
    for model, outputs, gradients in ((net(), seen, False), (net(), expected, True)):
        model.SFE.RBs[2].register_forward_hook(
            lambda *args, outputs=outputs: outputs.append(args[2])
        )
        with torch.set_grad_enabled(gradients):
            outputs.append(model.SFE(image))
    for found, exact in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, exact)


# --- bicubic ---


@each("size", [(3, 5), (16, 17), (20, 36), (41, 50)])
@each("factor", [2, 4])
@each("dtype", [torch.float64, FLOAT, BFLOAT])
def test_products_are_bicubic(size, factor, dtype):
    x = channels_last(2, 8, *size, dtype=dtype)
    out = bicubic_by_products(x, factor)
    expected = F.interpolate(x.double(), scale_factor=factor, mode="bicubic")
    assert out.dtype == dtype and is_channels_last(out)
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= {torch.float64: 1e-14, FLOAT: 1e-6, BFLOAT: 2**-6}[dtype]


@each("factor", [2, 4])
@each("dtype", [FLOAT, BFLOAT])
def test_flat_areas_stay_flat(factor, dtype):
    x = torch.full((1, 2, 40, 21), 0.7109375).to(dtype, memory_format=torch.channels_last)
    assert (bicubic_by_products(x, factor) == x[0, 0, 0, 0]).all()


@each("factor", [2, 4])
def test_windows_have_the_same_bits(factor):
    x = channels_last(1, 64, 45, 70)
    whole = bicubic_by_products(x, factor)
    for top, left in ((0, 0), (3, 5), (20, 38), (11, 1)):
        rows, columns = slice(top, top + 25), slice(left, left + 32)
        window = x[..., rows, columns].contiguous(memory_format=torch.channels_last)
        part = bicubic_by_products(window, factor)
        inner = slice(2 * factor, -2 * factor)
        of_whole = whole[..., factor * top :, factor * left :][..., : 25 * factor, : 32 * factor]
        assert torch.equal(part[..., inner, inner], of_whole[..., inner, inner])


# --- networks in bfloat16 ---


def test_texture_extractor_in_bfloat16():
    extractor, image = LTE(), torch.rand(1, 3, 52, 60)
    with torch.no_grad():
        for low, exact in zip(extractor(image, dtype=BFLOAT), extractor(image), strict=True):
            assert low.dtype == BFLOAT and is_channels_last(low)
            assert (low - exact).norm() < 0.01 * exact.norm()


class LargeMaps(TorchDispatchMode):
    """Names of operations, and those of their results that are maps of features."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.maps = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(out, Tensor) and out.dim() == 4 and len(out) == 1 and out.shape[1] % 64 == 0:
            self.maps.append(out)
        return out


def test_main_net_in_bfloat16_moves_no_map():
    torch.manual_seed(0)
    net = MainNet((2, 2, 2, 2))
    shapes = [(3, 1), (1, 1), (256, 1), (128, 2), (64, 4)]
    inputs = [channels_last(1, c, 26 * n, 20 * n) for c, n in shapes]
    low = [x.to(BFLOAT) for x in inputs]
    with torch.no_grad(), LargeMaps() as seen:
        image = net(*low)
    assert seen.maps and all(x.dtype == BFLOAT and is_channels_last(x) for x in seen.maps)
    assert "cat" not in seen.names
    assert image.dtype == FLOAT, "an image has more than 8 bits"
    with torch.no_grad():
        exact = net(*inputs)
    assert 50 < psnr(image, exact) < 90
    assert net(*inputs).sub(exact).abs().max() < 1e-5, "as in training"
