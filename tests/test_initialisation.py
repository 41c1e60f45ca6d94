"""Initial weights that upscale bilinearly."""

import pytest
import torch
import torch.nn.functional as F

from ttsr_fast.model import TTSR
from ttsr_fast.training.initialisation import initialise_as_upscaling

each = pytest.mark.parametrize


def maps(h: int, w: int) -> list[torch.Tensor]:
    shapes = [(3, 1), (1, 1), (256, 1), (128, 2), (64, 4)]
    return [torch.rand(2, c, s * h, s * w).double() * 2 - 1 for c, s in shapes]


def bilinear(x: torch.Tensor) -> torch.Tensor:
    for _ in range(2):
        x = F.interpolate(x, scale_factor=2, mode="bilinear")
    return x


@each("switches", [{}, {"csfi": False}, {"hard_attention": False}, {"soft_attention": False}])
def test_it_interpolates(switches: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = TTSR((1, 2, 1, 1), 12, **switches).double()
    initialise_as_upscaling(model, share=0)
    net = model.MainNet
    lr, *others = maps(7, 8)
    with torch.no_grad():
        inner = net(lr, *others)[:, :, 8:-8, 8:-8]  # zero padding reaches 8 pixels into the image
    torch.testing.assert_close(inner, bilinear(lr)[:, :, 8:-8, 8:-8])


def test_it_is_close_to_interpolation_and_can_learn() -> None:
    torch.manual_seed(0)
    model = TTSR((1, 1, 1, 1), 16).double()
    learnt = [x for x in model.parameters() if x.requires_grad]
    before = [x.detach().clone() for x in learnt]
    initialise_as_upscaling(model)
    lr, ref = (torch.rand(2, 3, n, n).double() * 2 - 1 for n in (7, 32))
    lrsr = F.interpolate(lr, scale_factor=4)
    sr = model(lr, lrsr, ref, ref)[0]
    assert 1e-4 < (sr - bilinear(lr))[:, :, 8:-8, 8:-8].abs().mean() < 0.1
    optimizer = torch.optim.Adam(learnt, 1e-4)
    sr.square().sum().backward()
    optimizer.step()  # the textures count from now on, and LTE learns
    optimizer.zero_grad()
    model(lr, lrsr, ref, ref)[0].square().sum().backward()
    for old, parameter in zip(before, learnt, strict=True):
        assert not torch.equal(old, parameter)
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_features_are_scaled() -> None:
    torch.manual_seed(0)
    model = TTSR((1, 1, 1, 1), 16).double()
    image = torch.rand(1, 3, 16, 16).double()
    before = [x.detach() for x in model.LTE(image)]
    initialise_as_upscaling(model)
    for old, new, halvings in zip(before, model.LTE(image), (1, 3, 5), strict=True):
        torch.testing.assert_close(new, old / 2**halvings)


def test_narrow_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 12 channels or more, got 10"):
        initialise_as_upscaling(TTSR((1, 1, 1, 1), 10))
