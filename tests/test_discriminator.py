"""The discriminator against a restatement in plain functions of its weights."""

import pytest
import torch
import torch.nn.functional as F

from ttsr_fast.model.discriminator import Discriminator


def plain_scores(weights, image):
    """Convolutions and linear layers in the order of their weights."""
    tensors = iter(weights)
    x = image
    for stride in (1, 2) * 5:
        x = F.conv2d(x, next(tensors), next(tensors), stride=stride, padding=1)
        x = torch.where(x > 0, x, 0.2 * x)
    x = x.flatten(1) @ next(tensors).T + next(tensors)
    x = torch.where(x > 0, x, 0.2 * x)
    return x @ next(tensors).T + next(tensors)


def test_published_size():
    with torch.device("meta"):
        net = Discriminator()
    assert sum(p.numel() for p in net.parameters()) == 17_821_473
    widths = [3, 32, 32, 64, 64, 128, 128, 256, 256, 512, 512]
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.in_channels for m in convolutions] == widths[:-1]
    assert [m.out_channels for m in convolutions] == widths[1:]


@pytest.mark.parametrize("size", [32, 64])
def test_scores_and_gradients(size):
    net = Discriminator(size).double()
    image = torch.rand(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    leaves = [image, *net.parameters()]
    found, expected = net(image), plain_scores(list(net.parameters()), image)
    assert found.shape == (2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    into = torch.randn_like(found)
    for x, y in zip(
        torch.autograd.grad(found, leaves, into),
        torch.autograd.grad(expected, leaves, into),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_images_do_not_see_each_other():
    net = Discriminator(32).double()
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    alone = torch.cat([net(image[None]) for image in images])
    torch.testing.assert_close(net(images), alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [0, 16, 40, -32])
def test_sizes_that_make_no_network(size):
    with pytest.raises(ValueError, match=f"size must be a positive multiple of 32, got {size}"):
        Discriminator(size)


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (3, 32, 32), (1, 1, 32, 32)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"image must be \[N, 3, 32, 32\], got"):
        Discriminator(32)(torch.zeros(shape))
