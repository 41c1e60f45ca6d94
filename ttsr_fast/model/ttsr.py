"""The whole model: texture extractor, search and transfer, main network."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ttsr_fast.model.lte import LTE
from ttsr_fast.model.main_net import MainNet
from ttsr_fast.modules import SearchTransfer


class TTSR(nn.Module):
    """Texture transformer network for x4 super-resolution with a reference (arXiv 2006.04139).

    Its state dict is the official checkpoint: 316 tensors, `MainNet.*` and `LTE.*`. As published it
    has 6,729,615 parameters. Training gives `MainNet` and `LTE` different learning rates.

    Each part can be left out for ablations (section 4.4). A model without hard attention is a plain
    network: it has no `LTE` and needs no reference.

    Args:
        num_res_blocks: residual blocks of the feature encoder and of every branch at 1x, 2x and 4x.
        n_feats: channels of the main network, even.
        res_scale: factor of every residual block's update.
        vgg19: VGG19's ImageNet weights for the start of LTE, see `LTE.load_vgg19`. Nothing is ever
            downloaded; without them LTE starts from random weights.
        precision: as for `ttsr_fast.search`.
        backend: as for `ttsr_fast.search`.
        hard_attention: whether textures are searched and transferred. Without,
            `soft_attention`, `vgg19`, `precision` and `backend` have no effect.
        soft_attention: as for `MainNet`.
        csfi: as for `MainNet`.

    Raises:
        ValueError: sizes that make no network, or weights that are not VGG19's.
    """

    def __init__(
        self,
        num_res_blocks: Sequence[int] = (16, 16, 8, 4),
        n_feats: int = 64,
        res_scale: float = 1.0,
        *,
        vgg19: Mapping[str, Tensor] | None = None,
        precision: str | None = None,
        backend: str | None = None,
        hard_attention: bool = True,
        soft_attention: bool = True,
        csfi: bool = True,
    ) -> None:
        super().__init__()
        self.hard_attention = hard_attention
        self.MainNet = MainNet(
            num_res_blocks,
            n_feats,
            res_scale,
            hard_attention=hard_attention,
            soft_attention=soft_attention,
            csfi=csfi,
        )
        if hard_attention:
            self.LTE = LTE(vgg19)
            self.SearchTransfer = SearchTransfer(precision=precision, backend=backend)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.MainNet.SFE.conv_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which images are expected."""
        return self.MainNet.SFE.conv_head.weight.dtype

    def forward(
        self,
        lr: Tensor | None = None,  # [N, 3, H, W]
        lrsr: Tensor | None = None,  # [N, 3, 4*H, 4*W]
        ref: Tensor | None = None,  # [N or 1, 3, HR, WR]
        refsr: Tensor | None = None,  # [N or 1, 3, HR, WR]
        sr: Tensor | None = None,  # [N, 3, H, W]
        *,
        key_mask: Tensor | None = None,  # [N or 1, HR // 4, WR // 4] bool
    ) -> tuple[Tensor, ...]:
        """Super-resolve `lr`; or, given `sr` alone, its features for the transferal loss.

        All images are RGB in [-1, 1], and in the dtype of the model.

        Args:
            lr: the low-resolution image.
            lrsr: `lr`, x4 up (bicubic).
            ref: the reference, at least 4x4 pixels, of any size; batch 1 is for the whole batch.
            refsr: `ref`, x4 down and x4 up again, so that it looks like `lrsr`.
            sr: any image of at least 4x4 pixels, instead of all others.
            key_mask: False for every 4x4 pixels of `ref` that must not be matched, such as a
                padding.

        Without hard attention only `lr` is used.

        Returns:
            `sr` `[N, 3, 4*H, 4*W]` in [-1, 1], `S` `[N, 1, H, W]`, `T_lv3` `[N, 256, H, W]`,
            `T_lv2` `[N, 128, 2*H, 2*W]` and `T_lv1` `[N, 64, 4*H, 4*W]`. No gradient reaches
            `lrsr`, `ref` and `refsr`. Without hard attention a tuple of `sr` alone. Or, for the
            argument `sr`, the levels lv1, lv2 and lv3 of `LTE_copy`.

        Raises:
            TypeError: an image is missing or no tensor.
            ValueError: images or a mask of shapes that do not fit, a mask without a True, `sr`
                together with others or without hard attention.
        """
        if sr is not None:
            if not (lr is lrsr is ref is refsr is key_mask is None):
                raise ValueError(
                    "sr must be given alone, without lr, lrsr, ref, refsr and key_mask"
                )
            if not self.hard_attention:
                raise ValueError("sr must be None for a model without hard attention: it lacks LTE")
            return self.LTE_copy((_checked("sr", sr, 4) + 1) / 2)
        lr = _checked("lr", lr, 1)
        if not self.hard_attention:
            return (self.MainNet(lr, None, None, None, None),)
        textures = self._search_and_transfer(*_checked_pair(lr, lrsr, ref, refsr), key_mask)
        return self.MainNet(lr, *textures), *textures

    def LTE_copy(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`LTE(image)` with the current weights as constants.

        Gradients flow to the image only; `image` is in [0, 1]. Under DistributedDataParallel call
        this, or `forward(sr=...)`, on the wrapped module: there is nothing to synchronise.
        """
        weights = {name: parameter.detach() for name, parameter in self.LTE.named_parameters()}
        return functional_call(self.LTE, weights, image)

    def _search_and_transfer(
        self, lrsr: Tensor, ref: Tensor, refsr: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """S, T_lv3, T_lv2, T_lv1. LTE's maps are freed on return."""
        query, key = (self.LTE((image.detach() + 1) / 2)[2] for image in (lrsr, refsr))
        values = self.LTE((ref.detach() + 1) / 2)
        return self.SearchTransfer(query, key, *values, key_mask=key_mask)


def _checked_pair(
    lr: Tensor, lrsr: Tensor | None, ref: Tensor | None, refsr: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    lrsr, ref, refsr = (
        _checked(name, image, 4) for name, image in (("lrsr", lrsr), ("ref", ref), ("refsr", refsr))
    )
    n, _, h, w = lr.shape
    if list(lrsr.shape) != [n, 3, 4 * h, 4 * w]:
        raise ValueError(
            f"lrsr must be {[n, 3, 4 * h, 4 * w]}, four times lr {list(lr.shape)}, "
            f"got {list(lrsr.shape)}"
        )
    if refsr.shape != ref.shape:
        raise ValueError(
            f"refsr must have the shape of ref {list(ref.shape)}, got {list(refsr.shape)}"
        )
    if ref.shape[0] not in (1, n):
        raise ValueError(f"ref must have batch size 1 or {n} (that of lr), got {list(ref.shape)}")
    return lrsr, ref, refsr


def _checked(name: str, image: Tensor | None, least: int) -> Tensor:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a [N, 3, H, W] tensor, got {type(image).__name__}")
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"{name} must be [N, 3, H, W], got {list(image.shape)}")
    if min(image.shape[2:]) < least:
        raise ValueError(f"{name} must be at least {least}x{least} pixels, got {list(image.shape)}")
    return image
