"""Where a training starts, if neither at random weights nor at a checkpoint."""

import torch
from torch import nn

from ttsr_fast.model import MainNet

LEAST_FEATS = 12  # six channels carry the picture, and the last layers have half of them
_SHARE = 0.03


@torch.no_grad()
def start_at_enlargement(net: MainNet, share: float = _SHARE) -> None:
    """Let a network repeat the pixels of its input, four times along each axis.

    TTSR has no connection from its input to its output: at random weights it spends thousands of
    steps on learning to pass the picture on. Here three channels carry it and three its negative,
    of which a ReLU lets one pass at every pixel; convolutions pass on what they are given, and the
    pixel shuffles repeat it (as in Aitken et al., arXiv 1707.02937).

    Args:
        net: changed in place; of `LEAST_FEATS` channels or more.
        share: of the weights it had, which are added and break the symmetry.

    Raises:
        ValueError: `net` has fewer channels.
    """
    head, tail = net.SFE.conv_head, net.merge_tail.conv_tail2
    if head.out_channels < LEAST_FEATS:
        raise ValueError(
            f"a network that starts at enlargement needs {LEAST_FEATS} channels or more, "
            f"got {head.out_channels}"
        )
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):
            conv.weight.mul_(share)
            conv.bias.zero_()  # type: ignore[union-attr]
            if name.split(".")[-1] in ("conv_merge", "conv_merge1", "conv_merge2", "conv_merge3"):
                _pass_on(conv)
    _pass_on(net.merge_tail.conv_tail1)
    for shuffled in (net.conv12, net.conv23):
        _pass_on(shuffled, copies=4)
    for sign, first in ((1.0, 0), (-1.0, 3)):
        for colour in range(3):
            head.weight[first + colour, colour, 1, 1] += sign
            tail.weight[colour, first + colour, 0, 0] += sign


def _pass_on(conv: nn.Conv2d, copies: int = 1) -> None:
    """Add each of the first input channels to so many outputs, one after the other."""
    for channel in range(conv.out_channels):
        conv.weight[channel, channel // copies, 1, 1] += 1
