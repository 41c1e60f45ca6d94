"""`upscale`: x4 super-resolution of an image with the help of references."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttsr_fast import images
from ttsr_fast.choices import DEFAULT_PHASES, METHODS, PHASES
from ttsr_fast.images import Image
from ttsr_fast.model import TTSR
from ttsr_fast.references import ReferenceMatch
from ttsr_fast.upscaling.bank import ReferenceBank
from ttsr_fast.upscaling.detail import detail, pixel_index
from ttsr_fast.upscaling.execution import Execution, Progress
from ttsr_fast.upscaling.plan import Plan, plan_upscale
from ttsr_fast.upscaling.ttsr import super_resolve

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Result(NamedTuple):
    """An upscaled image, and the origin of its details.

    Attributes:
        image: four times the size of `lr`, with its channels, depth, alpha, colour information.
        score: `[h, w]`, float32: for every pixel of `lr`, the cosine similarity of its patch and
            the best patch of all references, which gave it its details.
        index: `[h, w]`, int64: the upper left one of the 4x4 pixels at the centre of that patch, as
            `row * width + column` in its reference as given.
        reference: `[h, w]`, int64: the number of that reference, 0 for a single one.
    """

    image: Image
    score: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name, not missed here
    reference: Tensor


@torch.no_grad()
def upscale(
    lr: Any,
    ref: Any,
    *,
    model: TTSR | None = None,
    method: str | None = None,
    phases: int | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    backend: str | None = None,
    amp: str | None = None,
    max_memory: int | None = None,
    tile: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Upscale `lr` four times, with the details of the most similar patches of `ref`.

    Method "detail" needs no weights. It searches the patches of `lrsr`, the bicubic upscaling of
    `lr`, in `refsr`, the reference with the same blur. Then it adds the high frequencies of the
    patches found, weighted by their scores, and makes the result reduce to `lr` again:

        sr = lrsr + score**4 * transfer(ref - refsr)
        sr = sr + up(lr - down(sr)), twice

    Method "ttsr" is the model. Its results do not depend on the available memory: the search covers
    whole references, and networks that do not fit run in windows that overlap as far as they read.
    On the CPU a network of published width gives the same bits in windows as at once, unless `tile`
    asks for less than 32 pixels; else a convolution may round the last bit otherwise.

    Args:
        lr: the image to upscale, of any size: a path, a Pillow image, an array of uint8 or uint16
            (`[H, W]` or `[H, W, channels]`) or a float tensor in [-1, 1]; see `images.as_image`.
        ref: the reference, of the same types, 12x12 pixels or more, and as sharp as the result is
            to be; or a list of references of any sizes, of which every patch takes the best; or a
            `ReferenceBank`, which saves time for more than one `lr`. References are cut to a
            multiple of 4; transparency is ignored. For a grey `lr` they are made grey.
        model: TTSR with trained weights, on any device; for method "ttsr".
        method: "ttsr" or "detail"; the default is "ttsr" if there is a model.
        phases: for "detail": places in the reference are found to 4, 2 or 1 pixels, by searching it
            at 1, 2 (the default) or 4 phases of its 4x4 grid along each axis. The time grows with
            its square.
        device: device of "detail", by default the CPU.
        precision: as for `ttsr_fast.search`; None takes the model's.
        backend: as for `ttsr_fast.search`; None takes the model's.
        amp: for "ttsr": "bf16" or "fp16" for convolutions in that type, faster where the processor
            multiplies it, and off by a few thousandths of the range. The search stays in the type
            of the model.
        max_memory: bytes that the process may take, on the device that computes; None for four
            fifths of the free memory. `plan_upscale` returns the plan for it.
        tile: for "ttsr": pixels of `lr` along each axis of a window; None for as many as fit.
        progress: called with a stage's name, the number of its steps that are done, and of all.

    Returns:
        `Result(image, score, index, reference)`, on the CPU.

    Raises:
        TypeError, ValueError: arguments that do not fit, a `max_memory` that is not enough; NaN or
            infinity in weights or result, with the likely reason, such as float16 that overflows;
            and all errors of `images.as_image`.
        RuntimeError: the chosen backend cannot run here.
        ImportError: Pillow is not installed.

    Examples:
        >>> ref = torch.rand(3, 96, 128) * 2 - 1  # or a path, an array, a Pillow image
        >>> lr = torch.nn.functional.avg_pool2d(ref, 4)
        >>> result = upscale(lr, ref)
        >>> result.image.size, result.score.shape
        ((96, 128), torch.Size([24, 32]))
        >>> result.image.save("large.png")
    """
    if model is not None and not isinstance(model, TTSR):
        raise TypeError(f"model must be a TTSR, got {type(model).__name__}")
    _check_method(method, model, phases, device, tile, amp)
    if max_memory is not None and max_memory < 1:
        raise ValueError(f"max_memory must be a positive number of bytes, got {max_memory}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be at least 1 pixel, got {tile}")
    source = images.as_image(lr, "lr")
    bank = ref if isinstance(ref, ReferenceBank) else ReferenceBank(ref)
    refs = bank.images(grey=_is_grey(source))
    where = torch.device(device or "cpu")
    plan = plan_upscale(
        source.size,
        [image.size for image in refs],
        model=model,
        device=where,
        max_memory=max_memory,
        tile=tile,
        cached=bank.has_features,
    )
    execution = Execution(precision, backend, None if amp is None else AMP[amp], progress)
    if model is None:
        sr, match = detail(source, refs, phases or DEFAULT_PHASES, where, execution)
    else:
        sr, match = _ttsr(source, bank, model, plan, execution)
    image = replace(  # colour information is kept
        source,
        pixels=images.from_tensor(sr, source.pixels),
        alpha=None if source.alpha is None else images.upscale_bicubic(source.alpha),
    )
    return Result(image, *(x[0].cpu() for x in match))


def _is_grey(source: Image) -> bool:
    return source.pixels.shape[2] == 1


def _check_method(
    method: str | None,
    model: TTSR | None,
    phases: int | None,
    device: str | torch.device | None,
    tile: int | None,
    amp: str | None,
) -> None:
    """Raise ValueError for options that do not fit the method."""
    if method is None:
        method = "detail" if model is None else "ttsr"
    if method not in METHODS:
        raise ValueError(f"method must be None or one of {METHODS}, got {method!r}")
    if method == "ttsr" and model is None:
        raise ValueError("method 'ttsr' needs a model with trained weights")
    if method == "detail" and model is not None:
        raise ValueError("method 'detail' takes no model")
    if method == "detail" and tile is not None:
        raise ValueError("tile is for method 'ttsr', not for 'detail'")
    if amp is not None and amp not in AMP:
        raise ValueError(f"amp must be None or one of {tuple(AMP)}, got {amp!r}")
    if method == "detail" and amp is not None:
        raise ValueError("amp is for method 'ttsr', not for 'detail'")
    if method == "ttsr" and phases is not None:
        raise ValueError("phases is for method 'detail', not for 'ttsr'")
    if method == "ttsr" and device is not None:
        raise ValueError("device is for method 'detail'; with 'ttsr' move the model")
    if phases is not None and phases not in PHASES:
        raise ValueError(f"phases must be one of {PHASES}, got {phases!r}")


def _ttsr(
    source: Image, bank: ReferenceBank, model: TTSR, plan: Plan, execution: Execution
) -> tuple[Tensor, ReferenceMatch]:  # [1, 3, 4*h, 4*w]
    """Method "ttsr"; indices of the match are pixels of the reference."""
    lr = source.to_tensor().to(model.dtype)
    lrsr = images.to_tensor(images.upscale_bicubic(source.pixels)).to(model.dtype)
    features = bank.features(model, plan, execution, grey=_is_grey(source))
    sr, match = super_resolve(model, lr, lrsr, features, plan, execution)
    index = torch.zeros_like(match.index)
    for number, image in enumerate(bank.images(grey=_is_grey(source))):
        here = match.reference == number
        index = torch.where(here, pixel_index(match.index, image, (0, 0)), index)
    return sr, match._replace(index=index)
