"""The learnable texture extractor: the first three levels of VGG19."""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from ttsr_fast.model.convolution import channels_last_on_cpu, convolve

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_logger = logging.getLogger(__name__)


class LTE(nn.Module):
    """Features of an image at full, half and quarter size (arXiv 2006.04139, section 3.1).

    Layers keep VGG19's numbers: `slice2.5` here is `features.5` in torchvision. Before them the
    frozen `sub_mean` normalises pixels with ImageNet's mean and standard deviation. 555,340
    parameters, 12 of them in `sub_mean`.

    Without `vgg19` the weights are random, after He et al. (arXiv 1502.01852: normal, variance
    2 / fan-in, zero bias), and a log message says so once per process.

    Args:
        vgg19: weights trained on ImageNet in torchvision's naming, as `load_vgg19` takes them.
    """

    def __init__(self, vgg19: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.sub_mean = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.slice1 = _Slice(0, _conv3(3, 64), _relu())
        self.slice2 = _Slice(2, _conv3(64, 64), _relu(), _pool(), _conv3(64, 128), _relu())
        self.slice3 = _Slice(7, _conv3(128, 128), _relu(), _pool(), _conv3(128, 256), _relu())
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        scale = torch.diag(1 / std)[:, :, None, None]
        self.sub_mean.load_state_dict({"weight": scale, "bias": -mean / std})
        if vgg19 is not None:
            self.load_vgg19(vgg19)
        elif not self.sub_mean.weight.is_meta:  # on "meta", values are yet to come
            _say_random()

    def forward(
        self,
        image: Tensor,  # [N, 3, H, W]
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three levels of `image`, with pixels in [0, 1]; H and W are at least 4.

        Args:
            image: in the type of the weights.
            dtype: type of the convolutions and their results; None for the type of the weights.

        Returns:
            lv1 `[N, 64, H, W]`, lv2 `[N, 128, H // 2, W // 2]` and lv3 `[N, 256, H // 4, W // 4]`,
            each after its ReLU.
        """
        lv1 = self.slice1(channels_last_on_cpu(self._normalised(image).to(dtype or image.dtype)))
        lv2 = self.slice2(lv1)
        return lv1, lv2, self.slice3(lv2)

    def _normalised(self, image: Tensor) -> Tensor:
        """`sub_mean(image)`, summed channel by channel.

        A convolution of three channels rounds differently for other sizes of the image, unlike one
        of more channels: windows of an image would not be bit-equal to the whole.
        """
        weight, bias = self.sub_mean.weight, self.sub_mean.bias
        assert bias is not None
        total = bias[:, None, None]
        for channel in range(weight.shape[1]):
            total = total + weight[:, channel] * image[:, channel : channel + 1]
        return total

    def load_vgg19(self, weights: Mapping[str, Tensor]) -> None:
        """Copy VGG19's first five convolutions.

        Args:
            weights: torchvision's `vgg19` state dict (`features.0.weight`, ...), as
                `ttsr_fast.model.checkpoint.read_tensors` reads it; other layers are ignored.

        Raises:
            ValueError: a tensor is missing or has another shape; then nothing is changed.
        """
        own = {
            "features." + name.partition(".")[2]: parameter
            for name, parameter in self.named_parameters()
            if name.startswith("slice")
        }
        copy_vgg19(weights, own)


def copy_vgg19(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Copy the tensors of VGG19 that `own` names; ValueError, without changes, for a misfit."""
    bad = [n for n, p in own.items() if n not in weights or weights[n].shape != p.shape]
    if bad:
        raise ValueError(
            "vgg19 must hold the weights of VGG19 in torchvision's naming; "
            f"{len(bad)} of {len(own)} are missing or of another shape ({bad[0]}, ...)"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


@cache
def _say_random() -> None:
    _logger.warning(
        "LTE starts from random weights (He initialisation). The published results need either "
        "VGG19's ImageNet weights (vgg19=) or a trained checkpoint (load_model)."
    )


class _Slice(nn.Sequential):
    """Layers with their numbers in VGG19 as names; a ReLU follows each convolution."""

    def __init__(self, first: int, *layers: nn.Module) -> None:
        super().__init__(OrderedDict((str(i), layer) for i, layer in enumerate(layers, first)))

    def forward(self, x: Tensor) -> Tensor:
        relu = False  # done with the convolution before
        for layer, following in itertools.zip_longest(self, list(self)[1:]):
            if relu:
                relu = False
            elif isinstance(layer, nn.Conv2d) and isinstance(following, nn.ReLU):
                x, relu = convolve(layer, x, relu=True), True
            else:
                x = layer(x)
        return x


def _conv3(channels: int, out_channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out_channels, 3, padding=1)
    weight, bias = conv.parameters()
    nn.init.kaiming_normal_(weight, nonlinearity="relu")
    nn.init.zeros_(bias)
    return conv


def _relu() -> nn.ReLU:
    return nn.ReLU(inplace=True)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(2)
