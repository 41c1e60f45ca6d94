"""A training that starts at the enlarged picture."""

import pytest
import torch
import torch.nn.functional as F

from ttsr_fast.model import MainNet
from ttsr_fast.training.start import start_at_enlargement

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
    net = MainNet((1, 2, 1, 1), 12, **switches).double()
    start_at_enlargement(net, share=0)
    lr, *others = maps(7, 8)
    with torch.no_grad():
        inner = net(lr, *others)[:, :, 8:-8, 8:-8]  # beyond the picture there are zeros
    torch.testing.assert_close(inner, bilinear(lr)[:, :, 8:-8, 8:-8])


def test_it_is_close_to_that_and_can_learn() -> None:
    torch.manual_seed(0)
    net = MainNet((1, 1, 1, 1), 16).double()
    before = [x.clone() for x in net.parameters()]
    start_at_enlargement(net)
    lr, *others = maps(7, 8)
    sr = net(lr, *others)
    assert 1e-4 < (sr - bilinear(lr))[:, :, 8:-8, 8:-8].abs().mean() < 0.1
    sr.square().sum().backward()
    for old, parameter in zip(before, net.parameters(), strict=True):
        assert not torch.equal(old, parameter)
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_narrow_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 12 channels or more, got 10"):
        start_at_enlargement(MainNet((1, 1, 1, 1), 10))
