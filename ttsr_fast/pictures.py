"""Drawings of a match: where every patch came from, and how similar it is."""

from typing import Any

import numpy as np
from torch import Tensor

from ttsr_fast.images import SCALE, Image, from_tensor

_PANEL = 480  # width of a panel; its height follows the low-resolution picture
_GAP, _CAPTION = 28, 40
_INK, _FAINT, _PAPER = (28, 30, 36), (120, 124, 134), (255, 255, 255)


def draw_match(lr: Image, ref: Image, image: Image, score: Tensor, index: Tensor) -> Image:
    """One labelled sheet with both pictures, the result, the origin of every patch and its score.

    The origin is drawn as optical flow is: the offset from where a patch lies in `lr`, relative to
    its size, to where it was found in `ref`. Hue is the direction and saturation the distance: a
    smooth picture means a coherent match. Colours are laid out in OKLab, hence even to the eye.

    Args:
        lr: the low-resolution picture, as given to `upscale`.
        ref: the reference, likewise.
        image: the result, as returned by `upscale`.
        score: `[h, w]`, likewise.
        index: `[h, w]`, likewise.

    Returns:
        RGB, uint8, about 1600 pixels wide.
    """
    from PIL import Image as pillow
    from PIL import ImageDraw

    offset = _offsets(index, ref.size)
    distance = np.hypot(*offset)
    reach = max(min(2 * float(np.median(distance)), float(distance.max())), SCALE)
    lowest = min(float(np.quantile(score.numpy(), 0.02)), 0.95)
    heat = (score.numpy() - lowest) / (1 - lowest)
    panels = [
        (f"low resolution, {lr.size[1]} x {lr.size[0]}", _shown(lr)),
        (f"reference, {ref.size[1]} x {ref.size[0]}", _shown(ref)),
        (f"result, {image.size[1]} x {image.size[0]}", _shown(image)),
        ("where each patch came from", _flow_colours(offset / reach)),
        ("how similar it is", _heat_colours(heat)),
    ]
    height = round(min(max(_PANEL * lr.size[0] / lr.size[1], 240), 1.5 * _PANEL))
    cell = _PANEL + _GAP, height + _CAPTION + _GAP
    sheet = pillow.new("RGB", (3 * cell[0] + _GAP, 2 * cell[1] + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (caption, pixels) in enumerate(panels):
        x, y = _GAP + number % 3 * cell[0], _GAP + number // 3 * cell[1]
        draw.text((x, y), caption, _INK, _font(20))
        sheet.paste(_fit(pixels, height), (x, y + _CAPTION))
    _draw_legend(sheet, (_GAP + 2 * cell[0], _GAP + cell[1]), height, reach, lowest)
    return Image(np.asarray(sheet))


def _offsets(index: Tensor, ref_size: tuple[int, int]) -> np.ndarray:  # [2, h, w]
    """Down and to the right, in pixels of the reference."""
    found = np.stack(np.divmod(index.numpy(), ref_size[1])) + SCALE / 2
    own = np.indices(index.shape) + 0.5
    return found - own * (np.array(ref_size) / index.shape)[:, None, None]


def _flow_colours(offset: np.ndarray) -> np.ndarray:  # [2, h, w] -> [h, w, 3]
    """Hue from the direction, saturation from the length, at its full at 1."""
    length = np.minimum(np.hypot(*offset), 1)
    return _oklch_to_srgb(0.96 - 0.21 * length, 0.127 * length, np.arctan2(*offset))


def _heat_colours(x: np.ndarray) -> np.ndarray:  # [h, w] -> [h, w, 3]
    """0 to 1 as dark violet over green to light yellow, in even steps of lightness."""
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


def _shown(image: Image) -> np.ndarray:  # [H, W, 3] uint8
    return from_tensor(image.to_tensor(), np.empty((0, 0, 3), np.uint8))


def _fit(pixels: np.ndarray, height: int) -> Any:
    """As large as a panel allows; single pixels stay visible where it enlarges."""
    from PIL import Image as pillow

    scale = min(_PANEL / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    kind = pillow.Resampling.NEAREST if scale > 1 else pillow.Resampling.BICUBIC
    return pillow.fromarray(pixels).resize(size, kind)


def _draw_legend(
    sheet: Any, corner: tuple[int, int], height: int, reach: float, lowest: float
) -> None:
    """The colour wheel of the offsets, and below it the scale of the scores."""
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


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
