"""Losses of TTSR's training (arXiv 2006.04139, section 3.3), each a scalar.

Images are `[N, 3, H, W]` in [-1, 1]. Under autocast, and for 16-bit inputs, differences are
computed and averaged in float32. Different shapes and an unknown `kind` raise ValueError.
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
    """Mean absolute (`"l1"`) or squared (`"l2"`) difference of all values."""
    _check_kind(kind, tuple(_DISTANCES))
    _check_shapes("sr", sr, "hr", hr)
    return _DISTANCES[kind](_float32(sr), _float32(hr))


def perceptual_loss(vgg: VGG19, sr: Tensor, hr: Tensor) -> Tensor:
    """Mean squared difference of both images' relu5_1; no gradient reaches `hr`."""
    _check_shapes("sr", sr, "hr", hr)
    with torch.no_grad():
        target = vgg((hr + 1) / 2)
    return F.mse_loss(_float32(vgg((sr + 1) / 2)), _float32(target))


def transferal_loss(
    features: Sequence[Tensor],
    textures: Sequence[Tensor],
    S: Tensor | None = None,  # [N, 1, H, W]
    kind: str = "l2",
) -> Tensor:
    """Difference between the features of the result and the textures, mean over the three levels.

    Gradients flow to both, so that the textures become features that the result can have.

    Args:
        features: lv1, lv2 and lv3 of the result, from `TTSR.forward(sr=...)`.
        textures: T_lv3, T_lv2 and T_lv1, from `TTSR.forward`.
        S: confidence; both are multiplied by its sigmoid after `S` is upscaled to their size
            (bicubic). None for no weights.
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
        level, texture = _float32(level), _float32(texture)
        if S is not None:
            weight = F.interpolate(_float32(S), size=level.shape[2:], mode="bicubic").sigmoid()
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
    """Loss of the discriminator; no gradient reaches `sr` and `hr`.

    - `"wgan-gp"` (Gulrajani et al., arXiv 1704.00028, algorithm 1): mean D(sr) - mean D(hr) +
      penalty * mean((||g|| - 1)**2), where g is the gradient of D at e * hr + (1 - e) * sr and its
      norm is over all values of an image. The penalty is computed in float32.
    - `"gan"` (Goodfellow et al., arXiv 1406.2661): mean of the cross entropies for `hr` as real and
      for `sr` as not real.

    Args:
        discriminator: function from images to scores `[N, 1]`.
        sr: results.
        hr: the same number of real images.
        kind: `"wgan-gp"` or `"gan"`.
        penalty: weight of the gradient penalty.
        generator: of e, one number per image, uniform in [0, 1); None for the default one.
    """
    _check_kind(kind, _GANS)
    _check_shapes("sr", sr, "hr", hr)
    sr, hr = sr.detach(), hr.detach()
    fake, real = _float32(discriminator(sr)), _float32(discriminator(hr))
    if kind == "gan":
        return (_cross_entropy(real, 1) + _cross_entropy(fake, 0)) / 2
    return fake.mean() - real.mean() + penalty * _gradient_penalty(discriminator, sr, hr, generator)


def adversarial_loss(discriminator: Network, sr: Tensor, kind: str = "wgan-gp") -> Tensor:
    """Loss of the generator: -mean D(sr), or the cross entropy for `sr` as real.

    Gradients flow through the discriminator, and to its weights unless they are frozen.
    """
    _check_kind(kind, _GANS)
    score = _float32(discriminator(sr))
    return _cross_entropy(score, 1) if kind == "gan" else -score.mean()


def _gradient_penalty(
    discriminator: Network,
    sr: Tensor,
    hr: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Mean of (||g|| - 1)**2."""
    sr, hr = _float32(sr), _float32(hr)
    # Sampled on the generator's device, so that the numbers are the same for all devices.
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


def _float32(x: Tensor) -> Tensor:
    """`x` in float32, or float64 unchanged."""
    return x if x.dtype == torch.float64 else x.float()


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind must be one of {kinds}, got {kind!r}")


def _check_shapes(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.shape != other.shape:
        raise ValueError(
            f"{name} must have the shape {list(other.shape)} of {other_name}, got {list(x.shape)}"
        )
