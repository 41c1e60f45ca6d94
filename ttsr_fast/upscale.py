"""Two pictures in, one out: x4 super-resolution with the help of a reference."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import images
from ttsr_fast.functional import gather_fold, search
from ttsr_fast.images import SCALE, Image
from ttsr_fast.model import TTSR

METHODS = ("detail", "ttsr")
PHASES = (1, 2, 4)

_LEAST_REFERENCE = 3 * SCALE  # pixels: one patch of the search
_FLAT = 1e-3  # norm of a patch below which its features are rounding errors, and its score falls
_BACK_PROJECTIONS = 2  # the gain of a third is 0.01 dB


class Result(NamedTuple):
    """An enlarged picture, and where its details come from.

    Attributes:
        image: four times the size of `lr`, with its channels, depth, transparency, colour profile.
        score: `[h, w]`, float32: for every pixel of `lr`, the cosine of the angle between its patch
            and the most similar one of the reference, whose details it got.
        index: `[h, w]`, int64: the upper left one of the 4x4 pixels at the centre of that patch, as
            `row * width + column` in the reference as given.
    """

    image: Image
    score: Tensor
    index: Tensor  # type: ignore[assignment]  # a tuple's method of that name, not missed here


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
) -> Result:
    """Enlarge `lr` four times, with the details of the most similar places of `ref`.

    Method "detail" needs no weights. It searches the patches of `lrsr`, the bicubically enlarged
    picture, in `refsr`, the reference made as blurred, and adds what the blur took from the patches
    it finds, the more the surer the match; then the result is made to reduce to `lr` again:

        sr = lrsr + score**4 * transfer(ref - refsr)
        sr = sr + enlarge(lr - reduce(sr)), twice

    Args:
        lr: the picture to enlarge, of any size: a path, a Pillow image, an array of uint8 or uint16
            (`[H, W]` or `[H, W, channels]`) or a float tensor in [-1, 1]; see `images.as_image`.
        ref: the reference, likewise, of 12x12 pixels or more and as sharp as `lr` is to become. It
            is cut to a multiple of 4; transparency is ignored. For a grey `lr` it is made grey.
        model: TTSR with trained weights, on any device; for method "ttsr".
        method: "ttsr" or "detail"; the default is "ttsr" if there is a model.
        phases: for "detail": places in the reference are found to 4, 2 or 1 pixels, by searching it
            at 1, 2 (the default) or 4 phases of its 4x4 grid along each axis; the time it takes is
            the square of that.
        device: where "detail" computes, by default the CPU.
        precision: as for `ttsr_fast.search`; None takes the model's.
        backend: as for `ttsr_fast.search`; None takes the model's.

    Returns:
        `Result(image, score, index)`, on the CPU.

    Raises:
        TypeError, ValueError: arguments that do not fit; and all that `images.as_image` raises.
        RuntimeError: the backend asked for cannot run here.
        ImportError: Pillow is not installed.
    """
    if model is not None and not isinstance(model, TTSR):
        raise TypeError(f"model must be a TTSR, got {type(model).__name__}")
    method = _resolve_method(method, model, phases, device)
    source, reference = images.as_image(lr, "lr"), images.as_image(ref, "ref")
    if min(reference.size) < _LEAST_REFERENCE:
        raise ValueError(
            f"ref must have at least one patch of {_LEAST_REFERENCE}x{_LEAST_REFERENCE} pixels, "
            f"got {reference.size[1]}x{reference.size[0]}"
        )
    if source.pixels.shape[2] == 1:
        reference = Image(images.to_grey(reference.pixels))
    if model is None:
        where = torch.device(device or "cpu")
        sr, score, index = _detail(source, reference, phases or 2, where, precision, backend)
    else:
        sr, score, index = _ttsr(source, reference, model, precision, backend)
    image = Image(
        images.from_tensor(sr, source.pixels),
        None if source.alpha is None else images.upscale_bicubic(source.alpha),
        source.icc_profile,
    )
    return Result(image, score[0].cpu(), index[0].cpu())


def _resolve_method(
    method: str | None, model: TTSR | None, phases: int | None, device: str | torch.device | None
) -> str:
    if method is None:
        method = "detail" if model is None else "ttsr"
    if method not in METHODS:
        raise ValueError(f"method must be None or one of {METHODS}, got {method!r}")
    if method == "ttsr" and model is None:
        raise ValueError("method 'ttsr' needs a model with trained weights")
    if method == "detail" and model is not None:
        raise ValueError("method 'detail' takes no model")
    if method == "ttsr" and phases is not None:
        raise ValueError("phases is for method 'detail', not for 'ttsr'")
    if method == "ttsr" and device is not None:
        raise ValueError("device is for method 'detail'; with 'ttsr' move the model")
    if phases is not None and phases not in PHASES:
        raise ValueError(f"phases must be one of {PHASES}, got {phases!r}")
    return method


def _detail(
    source: Image,
    reference: Image,
    phases: int,
    device: torch.device,
    precision: str | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # [1, 3, 4*h, 4*w], [1, h, w], [1, h, w]
    """The formula of `upscale`, with a reference that is reduced at several offsets.

    What a place of the reference looks like when reduced depends on how it lies on the grid of 4x4
    pixels. So `refsr` is made and searched for every offset of that grid, and every patch takes the
    best match of all.
    """
    lr = source.to_tensor()
    lrsr = images.to_tensor(images.upscale_bicubic(source.pixels)).to(device)
    query = _features(lrsr)
    score = torch.full_like(query[:, 0], -torch.inf)
    index = torch.zeros_like(score, dtype=torch.int64)
    steps = range(0, SCALE, SCALE // phases)
    offsets = [(y, x) for y in steps for x in steps]
    for offset in offsets:
        ref, refsr = _reference_pair(reference, offset, device)
        match = search(query, _features(refsr), eps=_FLAT, precision=precision, backend=backend)
        better = match.score > score
        score = torch.where(better, match.score, score)
        index = torch.where(better, _pixel_index(match.index, ref, offset, reference), index)

    texture = torch.zeros_like(lrsr)
    for offset in offsets:
        ref, refsr = _reference_pair(reference, offset, device)
        chosen, position = _grid_index(index, ref, offset, reference)
        texture += gather_fold(
            ref - refsr,
            position,
            stride=SCALE,
            weight=chosen.float(),
            divisor="overlap",
            backend=backend,
        )

    size = lrsr.shape[2], lrsr.shape[3]
    sr = lrsr + images.resize_tensor(score[None], size).clamp(0, 1) ** 4 * texture
    sr = sr.cpu()
    for _ in range(_BACK_PROJECTIONS):
        sr = sr.clamp(-1, 1)
        sr = sr + images.resize_tensor(lr - images.resize_tensor(sr, source.size), size)
    return sr, score, index


def _features(
    x: Tensor,  # [1, 3, 4*h, 4*w]
) -> Tensor:  # [1, 24, h, w]
    """What "detail" compares: texture, and a little of the colours, which decide in flat areas.

    Both are differences, from the local mean and from the picture's: otherwise the cosine of two
    bright patches were near 1 whatever they show, and it is trusted with the details. Blurred
    pictures need no more than two samples per axis and pixel of `lr`.
    """
    texture = x - F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False)
    colour = 0.15 * (x - x.mean((2, 3), keepdim=True))
    return F.pixel_unshuffle(F.avg_pool2d(torch.cat((texture, colour), 1), 2), SCALE // 2)


def _ttsr(
    source: Image, reference: Image, model: TTSR, precision: str | None, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:  # [1, 3, 4*h, 4*w], [1, h, w], [1, h, w]
    """`model(lr, lrsr, ref, refsr)`, which keeps the index to itself."""
    weight = model.MainNet.SFE.conv_head.weight  # its dtype and device are the model's
    lr = source.to_tensor().to(weight)
    lrsr = images.to_tensor(images.upscale_bicubic(source.pixels)).to(weight)
    ref, refsr = (x.to(weight) for x in _reference_pair(reference, (0, 0), weight.device))
    precision = precision or model.SearchTransfer.precision
    backend = backend or model.SearchTransfer.backend
    query, key = (model.LTE((x + 1) / 2)[2] for x in (lrsr, refsr))
    match = search(query, key, precision=precision, backend=backend)
    textures = [
        gather_fold(value, match.index, stride=stride, backend=backend)
        for value, stride in zip(reversed(model.LTE((ref + 1) / 2)), (1, 2, 4), strict=True)
    ]
    sr = model.MainNet(lr, match.score.unsqueeze(1).to(weight), *textures)
    return sr, match.score, _pixel_index(match.index, ref, (0, 0), reference)


def _reference_pair(
    reference: Image, offset: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:  # [1, 3, HR, WR] both
    """The reference from `offset` on, cut to a multiple of 4, and its degradation."""
    height, width = (
        (size - start) // SCALE * SCALE for size, start in zip(reference.size, offset, strict=True)
    )
    ref = reference.pixels[offset[0] :, offset[1] :][:height, :width]
    refsr = images.upscale_bicubic(images.downscale(ref))
    return images.to_tensor(ref).to(device), images.to_tensor(refsr).to(device)


def _pixel_index(
    position: Tensor, ref: Tensor, offset: tuple[int, int], reference: Image
) -> Tensor:
    """From positions on the key grid of `ref` to pixels of the whole reference."""
    columns = ref.shape[3] // SCALE
    row = position // columns * SCALE + offset[0]
    return row * reference.size[1] + position % columns * SCALE + offset[1]


def _grid_index(
    index: Tensor, ref: Tensor, offset: tuple[int, int], reference: Image
) -> tuple[Tensor, Tensor]:
    """Which pixels lie on the key grid of `ref`, and their positions there (0 for the others)."""
    row, column = index // reference.size[1] - offset[0], index % reference.size[1] - offset[1]
    here = (row % SCALE == 0) & (column % SCALE == 0)
    position = row // SCALE * (ref.shape[3] // SCALE) + column // SCALE
    return here, torch.where(here, position, 0)
