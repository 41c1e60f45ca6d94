"""TTSR's main network: soft attention at three scales and cross-scale feature integration (CSFI).

Modules carry the names of the official checkpoint. `x1`, `x2` and `x4` are feature maps at one, two
and four times the size of the low-resolution image.

A 1x1 convolution and a bicubic upscaling commute, as the weights of the latter sum to 1: here the
convolution comes first, on a quarter or a sixteenth of the pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttsr_fast.model.bicubic import bicubic_by_products
from ttsr_fast.model.convolution import (
    channels_last_on_cpu,
    convolve,
    has_hooks,
    is_inference,
    is_large_on_cpu,
)


class MainNet(nn.Module):
    """Super-resolution of an image from it and the transferred textures (section 3.2).

    6,174,275 parameters as published. Architecture: arXiv 2006.04139, figures 2 and 3.

    Args:
        num_res_blocks: residual blocks of the feature encoder and of every branch at 1x, 2x and 4x.
        n_feats: channels of the trunk, even.
        res_scale: factor of every residual block's update.
        hard_attention: whether textures are transferred at all. Without, the only input is `x`, and
            `conv11_head`, `conv22_head` and `conv33_head` do not exist.
        soft_attention: whether the confidence S weights them. Without, S counts as 1.
        csfi: whether scales exchange features before the last maps are merged. Without, `ex12` and
            `ex123` do not exist.

    Raises:
        ValueError: `num_res_blocks` is not four counts, or `n_feats` is odd or not positive.
    """

    def __init__(
        self,
        num_res_blocks: Sequence[int] = (16, 16, 8, 4),
        n_feats: int = 64,
        res_scale: float = 1.0,
        *,
        hard_attention: bool = True,
        soft_attention: bool = True,
        csfi: bool = True,
    ) -> None:
        super().__init__()
        if len(num_res_blocks) != 4 or min(num_res_blocks) < 0:
            raise ValueError(f"num_res_blocks must be four counts, got {tuple(num_res_blocks)}")
        if n_feats < 2 or n_feats % 2:
            raise ValueError(f"n_feats must be even and positive, got {n_feats}")
        n = n_feats

        def attention(channels: int, scale: int) -> nn.Module:
            if not hard_attention:
                return NoAttention()
            return Attention(n, channels, scale, soft_attention)

        _, count1, count2, count4 = num_res_blocks
        self.SFE = SFE(num_res_blocks[0], n, res_scale)

        self.conv11_head = attention(256, 1)
        self.RB11 = _res_blocks(count1, n, res_scale)
        self.conv11_tail = _conv3(n, n)

        self.conv12 = _conv3(n, 4 * n)
        self.conv22_head = attention(128, 2)
        self.ex12 = CSFI2(n) if csfi else NoCSFI()
        self.RB21 = _res_blocks(count2, n, res_scale)
        self.RB22 = _res_blocks(count2, n, res_scale)
        self.conv21_tail = _conv3(n, n)
        self.conv22_tail = _conv3(n, n)

        self.conv23 = _conv3(n, 4 * n)
        self.conv33_head = attention(64, 4)
        self.ex123 = CSFI3(n) if csfi else NoCSFI()
        self.RB31 = _res_blocks(count4, n, res_scale)
        self.RB32 = _res_blocks(count4, n, res_scale)
        self.RB33 = _res_blocks(count4, n, res_scale)
        self.conv31_tail = _conv3(n, n)
        self.conv32_tail = _conv3(n, n)
        self.conv33_tail = _conv3(n, n)

        self.merge_tail = MergeTail(n)

    def forward(
        self,
        x: Tensor,  # [N, 3, H, W]
        S: Tensor | None,  # [N, 1, H, W]
        T_lv3: Tensor | None,  # [N, 256, H, W]
        T_lv2: Tensor | None,  # [N, 128, 2*H, 2*W]
        T_lv1: Tensor | None,  # [N, 64, 4*H, 4*W]
    ) -> Tensor:  # [N, 3, 4*H, 4*W]
        """Image in [-1, 1], for `x` in [-1, 1] and the outputs of `SearchTransfer`.

        Without hard attention S and the textures are not used and may be None.
        """
        x1 = self.attend1(self.SFE(x), S, T_lv3)
        x1, x2 = self.attend2(x1, S, T_lv2)
        x4 = self.attend4(x2, S, T_lv1)
        out1, out2, out4 = self.ex123(x1, x2, x4)
        return self.merge(*self.refine(x1, x2, out1, out2), x4, out4)

    def attend1(self, x: Tensor, S: Tensor | None, T_lv3: Tensor | None) -> Tensor:
        """Attention at 1x, and the residual blocks."""
        x1 = self.conv11_head(x, S, T_lv3)
        return convolve(self.conv11_tail, self.RB11(x1), add=x1)

    def attend2(self, x1: Tensor, S: Tensor | None, T_lv2: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention at 2x, integration and residual blocks of both scales."""
        x2 = F.pixel_shuffle(convolve(self.conv12, x1, relu=True), 2)
        x2 = self.conv22_head(x2, S, T_lv2)
        out1, out2 = self.ex12(x1, x2)
        x1 = convolve(self.conv21_tail, self.RB21(out1), add=x1)
        return x1, convolve(self.conv22_tail, self.RB22(out2), add=x2)

    def attend4(self, x2: Tensor, S: Tensor | None, T_lv1: Tensor | None) -> Tensor:
        """Attention at 4x."""
        x4 = F.pixel_shuffle(convolve(self.conv23, x2, relu=True), 2)
        return self.conv33_head(x4, S, T_lv1)

    def refine(self, x1: Tensor, x2: Tensor, out1: Tensor, out2: Tensor) -> tuple[Tensor, Tensor]:
        """Last residual blocks of 1x and 2x, on the outputs of `ex123`."""
        return (
            convolve(self.conv31_tail, self.RB31(out1), add=x1),
            convolve(self.conv32_tail, self.RB32(out2), add=x2),
        )

    def merge(self, x1: Tensor, x2: Tensor, x4: Tensor, out4: Tensor) -> Tensor:
        """Last residual blocks of 4x, and the image; `x4` may be overwritten."""
        x4 = convolve(self.conv33_tail, self.RB33(out4), add=x4, in_place=True)
        return self.merge_tail(x1, x2, x4)


class SFE(nn.Module):
    """Shallow features of the low-resolution image: `[N, 3, H, W]` to `[N, n, H, W]`."""

    def __init__(self, num_res_blocks: int, n_feats: int, res_scale: float) -> None:
        super().__init__()
        self.conv_head = _conv3(3, n_feats)
        self.RBs = _res_blocks(num_res_blocks, n_feats, res_scale)
        self.conv_tail = _conv3(n_feats, n_feats)

    def forward(self, x: Tensor) -> Tensor:
        x = convolve(self.conv_head, channels_last_on_cpu(x), relu=True)
        return convolve(self.conv_tail, self.RBs(x), add=x, in_place=True)


class Attention(nn.Conv2d):
    """Soft attention on textures: `x + S * conv(cat(x, texture))` (equation 8)."""

    def __init__(self, n_feats: int, channels: int, scale: int, soft: bool) -> None:
        super().__init__(n_feats + channels, n_feats, 3, padding=1)
        self.scale, self.soft = scale, soft

    def forward(  # type: ignore[override]  # a convolution of three inputs
        self,
        x: Tensor,  # [N, n, scale*H, scale*W]
        S: Tensor,  # [N, 1, H, W]
        texture: Tensor,  # [N, channels, scale*H, scale*W]
    ) -> Tensor:  # as x
        if not self.soft:
            return convolve(self, x, texture, add=x, inside=True)
        update, factor = convolve(self, x, texture, inside=True), _up(S, self.scale)
        return update.mul_(factor).add_(x) if is_inference() else x + factor * update


class NoAttention(nn.Module):
    """Replacement of `Attention`: the identity."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class ResBlock(nn.Module):
    """`x + res_scale * conv(relu(conv(x)))`, size and channels unchanged."""

    def __init__(self, n_feats: int, res_scale: float) -> None:
        super().__init__()
        self.res_scale = res_scale
        self.conv1 = _conv3(n_feats, n_feats)
        self.conv2 = _conv3(n_feats, n_feats)

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        inner = convolve(self.conv1, x, relu=True)
        if self.res_scale == 1:
            return convolve(self.conv2, inner, add=x.to(inner.dtype), in_place=in_place)
        return (convolve(self.conv2, inner) * self.res_scale).add_(x)


class ResBlocks(nn.Sequential):
    """Residual blocks one after another; in inference all but the first share memory.

    Blocks with hooks do not, as hooks may keep maps, nor do modules of other classes.
    """

    def forward(self, x: Tensor) -> Tensor:
        shared = False  # x is the memory of a block, and nobody else has it
        for block in self:
            own = is_inference() and type(block) is ResBlock and not has_hooks(block)
            x = block(x, in_place=True) if own and shared else block(x)
            shared = own
        return x


class CSFI2(nn.Module):
    """Cross-scale feature integration of 1x and 2x: each output depends on both."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.conv12 = _conv1(n_feats, n_feats)
        self.conv21 = _conv3(n_feats, n_feats, stride=2)
        self.conv_merge1 = _conv3(2 * n_feats, n_feats)
        self.conv_merge2 = _conv3(2 * n_feats, n_feats)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        from1 = _up(convolve(self.conv12, x1), 2).relu_()
        from2 = convolve(self.conv21, x2, relu=True)
        return (
            convolve(self.conv_merge1, x1, from2, relu=True),
            convolve(self.conv_merge2, x2, from1, relu=True),
        )


class CSFI3(nn.Module):
    """Cross-scale feature integration of 1x, 2x and 4x; the official names count 4x as 3."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.conv12 = _conv1(n_feats, n_feats)
        self.conv13 = _conv1(n_feats, n_feats)
        self.conv21 = _conv3(n_feats, n_feats, stride=2)
        self.conv23 = _conv1(n_feats, n_feats)
        self.conv31_1 = _conv3(n_feats, n_feats, stride=2)
        self.conv31_2 = _conv3(n_feats, n_feats, stride=2)
        self.conv32 = _conv3(n_feats, n_feats, stride=2)
        self.conv_merge1 = _conv3(3 * n_feats, n_feats)
        self.conv_merge2 = _conv3(3 * n_feats, n_feats)
        self.conv_merge3 = _conv3(3 * n_feats, n_feats)

    def forward(self, x1: Tensor, x2: Tensor, x4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.integrate_lower(x1, x2, x4), self.integrate4(x1, x2, x4)

    def integrate_lower(self, x1: Tensor, x2: Tensor, x4: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs at 1x and 2x."""
        x21 = convolve(self.conv21, x2, relu=True)
        x41 = convolve(self.conv31_2, convolve(self.conv31_1, x4, relu=True), relu=True)
        x12 = _up(convolve(self.conv12, x1), 2).relu_()
        x42 = convolve(self.conv32, x4, relu=True)
        return (
            convolve(self.conv_merge1, x1, x21, x41, relu=True),
            convolve(self.conv_merge2, x2, x12, x42, relu=True),
        )

    def integrate4(self, x1: Tensor, x2: Tensor, x4: Tensor) -> Tensor:
        """Output at 4x."""
        x14 = _up(convolve(self.conv13, x1), 4).relu_()
        x24 = _up(convolve(self.conv23, x2), 2).relu_()
        return convolve(self.conv_merge3, x4, x14, x24, relu=True)


class NoCSFI(nn.Module):
    """Replacement of `CSFI2` and `CSFI3`: the identity."""

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        return maps

    def integrate_lower(self, x1: Tensor, x2: Tensor, x4: Tensor) -> tuple[Tensor, Tensor]:
        return x1, x2

    def integrate4(self, x1: Tensor, x2: Tensor, x4: Tensor) -> Tensor:
        return x4


class MergeTail(nn.Module):
    """Merge of all scales to one image, `[N, 3, 4*H, 4*W]` in [-1, 1]."""

    def __init__(self, n_feats: int) -> None:
        super().__init__()
        self.conv13 = _conv1(n_feats, n_feats)
        self.conv23 = _conv1(n_feats, n_feats)
        self.conv_merge = _conv3(3 * n_feats, n_feats)
        self.conv_tail1 = _conv3(n_feats, n_feats // 2)
        self.conv_tail2 = _conv1(n_feats // 2, 3)

    def forward(self, x1: Tensor, x2: Tensor, x4: Tensor) -> Tensor:
        x14 = _up(convolve(self.conv13, x1), 4).relu_()
        x24 = _up(convolve(self.conv23, x2), 2).relu_()
        x = convolve(self.conv_merge, x4, x14, x24, relu=True)
        x = convolve(self.conv_tail1, x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.conv_tail2.weight.dtype)  # bfloat16 is too coarse for an image
        return convolve(self.conv_tail2, x).clamp(-1, 1)


def _conv3(channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1)


def _conv1(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 1)


def _res_blocks(count: int, n_feats: int, res_scale: float) -> nn.Sequential:
    return ResBlocks(*(ResBlock(n_feats, res_scale) for _ in range(count)))


def _up(x: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return x
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return _CompiledUp.apply(x, factor)
    if x.shape[1] > 1 and is_large_on_cpu(x):
        return bicubic_by_products(x, factor)
    return _bicubic(x, factor)


def _bicubic(x: Tensor, factor: int) -> Tensor:
    # Sizes, not a factor, which would turn the open sizes of an exported program into floats.
    return F.interpolate(x, size=[factor * n for n in x.shape[2:]], mode="bicubic")


class _CompiledUp(torch.autograd.Function):
    """`_bicubic` with PyTorch's own kernel for the gradient.

    Inductor turns the gradient into 16 scatters and their sum. Up to torch 2.13 its scheduler can
    order the sum before the scatters, which gives zeros.
    """

    @staticmethod
    def forward(x: Tensor, factor: int) -> Tensor:
        return _bicubic(x, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.sizes = output.shape[2:], inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        backward = torch.ops.aten.upsample_bicubic2d_backward
        return backward(grad, *ctx.sizes, False, None, None), None
