"""Initial weights for `model.start=enlargement`."""

import torch
from torch import Tensor, nn

from ttsr_fast.model import TTSR
from ttsr_fast.model.main_net import Attention

LEAST_FEATS = 12  # six channels carry the image, and the last layers have half of them
_SHARE = 0.03
_QUIET = 0.5  # factor of LTE's weights


@torch.no_grad()
def initialise_as_upscaling(model: TTSR, share: float = _SHARE) -> None:
    """Make a model upscale bilinearly, twice by two, independently of its reference.

    TTSR has no connection from its input to its output: from random weights, it spends thousands of
    steps on learning to pass the image on. Here three channels carry the image and three its
    negative, of which a ReLU passes one at every pixel. Convolutions pass their input on, and
    the convolutions before the pixel shuffles interpolate (in Aitken et al., arXiv 1707.02937, they
    repeat).

    The weights of LTE are reduced. The search ignores the size of its features, but Adam's first
    steps have the same size for every weight, and would disturb the image through the textures.

    Args:
        model: changed in place; of `LEAST_FEATS` channels or more.
        share: factor of MainNet's random weights, which are added to break the symmetry.

    Raises:
        ValueError: `model` has fewer channels.
    """
    net = model.MainNet
    head, tail = net.SFE.conv_head, net.merge_tail.conv_tail2
    n = head.out_channels
    if n < LEAST_FEATS:
        raise ValueError(f"model.start=enlargement needs {LEAST_FEATS} channels or more, got {n}")
    if model.hard_attention:
        for parameter in (x for x in model.LTE.parameters() if x.requires_grad):
            parameter.mul_(_QUIET)
    identity = torch.zeros(1, 3, 3)
    identity[0, 1, 1] = 1
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.mul_(share)
            conv.bias.zero_()  # type: ignore[union-attr]
            if isinstance(conv, Attention):
                conv.weight[:, n:] = 0  # of the textures
            if name.split(".")[-1] in ("conv_merge", "conv_merge1", "conv_merge2", "conv_merge3"):
                _pass_on(conv, identity)
    _pass_on(net.merge_tail.conv_tail1, identity)
    nearer = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.75, 0.25]])  # first and second of two pixels
    phases = (nearer[:, None, :, None] * nearer[None, :, None, :]).reshape(4, 3, 3)
    for shuffled in (net.conv12, net.conv23):
        _pass_on(shuffled, phases)
    for sign, first in ((1.0, 0), (-1.0, 3)):
        for colour in range(3):
            head.weight[first + colour, colour, 1, 1] += sign
            tail.weight[colour, first + colour, 0, 0] += sign


def _pass_on(
    conv: nn.Conv2d,
    filters: Tensor,  # [K, 3, 3]
) -> None:
    """Add every filter of every input channel to the outputs, in that order."""
    for channel in range(conv.out_channels):
        weight = conv.weight[channel, channel // len(filters)]
        weight += filters[channel % len(filters)].to(weight)
