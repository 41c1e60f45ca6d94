"""Method "detail": high frequencies of the most similar patches, without any weights."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import images
from ttsr_fast.functional import gather_fold, search
from ttsr_fast.images import SCALE, Image
from ttsr_fast.references import ReferenceMatch
from ttsr_fast.upscaling.execution import Execution
from ttsr_fast.upscaling.finite import check_finite

_FLAT = 1e-3  # norm of a patch below which features are rounding errors; its score falls
_BACK_PROJECTIONS = 2  # the gain of a third is 0.01 dB


def detail(
    source: Image,
    references: Sequence[Image],
    phases: int,
    device: torch.device,
    execution: Execution,
) -> tuple[Tensor, ReferenceMatch]:  # [1, 3, 4*h, 4*w]
    """The formula of `upscale`, with references that are reduced at several offsets.

    A reduced patch depends on its position relative to the grid of 4x4 pixels. So `refsr` is made
    and searched for every offset of that grid, and every patch takes the best match of all. Indices
    of the match are pixels of the reference.

    Raises:
        ValueError: the image or its scores hold NaN or infinity.
    """
    precision, backend, _, progress = execution
    lr = source.to_tensor()
    lrsr = images.to_tensor(images.upscale_bicubic(source.pixels)).to(device)
    query = _features(lrsr)
    score = torch.full_like(query[:, 0], -torch.inf)
    index = torch.zeros_like(score, dtype=torch.int64)
    number = torch.zeros_like(index)
    shifted = list(_shifted(references, phases))
    for done, place in enumerate(shifted, 1):
        _, refsr = reference_pair(place.image, place.offset, device)
        match = search(query, _features(refsr), eps=_FLAT, precision=precision, backend=backend)
        better = match.score > score
        score = torch.where(better, match.score, score)
        index = torch.where(better, pixel_index(match.index, place.image, place.offset), index)
        number = number.masked_fill(better, place.number)
        if progress is not None:
            progress("search", done, len(shifted))

    texture = torch.zeros_like(lrsr)
    for place in shifted:
        chosen, position = _grid_index(index, place)
        chosen = chosen & (number == place.number)
        if device.type == "cpu" and not chosen.any():
            continue
        ref, refsr = reference_pair(place.image, place.offset, device)
        texture += gather_fold(
            ref - refsr,
            position.where(chosen, 0),
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
    check_finite("the result holds", sr, score)
    return sr, ReferenceMatch(score, index, number)


def reference_pair(
    reference: Image, offset: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:  # [1, 3, HR, WR] both
    """The reference from `offset` on, cut to a multiple of 4, and its blurred copy."""
    height, width = _grid(reference, offset)
    ref = reference.pixels[offset[0] :, offset[1] :][: height * SCALE, : width * SCALE]
    refsr = images.upscale_bicubic(images.downscale(ref))
    return images.to_tensor(ref).to(device), images.to_tensor(refsr).to(device)


def pixel_index(position: Tensor, reference: Image, offset: tuple[int, int]) -> Tensor:
    """Pixels of the whole reference, from positions on the key grid at `offset`."""
    columns = _grid(reference, offset)[1]
    row = position // columns * SCALE + offset[0]
    return row * reference.size[1] + position % columns * SCALE + offset[1]


class _Shifted(NamedTuple):
    """A reference from an offset on, and its number in the list."""

    number: int
    image: Image
    offset: tuple[int, int]


def _shifted(references: Sequence[Image], phases: int) -> Iterator[_Shifted]:
    steps = range(0, SCALE, SCALE // phases)
    for number, image in enumerate(references):
        yield from (_Shifted(number, image, (y, x)) for y in steps for x in steps)


def _features(
    x: Tensor,  # [1, 3, 4*h, 4*w]
) -> Tensor:  # [1, 24, h, w]
    """Texture, and a little of the colours, which decide in flat areas.

    Both are differences, from the local mean and from the mean of the image. Otherwise the cosine
    of any two bright patches would be near 1, and that cosine weights the details. Blurred images
    need no more than two samples per axis and pixel of `lr`.
    """
    texture = x - F.avg_pool2d(x, 7, stride=1, padding=3, count_include_pad=False)
    colour = 0.15 * (x - x.mean((2, 3), keepdim=True))
    return F.pixel_unshuffle(F.avg_pool2d(torch.cat((texture, colour), 1), 2), SCALE // 2)


def _grid(reference: Image, offset: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole 4x4 blocks."""
    height, width = (size - start for size, start in zip(reference.size, offset, strict=True))
    return height // SCALE, width // SCALE


def _grid_index(index: Tensor, place: _Shifted) -> tuple[Tensor, Tensor]:
    """Mask of the pixels on the key grid of a shifted reference, and their positions there."""
    columns, width = _grid(place.image, place.offset)[1], place.image.size[1]
    row, column = index // width - place.offset[0], index % width - place.offset[1]
    here = (row % SCALE == 0) & (column % SCALE == 0)
    return here, row // SCALE * columns + column // SCALE
