"""The discriminator of the adversarial loss."""

from torch import Tensor, nn

_WIDTHS = (32, 32, 64, 64, 128, 128, 256, 256, 512, 512)
_SLOPE = 0.2


class Discriminator(nn.Module):
    """Critic of an image: one unbounded score, higher for real images (arXiv 2006.04139).

    Ten 3x3 convolutions, every second one with stride 2, and two linear layers; 17,821,473
    parameters for images of 160x160. There is no normalisation, which would couple the images of a
    batch: the gradient penalty of WGAN-GP is defined per image.

    Args:
        size: sides of the images, a multiple of 32.

    Raises:
        ValueError: another size.
    """

    def __init__(self, size: int = 160) -> None:
        super().__init__()
        if size < 32 or size % 32:
            raise ValueError(f"size must be a positive multiple of 32, got {size}")
        self.size = size
        layers: list[nn.Module] = []
        channels = 3
        for number, width in enumerate(_WIDTHS):
            layers.append(nn.Conv2d(channels, width, 3, stride=1 + number % 2, padding=1))
            layers.append(nn.LeakyReLU(_SLOPE, inplace=True))
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear((size // 32) ** 2 * channels, 1024),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Linear(1024, 1),
        )

    def forward(
        self,
        image: Tensor,  # [N, 3, size, size]
    ) -> Tensor:  # [N, 1]
        """Scores of images in [-1, 1]; logits for the GAN of Goodfellow et al."""
        if list(image.shape[1:]) != [3, self.size, self.size]:
            raise ValueError(
                f"image must be [N, 3, {self.size}, {self.size}], got {list(image.shape)}"
            )
        return self.classifier(self.features(image).flatten(1))
