"""Losses against their formulas in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.test_vgg import plain_relu5_1, random_weights
from ttsr_fast.model import TTSR
from ttsr_fast.model.discriminator import Discriminator
from ttsr_fast.model.vgg import VGG19
from ttsr_fast.training.losses import (
    adversarial_loss,
    discriminator_loss,
    perceptual_loss,
    reconstruction_loss,
    transferal_loss,
)

each = pytest.mark.parametrize


def images(*shape, count=2):
    return [torch.rand(shape, dtype=torch.float64) * 2 - 1 for _ in range(count)]


def mean_difference(a, b, kind):
    """Mean over all pairs of values."""
    pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
    differences = [abs(x - y) if kind == "l1" else (x - y) ** 2 for x, y in pairs]
    return math.fsum(differences) / len(differences)


@each("kind", ["l1", "l2"])
def test_reconstruction(kind):
    sr, hr = images(2, 3, 4, 5)
    sr.requires_grad_()
    loss = reconstruction_loss(sr, hr, kind)
    assert loss.item() == pytest.approx(mean_difference(sr, hr, kind), rel=1e-12)
    (grad,) = torch.autograd.grad(loss, sr)
    wanted = (sr - hr).sign() if kind == "l1" else 2 * (sr - hr)
    torch.testing.assert_close(grad, wanted / sr.numel())
    assert torch.equal(reconstruction_loss(sr, hr), reconstruction_loss(sr, hr, "l1"))


def test_perceptual():
    weights = random_weights()
    sr, hr = (x.requires_grad_() for x in images(2, 3, 32, 32))
    loss = perceptual_loss(VGG19(weights).double(), sr, hr)
    plain = [plain_relu5_1(weights, (x + 1) / 2) for x in (sr, hr)]
    assert loss.item() == pytest.approx(mean_difference(*plain, "l2"), rel=1e-6)
    loss.backward()
    (wanted,) = torch.autograd.grad((plain[0] - plain[1].detach()).square().mean(), sr)
    torch.testing.assert_close(sr.grad, wanted, rtol=1e-5, atol=1e-9)
    assert hr.grad is None


def maps():
    """Features lv1 to lv3 and textures T_lv3 to T_lv1, of 2x3 positions."""
    shapes = [(2, 4, 8, 12), (2, 5, 4, 6), (2, 6, 2, 3)]
    features, textures = (
        [torch.randn(shape, dtype=torch.float64) for shape in order]
        for order in (shapes, shapes[::-1])
    )
    return features, textures


@each("kind", ["l1", "l2"])
def test_transferal(kind):
    features, textures = maps()
    levels = [mean_difference(features[i], textures[2 - i], kind) for i in range(3)]
    found = transferal_loss(features, textures, kind=kind).item()
    assert found == pytest.approx(sum(levels) / 3, rel=1e-10)


@each("kind", ["l1", "l2"])
def test_transferal_by_confidence(kind):
    features, textures = maps()
    S = torch.randn(2, 1, 2, 3, dtype=torch.float64)
    levels = []
    for i, factor in enumerate((4, 2, 1)):
        size = (2 * factor, 3 * factor)
        large = F.interpolate(S, size=size, mode="bicubic", align_corners=False)
        weight = 1 / (1 + (-large).exp())
        levels.append(mean_difference(features[i] * weight, textures[2 - i] * weight, kind))
    found = transferal_loss(features, textures, S, kind).item()
    assert found == pytest.approx(sum(levels) / 3, rel=1e-10)
    assert transferal_loss(features, textures, kind=kind).item() > found


def test_transferal_reaches_the_result_the_textures_and_the_confidence():
    """The extractor gets gradients through its textures only: it is frozen for the result."""
    model = TTSR((1, 1, 1, 1), 4).double()
    lr, lrsr, ref, refsr = (*images(1, 3, 4, 4, count=1), *images(1, 3, 16, 16, count=3))
    sr, S, *textures = model(lr, lrsr, ref, refsr)
    loss = transferal_loss(model(sr=sr.detach()), textures)
    weight = model.LTE.slice1[0].weight
    (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
    frozen = [x.detach() for x in model(sr=sr)]
    squares = [(x - t).square().mean() for x, t in zip(frozen, textures[::-1], strict=True)]
    (wanted,) = torch.autograd.grad(sum(squares) / 3, weight, retain_graph=True)
    torch.testing.assert_close(found, wanted)
    assert found.abs().sum() > 0
    reached = torch.autograd.grad(transferal_loss(model(sr=sr), textures, S), [sr, S, *textures])
    assert all(x.abs().sum() > 0 for x in reached)


class Linear(torch.nn.Module):
    """A linear network: its gradient is its weights."""

    def __init__(self, numbers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(numbers, dtype=torch.float64))

    def forward(self, image):
        return image.flatten(1) @ self.weight[:, None]


def test_wgan_gp_of_a_linear_discriminator():
    sr, hr = images(3, 3, 4, 5)
    net = Linear(60)
    loss = discriminator_loss(net, sr, hr, penalty=7.0)
    w, apart = net.weight.detach(), (sr - hr).flatten(1).mean(0)
    norm = math.sqrt(math.fsum(x * x for x in w.tolist()))
    assert loss.item() == pytest.approx((apart @ w).item() + 7 * (norm - 1) ** 2, rel=1e-10)
    loss.backward()
    torch.testing.assert_close(net.weight.grad, apart + 7 * 2 * (norm - 1) * w / norm)


class Square(torch.nn.Module):
    """Sum of a * x**2; its gradient 2 * a * x reveals the position."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, image):
        return self.a * image.square().flatten(1).sum(1, keepdim=True)


def test_wgan_gp_is_computed_between_each_pair():
    """At one random position per pair, from the generator."""
    sr, hr = images(4, 3, 2, 2)
    net = Square()
    loss = discriminator_loss(net, sr, hr, generator=torch.Generator(sr.device).manual_seed(5))
    again = torch.Generator(sr.device).manual_seed(5)
    shares = torch.rand(4, 1, 1, 1, generator=again, dtype=torch.float64).flatten().tolist()
    assert len(set(shares)) == 4
    penalties, slope = [], 0.0
    for share, x, y in zip(shares, hr, sr, strict=True):
        pairs = zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
        between = [share * p + (1 - share) * q for p, q in pairs]
        length = 2 * math.sqrt(sum(p**2 for p in between))
        penalties.append((0.3 * length - 1) ** 2)
        slope += 2 * (0.3 * length - 1) * length / 4
    apart = (sr.square().sum() - hr.square().sum()).item() / 4
    assert loss.item() == pytest.approx(0.3 * apart + 10 * sum(penalties) / 4, rel=1e-10)
    loss.backward()
    assert net.a.grad.item() == pytest.approx(apart + 10 * slope, rel=1e-10)


@each("kind", ["weight", "bias"])
def test_gradient_of_the_penalty_by_finite_differences(kind):
    """With the real discriminator, which has in-place activations."""
    net = Discriminator(32).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.4)  # He's variance: its own weights hardly depend on the image
    sr, hr = images(2, 3, 32, 32)
    weights = dict(net.named_parameters())
    directions = {
        name: torch.randn_like(x) * x.detach().square().mean().sqrt()
        for name, x in weights.items()
        if name.endswith(kind)
    }

    def loss(step=0.0):
        moved = {name: weights[name] + step * along for name, along in directions.items()}
        generator = torch.Generator(sr.device).manual_seed(1)
        return discriminator_loss(
            lambda image: functional_call(net, moved, image), sr, hr, generator=generator
        )

    grads = torch.autograd.grad(loss(), [weights[name] for name in directions])
    pairs = zip(grads, directions.values(), strict=True)
    wanted = sum((grad * along).sum().item() for grad, along in pairs)
    found = (loss(1e-8) - loss(-1e-8)).item() / 2e-8  # so close that no activation changes sign
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@each("kind", ["wgan-gp", "gan"])
def test_discriminator_loss_does_not_reach_the_images(kind):
    sr, hr = (x.requires_grad_() for x in images(2, 3, 4, 5))
    net = Linear(60)
    discriminator_loss(net, sr, hr, kind).backward()
    assert sr.grad is None and hr.grad is None
    assert net.weight.grad.abs().sum() > 0


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_gan():
    sr, hr = images(3, 3, 4, 5)
    net = Linear(60)
    real, fake = (net(x).flatten().tolist() for x in (hr, sr))
    wanted = -sum(map(log_sigmoid, real)) / 6 - sum(log_sigmoid(-x) for x in fake) / 6
    assert discriminator_loss(net, sr, hr, "gan").item() == pytest.approx(wanted, rel=1e-10)
    wanted = -sum(map(log_sigmoid, fake)) / 3
    assert adversarial_loss(net, sr, "gan").item() == pytest.approx(wanted, rel=1e-10)


def test_adversarial():
    (sr,) = images(3, 3, 4, 5, count=1)
    net = Linear(60)
    sr.requires_grad_()
    loss = adversarial_loss(net, sr)
    assert loss.item() == pytest.approx(-sum(net(sr).flatten().tolist()) / 3, rel=1e-10)
    (grad,) = torch.autograd.grad(loss, sr)
    torch.testing.assert_close(grad, (-net.weight / 3).expand(3, -1).view_as(sr))


@each("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_the_penalty_alone(dtype):
    """Squares of its gradient overflow float16."""
    image = torch.rand(2, 3, 4, 5)
    net = Linear(60).float()
    with torch.no_grad():
        net.weight.fill_(300.1)
    with torch.autocast(image.device.type, dtype):
        loss = discriminator_loss(net, image, image)
    norm = 300.1 * math.sqrt(60)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(10 * (norm - 1) ** 2, rel=1e-6)
    loss.backward()
    wanted = torch.full((60,), 20 * (norm - 1) / math.sqrt(60))
    torch.testing.assert_close(net.weight.grad, wanted, rtol=1e-5, atol=0)


@each("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_images_are_compared_in_float32(dtype):
    """Also where the square of a difference overflows float16."""
    sr, hr = torch.full((1, 3, 4, 4), 300.0, dtype=dtype), torch.zeros(1, 3, 4, 4)
    assert reconstruction_loss(sr, hr, "l2").item() == 300**2
    assert transferal_loss([sr] * 3, [hr.to(dtype)] * 3, torch.full((1, 1, 1, 1), 99.0)) == 300**2


@each(
    ("call", "message"),
    [
        (lambda x, y: reconstruction_loss(x, y), r"sr must have the shape \[2, 3, 4, 4\] of hr"),
        (
            lambda x, y: reconstruction_loss(x, x, "l3"),
            r"kind must be one of \('l1', 'l2'\), .*'l3'",
        ),
        (lambda x, y: perceptual_loss(None, x, y), "sr must have the shape"),
        (lambda x, y: transferal_loss([x], [y]), "features must have the shape .* of textures"),
        (lambda x, y: transferal_loss([x] * 3, []), "the same levels, got 3 and 0 maps"),
        (lambda x, y: discriminator_loss(None, x, y), "sr must have the shape"),
        (lambda x, y: discriminator_loss(None, x, x, "gp"), "kind must be one of .*, got 'gp'"),
        (lambda x, y: adversarial_loss(None, x, "lsgan"), "kind must be one of .*, got 'lsgan'"),
    ],
)
def test_arguments_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 4))
