"""The losses of TTSR's training (arXiv 2006.04139, section 3.3), each a scalar.

Images are `[N, 3, H, W]` in [-1, 1]. Under autocast, and for 16-bit inputs, differences are taken
and averaged in float32. ValueError if shapes differ or a `kind` is unknown.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.model.vgg import VGG19

Network = Callable[[Tensor], Tensor]

_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}
_GANS = ("wgan-gp", "gan")


def reconstruction_loss(sr: Tensor, hr: Tensor, kind: str = "l1") -> Tensor:
    """Mean absolute (`"l1"`) or squared (`"l2"`) difference of all numbers."""
    _check_kind(kind, tuple(_DISTANCES))
    _check_shapes("sr", sr, "hr", hr)
    return _DISTANCES[kind](_wide(sr), _wide(hr))


def perceptual_loss(vgg: VGG19, sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared difference of both images' relu5_1; no gradient reaches `hr`."""
    _check_shapes("sr", sr, "hr", hr)
    with torch.no_grad():
        wanted = vgg((hr + 1) / 2)
    return F.mse_loss(_wide(vgg((sr + 1) / 2)), _wide(wanted))


def transferal_loss(
    features: Sequence[Tensor],
    textures: Sequence[Tensor],
    S: Tensor | None = None,  # [N, 1, H, W]
    kind: str = "l2",
) -> Tensor:
    """How far the features of the result are from the textures, mean over the three levels.

    Gradients flow to both: textures are to become such as the result can have.

    Args:
        features: lv1, lv2 and lv3 of the result, as `TTSR.forward(sr=...)` returns them.
        textures: T_lv3, T_lv2 and T_lv1, as `TTSR.forward` returns them.
        S: the confidence; where it is given, both are multiplied by its sigmoid, after `S` has been
            enlarged to their size (bicubic).
        kind: `"l1"` or `"l2"`, as for `reconstruction_loss`.
    """
    if len(features) != len(textures) or not textures:
        raise ValueError(
            f"features and textures must be of the same levels, got {len(features)} and "
            f"{len(textures)} maps; a model without hard attention has none"
        )
    losses = []
    for level, texture in zip(features, textures[::-1], strict=True):
        _check_shapes("features", level, "textures", texture)
        level, texture = _wide(level), _wide(texture)
        if S is not None:
            weight = F.interpolate(_wide(S), size=level.shape[2:], mode="bicubic").sigmoid()
            level, texture = level * weight, texture * weight
        losses.append(reconstruction_loss(level, texture, kind))
    return torch.stack(losses).mean()


def discriminator_loss(
    discriminator: Network,
    sr: Tensor,
    hr: Tensor,
    kind: str = "wgan-gp",
    penalty: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What the discriminator is trained with; no gradient reaches `sr` and `hr`.

    - `"wgan-gp"` (Gulrajani et al., arXiv 1704.00028, algorithm 1): mean D(sr) - mean D(hr) +
      penalty * mean((||g|| - 1)**2), where g is the gradient of D at e * hr + (1 - e) * sr and its
      norm is over all numbers of an image. The penalty is computed in float32.
    - `"gan"` (Goodfellow et al., arXiv 1406.2661): the mean of the cross entropies of `hr` being
      real and of `sr` being not.

    Args:
        discriminator: takes images and returns their scores `[N, 1]`.
        sr: results.
        hr: the same number of real images.
        kind: `"wgan-gp"` or `"gan"`.
        penalty: weight of the gradient penalty.
        generator: draws the e of every image, uniform in [0, 1); None for the default one.
    """
    _check_kind(kind, _GANS)
    _check_shapes("sr", sr, "hr", hr)
    sr, hr = sr.detach(), hr.detach()
    fake, real = _wide(discriminator(sr)), _wide(discriminator(hr))
    if kind == "gan":
        return (_cross_entropy(real, 1) + _cross_entropy(fake, 0)) / 2
    return fake.mean() - real.mean() + penalty * _steepness(discriminator, sr, hr, generator)


def adversarial_loss(discriminator: Network, sr: Tensor, kind: str = "wgan-gp") -> Tensor:
    """What the generator is trained with: -mean D(sr), or the cross entropy of `sr` being real.

    Gradients flow through the discriminator, and to its weights unless they are frozen.
    """
    _check_kind(kind, _GANS)
    score = _wide(discriminator(sr))
    return _cross_entropy(score, 1) if kind == "gan" else -score.mean()


def _steepness(
    discriminator: Network,
    sr: Tensor,
    hr: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean of (||g|| - 1)**2."""
    sr, hr = _wide(sr), _wide(hr)
    # Drawn where the generator is: the same numbers then serve any device.
    device = sr.device if generator is None else generator.device
    share = torch.rand(len(sr), 1, 1, 1, generator=generator, dtype=sr.dtype, device=device)
    share = share.to(sr.device)
    between = (share * hr + (1 - share) * sr).requires_grad_()
    with torch.autocast(sr.device.type, enabled=False):
        score = discriminator(between).sum()
        (gradient,) = torch.autograd.grad(score, between, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


def _cross_entropy(score: Tensor, target: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(score, torch.full_like(score, target))


def _wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind must be one of {kinds}, got {kind!r}")


def _check_shapes(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape {list(other.shape)} of {other_name}, got {list(x.shape)}"
        )
