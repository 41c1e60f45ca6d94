"""Rendered sheets: the origin of every patch of an image, and a result beside the truth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, Image, from_tensor

_PANEL = 480  # width of a panel; its height follows the low-resolution image
_GAP, _CAPTION, _FRAME = 28, 40, 5
_INK, _FAINT, _PAPER, _MARK = (28, 30, 36), (120, 124, 134), (255, 255, 255), (230, 30, 60)


def draw_match(
    lr: Image,
    ref: Image | Sequence[Image],
    image: Image,
    score: Tensor,
    index: Tensor,
    reference: Tensor | None = None,
) -> Image:
    """One labelled sheet with the images, the result, the origin of every patch and its score.

    The origin is shown as an optical flow: the offset from the position of a patch in `lr`,
    relative to the size of `lr`, to its match in `ref`. Hue is the direction and saturation the
    distance; smooth colours mean a coherent match. Colours are perceptually uniform (OKLab).
    Several references share one panel, each in a frame of its colour, with its share of the
    patches; one more panel shows the reference of each patch in these colours.

    Args:
        lr: the low-resolution image, as given to `upscale`.
        ref: the reference or the references, as given to `upscale`.
        image: the result of `upscale`.
        score: `[h, w]`, of the result.
        index: `[h, w]`, of the result.
        reference: `[h, w]`, of the result; None for one reference.

    Returns:
        RGB, uint8, about 1600 pixels wide, 2100 for several references.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    refs = [ref] if isinstance(ref, Image) else list(ref)
    origin = np.zeros(index.shape, int) if reference is None else reference.numpy()
    height = round(min(max(_PANEL * lr.size[0] / lr.size[1], 240), 1.5 * _PANEL))
    offset = _offsets(index.numpy(), origin, [one.size for one in refs])
    distance = np.hypot(*offset)
    reach = max(min(2 * float(np.median(distance)), float(distance.max())), SCALE)
    lowest = min(float(np.quantile(score.numpy(), 0.02)), 0.95)
    heat = (score.numpy() - lowest) / (1 - lowest)
    panels = [
        (f"low resolution, {lr.size[1]} x {lr.size[0]}", _pixels(lr)),
        _reference_panel(refs, origin, height),
        (f"result, {image.size[1]} x {image.size[0]}", _pixels(image)),
        ("where each patch came from", _flow_colours(offset / reach)),
        ("how similar it is", _heat_colours(heat)),
    ]
    if len(refs) > 1:
        colours = _colours(len(refs))[origin]
        panels.insert(3, ("which reference it came from", colours))
    columns = len(panels) // 2 + 1
    cell = _PANEL + _GAP, height + _CAPTION + _GAP
    sheet = pillow.new("RGB", (columns * cell[0] + _GAP, 2 * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (caption, pixels) in enumerate(panels):
        x, y = _GAP + number % columns * cell[0], _GAP + number // columns * cell[1]
        draw.text((x, y), caption, _INK, _font(20))
        sheet.paste(_fit(pixels, height), (x, y + _CAPTION))
    place = _GAP + (len(panels) - columns) * cell[0], _GAP + cell[1]
    _draw_legend(sheet, place, height, reach, lowest)
    return Image(np.asarray(sheet))


def draw_comparison(
    panels: Sequence[tuple[str, Image]],
    refs: Sequence[Image],
    origin: np.ndarray | None = None,  # [*] int
) -> Image:
    """Images of one size in a row, then the references, and one region of each image below.

    The region has the largest squared error of the first panel against the last. It is framed in
    the row, and magnified without interpolation below.

    Args:
        panels: caption and image of each, from the baseline to the truth.
        refs: the references, if there are any.
        origin: for every patch the number of its reference, to show the shares of the references.

    Returns:
        RGB, uint8, about 500 pixels wide for each image.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    size = panels[0][1].size
    scale = min(_PANEL / size[1], 1.5 * _PANEL / size[0])
    height, width = (max(1, round(n * scale)) for n in size)
    cells = [(caption, _pixels(image)) for caption, image in panels]
    region = _worst_region(cells[0][1], cells[-1][1])
    frame = [round(scale * at) for at in (region[1].start, region[0].start)]
    frame += [round(scale * at) - 1 for at in (region[1].stop, region[0].stop)]
    if refs:
        cells.append(_reference_panel(refs, origin, height))
    step = _PANEL + _GAP
    corner = len(cells) * step + _GAP, 2 * (height + _GAP) + _CAPTION + _GAP
    sheet = pillow.new("RGB", corner, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (caption, pixels) in enumerate(cells):
        x, y = _GAP + number * step, _GAP + _CAPTION
        draw.text((x, _GAP), _short(caption), _INK, _font(20))
        sheet.paste(_fit(pixels, height), (x, y))
        if number < len(panels):
            place = [a + b for a, b in zip(frame, (x, y) * 2, strict=True)]
            draw.rectangle(place, None, _PAPER, 4)  # so that it shows on any colour
            draw.rectangle(place, None, _MARK, 2)
            part = pillow.fromarray(np.ascontiguousarray(pixels[region]))
            part = part.resize((width, height), pillow.Resampling.NEAREST)
            sheet.paste(part, (x, y + height + _GAP))
    return Image(np.asarray(sheet))


def _worst_region(a: np.ndarray, b: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of the largest squared error, a quarter of each side."""
    error = ((a.astype(np.float64) - b) ** 2).sum(2)
    sides = [-(-n // 4) for n in error.shape]
    total = np.pad(error, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    rows = total[sides[0] :] - total[: -sides[0]]
    sums = rows[:, sides[1] :] - rows[:, : -sides[1]]
    y, x = np.unravel_index(sums.argmax(), sums.shape)
    return slice(y, y + sides[0]), slice(x, x + sides[1])


def _reference_panel(
    refs: Sequence[Image], origin: np.ndarray | None, height: int
) -> tuple[str, np.ndarray]:
    """Caption and pixels of the reference, or of all with their shares of the patches."""
    if len(refs) == 1 or origin is None:
        return f"reference, {refs[0].size[1]} x {refs[0].size[0]}", _pixels(refs[0])
    counts = np.bincount(origin.ravel(), minlength=len(refs))
    return f"{len(refs)} references, and their shares", _contact_sheet(refs, counts, height)


def _offsets(
    index: np.ndarray, origin: np.ndarray, sizes: list[tuple[int, int]]
) -> np.ndarray:  # [2, h, w]
    """Down and to the right, in pixels of the reference of each patch."""
    height, width = np.array(sizes).T[:, origin]
    found = np.stack(np.divmod(index, width)) + SCALE / 2
    own = np.indices(index.shape) + 0.5
    return found - own * np.stack((height / index.shape[0], width / index.shape[1]))


def _colours(count: int) -> np.ndarray:  # [count, 3]
    """Colours with evenly spaced hues and two steps of lightness."""
    number = np.arange(count)
    lightness = np.where(number % 2 == 0, 0.62, 0.8)
    return _oklch_to_srgb(lightness, np.full(count, 0.13), 2 * np.pi * number / count + 0.5)


def _contact_sheet(refs: Sequence[Image], counts: np.ndarray, height: int) -> np.ndarray:
    """All references in cells of one panel, framed in their colours."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    columns = min(range(1, len(refs) + 1), key=lambda n: _waste(n, len(refs), height))
    rows = -(-len(refs) // columns)
    cell = _PANEL // columns, height // rows
    sheet = pillow.new("RGB", (_PANEL, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (ref, colour) in enumerate(zip(refs, _colours(len(refs)), strict=True)):
        x, y = number % columns * cell[0], number // columns * cell[1]
        room = max(1, cell[0] - 2 * _FRAME), max(1, cell[1] - 2 * _FRAME)
        thumbnail = pillow.fromarray(_pixels(ref))
        thumbnail.thumbnail((room[0] - 2, room[1] - 2))
        corner = x + thumbnail.width + 2 * _FRAME - 1, y + thumbnail.height + 2 * _FRAME - 1
        draw.rectangle((x, y, *corner), tuple(map(int, colour)))
        sheet.paste(thumbnail, (x + _FRAME, y + _FRAME))
        share = f"{number + 1}: {counts[number] / counts.sum():.0%}"
        if cell[0] >= 60 and cell[1] >= 40:
            at = x + _FRAME + 4, y + _FRAME + 2
            draw.text(at, share, _PAPER, _font(16), stroke_width=2, stroke_fill=_INK)
    return np.asarray(sheet)


def _waste(columns: int, count: int, height: int) -> float:
    """Distance of the cells from 4:3, and the share of empty ones."""
    rows = -(-count // columns)
    shape = (_PANEL / columns) / (height / rows)
    return abs(np.log(shape * 0.75)) + (rows * columns - count) / count


def _flow_colours(offset: np.ndarray) -> np.ndarray:  # [2, h, w] -> [h, w, 3]
    """Hue from the direction, saturation from the length, full at 1."""
    length = np.minimum(np.hypot(*offset), 1)
    return _oklch_to_srgb(0.96 - 0.21 * length, 0.127 * length, np.arctan2(*offset))


def _heat_colours(x: np.ndarray) -> np.ndarray:  # [h, w] -> [h, w, 3]
    """Dark violet over green to light yellow for 0 to 1, in even steps of lightness."""
    x = x.clip(0, 1)
    return _oklch_to_srgb(0.22 + 0.72 * x, 0.094 + 0.07 * x**3, np.radians(305 - 195 * x))


def _oklch_to_srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Cylindrical OKLab (B. Ottosson, 2020) to sRGB as uint8, `[*, 3]`."""
    lab = np.stack((lightness, chroma * np.cos(hue), chroma * np.sin(hue)), axis=-1)
    cones = lab @ np.array(
        [
            [1, 1, 1],
            [0.3963377774, -0.1055613458, -0.0894841775],
            [0.2158037573, -0.0638541728, -1.2914855480],
        ]
    )
    linear = cones**3 @ np.array(
        [
            [4.0767416621, -1.2684380046, -0.0041960863],
            [-3.3077115913, 2.6097574011, -0.7034186147],
            [0.2309699292, -0.3413193965, 1.7076147010],
        ]
    )
    linear = linear.clip(0, 1)
    encoded = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return (encoded * 255).round().astype(np.uint8)


def _pixels(image: Image) -> np.ndarray:  # [H, W, 3] uint8
    return from_tensor(image.to_tensor(), np.empty((0, 0, 3), np.uint8))


def _fit(pixels: np.ndarray, height: int) -> Any:
    """Image in the size of a panel; magnified pixels stay visible."""
    from PIL import Image as pillow

    scale = min(_PANEL / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    kind = pillow.Resampling.NEAREST if scale > 1 else pillow.Resampling.BICUBIC
    return pillow.fromarray(pixels).resize(size, kind)


def _draw_legend(
    sheet: Any, corner: tuple[int, int], height: int, reach: float, lowest: float
) -> None:
    """Colour wheel of the offsets, and below it the scale of the scores."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    draw, (x, y) = ImageDraw.Draw(sheet), corner
    draw.text((x, y), "legend", _INK, _font(20))
    y += _CAPTION
    side = min(height - 100, 260)
    axis = np.linspace(-1, 1, 2 * side)
    plane = np.stack(np.meshgrid(axis, axis, indexing="ij"))
    wheel = pillow.fromarray(_flow_colours(plane)).resize((side, side))
    disc = pillow.fromarray((np.hypot(*plane) <= 1).astype(np.uint8) * 255).resize((side, side))
    sheet.paste(wheel, (x, y), disc)
    words = "direction and distance\nto the place in the reference"
    words += f"\n\ncentre: the same place\nrim: {reach:.0f} pixels or more"
    draw.text((x + side + 24, y + side / 2), words, _FAINT, _font(16), anchor="lm", spacing=8)
    y += side + 38
    ramp = np.broadcast_to(np.linspace(0, 1, _PANEL), (26, _PANEL))
    sheet.paste(pillow.fromarray(_heat_colours(ramp)), (x, y))
    for share, anchor in ((0, "la"), (0.5, "ma"), (1, "ra")):
        value = f"{lowest + share * (1 - lowest):.2f}"
        draw.text((x + share * _PANEL, y + 34), value, _FAINT, _font(16), anchor=anchor)
    draw.text((x, y - 28), "similarity (cosine)", _FAINT, _font(16))


def _short(caption: str) -> str:
    """One line, cut to the width of a panel."""
    line = shortened = shown(caption)
    while _font(20).getlength(shortened) > _PANEL:
        line = line[:-1]
        shortened = line + "..."
    return shortened


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
