"""VGG19 up to relu5_1, for the perceptual loss, and the search for its weights."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ttsr_fast.model.checkpoint import read_tensors
from ttsr_fast.model.convolution import channels_last_on_cpu
from ttsr_fast.model.lte import IMAGENET_MEAN, IMAGENET_STD, copy_vgg19

# Channels of the convolutions, block by block; between blocks are pools.
_BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,))


class VGG19(nn.Module):
    """Features of VGG19 (arXiv 1409.1556) at relu5_1; frozen.

    Args:
        weights: trained on ImageNet, in torchvision's naming (`features.0.weight`, ...), as
            `find_vgg19` returns them; other layers are ignored.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block in _BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in block:
                conv = nn.utils.skip_init(nn.Conv2d, channels, width, 3, padding=1)
                layers += [conv, nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        copy_vgg19(weights, dict(self.named_parameters()))
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(
        self,
        image: Tensor,  # [N, 3, H, W]
    ) -> Tensor:  # [N, 512, H // 16, W // 16]
        """relu5_1 of `image`, with pixels in [0, 1]; H and W are at least 16."""
        if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 16:
            raise ValueError(
                f"image must be [N, 3, H, W], at least 16x16 pixels, got {list(image.shape)}"
            )
        return self.features(channels_last_on_cpu((image - self.mean) / self.std))


def find_vgg19(path: str | os.PathLike[str] | None = None) -> dict[str, Tensor]:
    """VGG19's convolutions, trained on ImageNet, in torchvision's naming; never downloaded.

    Args:
        path: a file of weights, `.safetensors` or written by `torch.save`; None for torchvision's
            file in torch.hub's cache (`$TORCH_HOME/hub/checkpoints/vgg19-*.pth`).

    Raises:
        FileNotFoundError: the cache has no such file.
        RuntimeError: the file cannot be read.
        ValueError: it holds other things than tensors.
    """
    if path is None:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        found = sorted(cache.glob("vgg19-*.pth"))
        if not found:
            raise FileNotFoundError(
                f"no weights of VGG19: there is no vgg19-*.pth in {cache}; put torchvision's "
                "vgg19-dcbb9e9d.pth there, or name a file"
            )
        path = found[0]
    tensors = read_tensors(path)
    return {name: x for name, x in tensors.items() if name.startswith("features.")}
