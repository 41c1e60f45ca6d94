"""Images: resizing as Pillow does it, and conversion to tensors and back."""

import numpy as np
import pytest
import torch
from PIL import Image as pillow

from tests.image_samples import noise
from ttsr_fast import images

each = pytest.mark.parametrize
BICUBIC = pillow.Resampling.BICUBIC


@each("channels", [1, 3])
def test_degradation_is_pillows(channels):
    array = noise(20, 28, channels)
    down = images.downscale(array)
    image = pillow.fromarray(array.squeeze())
    expected = image.resize((7, 5), BICUBIC)
    np.testing.assert_array_equal(down.squeeze(), np.asarray(expected), strict=True)
    expected = expected.resize((28, 20), BICUBIC)
    np.testing.assert_array_equal(images.upscale_bicubic(down).squeeze(), np.asarray(expected))


def test_16_bit_degradation_is_pillows_in_float():
    array = noise(20, 28, 3, dtype=np.uint16)
    down = images.downscale(array)
    for c in range(3):
        exact = pillow.fromarray(array[..., c].astype(np.float32)).resize((7, 5), BICUBIC)
        expected = np.asarray(exact).round().clip(0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(down[..., c], expected, strict=True)
    low = images.downscale((array >> 8).astype(np.uint8))
    assert (
        np.abs(down / 257 - low).max() < 1.6
    )  # the 8-bit path rounds twice, here half a level off


def test_resize_of_a_tensor_neither_rounds_nor_clips():
    x = torch.randn(1, 2, 6, 5) * 300
    y = images.resize_tensor(x, (9, 11))
    for c in range(2):
        expected = np.asarray(pillow.fromarray(x[0, c].numpy()).resize((11, 9), BICUBIC))
        np.testing.assert_array_equal(y[0, c].numpy(), expected)
    assert y.abs().max() > 300


@each("dtype", [np.uint8, np.uint16])
def test_tensors_hold_every_level(dtype):
    top = np.iinfo(dtype).max
    levels = np.arange(top + 1, dtype=dtype).reshape(16, -1, 1)
    x = images.to_tensor(levels)
    assert x.shape == (1, 3, 16, (top + 1) // 16)
    assert (x[0, 0, 0, 0], x[0, 1, -1, -1]) == (-1, 1)
    assert x[0, 2, 0, 3] == torch.tensor(3 / (top / 2) - 1)
    for like in (levels, levels.repeat(3, axis=2)):
        np.testing.assert_array_equal(images.from_tensor(x, like), like, strict=True)


def test_tensors_are_clipped_and_grey_is_luma():
    x = torch.tensor([[-3.0, 0.0, 1.0], [-1.0, 0.0, -1.0], [5.0, 0.0, -1.0]]).view(1, 3, 1, 3)
    grey, colour = np.zeros((1, 1, 1), np.uint8), np.zeros((1, 1, 3), np.uint8)
    expected = [[[0, 0, 255], [128, 128, 128], [255, 0, 0]]]  # 127.5 goes to the even level
    np.testing.assert_array_equal(images.from_tensor(x, colour), expected)
    assert images.from_tensor(x[..., 1:], grey).flatten().tolist() == [128, 76]
    np.testing.assert_array_equal(images.to_grey(np.array([[[255, 0, 0]]], np.uint8)), [[[76]]])
    np.testing.assert_array_equal(
        images.to_grey(np.array([[[0, 0, 65535]]], np.uint16)), [[[7471]]]
    )
