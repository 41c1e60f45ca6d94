"""Convolutions with the operations around them: the concatenation before, a sum and a ReLU after.

Inference on the CPU leaves these to oneDNN, which applies them where it writes the result: no map
is read or written again. float32 results do not change by it, except for the order of the sum over
concatenated maps.
"""

from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_SMALL = 20480  # numbers of a map up to which PyTorch has convolutions of its own, too


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """`x` in the channels-last layout on the CPU; all maps made from it follow.

    Convolutions take two thirds of the time then, and the transfer half; results do not change.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def convolve(
    layer: nn.Conv2d,
    *maps: Tensor,
    add: Tensor | None = None,
    relu: bool = False,
    in_place: bool = False,
    inside: bool = False,
) -> Tensor:
    """`relu(layer(cat(maps)) + add)` in the type of `maps`, to which the weights are rounded.

    Args:
        layer: a convolution, or what stands in for one.
        maps: `[N, C, H, W]` each, all of one type and layout.
        add: a map of the shape of the result.
        relu: whether there is a ReLU.
        in_place: whether the result may overwrite `add`.
        inside: whether the layer's own `forward` calls: it stands for the convolution alone then.
    """
    if _is_fused(layer, maps if add is None else (*maps, add), inside):
        return _fused(layer, maps, add, relu, in_place)
    out = _plain(layer, torch.cat(maps, 1) if len(maps) > 1 else maps[0], inside)
    if add is not None:
        out = out.add_(add) if out.dtype == add.dtype else out + add
    return out.relu_() if relu else out


def _fused(
    layer: nn.Conv2d, maps: Sequence[Tensor], add: Tensor | None, relu: bool, in_place: bool
) -> Tensor:
    """`convolve` by oneDNN, map by map: each adds its share to the result."""
    x, out = maps[0], add
    kernels = layer.weight.to(x.dtype).split([part.shape[1] for part in maps], 1)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    options = (layer.padding, layer.stride, layer.dilation, layer.groups)
    pointwise, pointwise_ = _operators()
    for number, (part, kernel) in enumerate(zip(maps, kernels, strict=True), 1):
        activation = "relu" if relu and number == len(maps) else None
        if out is None:
            out = pointwise(part, kernel, bias, *options, activation or "none", [], "")
        elif out is add and (part is add or not in_place):
            out = pointwise.binary(part, add, kernel, bias, *options, *_sum(activation))
        else:
            out = pointwise_.binary(out, part, kernel, bias, *options, *_sum(activation))
        bias = None
    assert out is not None
    return out


def _plain(layer: nn.Conv2d, x: Tensor, inside: bool) -> Tensor:
    device = x.device.type
    if x.dtype != layer.weight.dtype and not torch.is_autocast_enabled(device):
        with torch.autocast(device, x.dtype):
            return _plain(layer, x, inside)
    return nn.Conv2d.forward(layer, x) if inside else layer(x)


def _sum(activation: str | None) -> tuple[Any, ...]:
    """Arguments of oneDNN for a sum and an activation."""
    return "add", None, activation, [], None


def _has_own_forward(layer: nn.Conv2d) -> bool:
    """True for a convolution, False for a layer that computes more, or something else."""
    return isinstance(layer, nn.Conv2d) and layer.forward == MethodType(nn.Conv2d.forward, layer)


def _is_fused(layer: nn.Conv2d, maps: Sequence[Tensor], inside: bool) -> bool:
    """True where oneDNN can, and no hook waits for the result of the layer."""
    dtype = maps[0].dtype
    return (
        all(x.dtype == dtype and is_large_on_cpu(x) for x in maps)
        and torch.backends.mkldnn.is_available()
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bfloat16()))
        and (inside or _has_own_forward(layer))
        and (layer.padding_mode, layer.groups) == ("zeros", 1)
        and not isinstance(layer.padding, str)
        and layer.weight.device.type == "cpu"
        and not has_hooks(layer)
    )


def has_hooks(module: nn.Module) -> bool:
    """True if functions beside the module see its inputs or results."""
    return bool(module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())


def is_large_on_cpu(x: Tensor) -> bool:
    """True for channels-last maps on the CPU that are worth a path of their own, in inference."""
    return (
        x.device.type == "cpu"
        and is_inference()
        and x.numel() > _SMALL
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def is_inference() -> bool:
    """True without derivatives, autocast, and programs that are compiled, traced or exported."""
    return not (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
    )


@cache
def _operators() -> tuple[Any, Any]:
    """oneDNN's convolution with what follows it: into new memory, and added to a map."""
    found = torch.ops.mkldnn
    return found._convolution_pointwise, found._convolution_pointwise_


@cache
def _has_bfloat16() -> bool:
    """True if oneDNN multiplies bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
