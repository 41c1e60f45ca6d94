"""Drawings of a match: the colours mean what the legend says, and lie where they belong."""

import numpy as np
import pytest
import torch

from ttsr_fast.images import Image
from ttsr_fast.visualize import draw_comparison, draw_match

each = pytest.mark.parametrize
PANEL, GAP, CAPTION = 480, 28, 40  # pixels


def linear(srgb):
    srgb = np.asarray(srgb) / 255
    return np.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)


def lightness(srgb):
    """CIE L*, from 0 to 100, of `[*, 3]`."""
    y = linear(srgb) @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def solid(height, width, *colour):
    return Image(np.broadcast_to(np.array(colour, np.uint8), (height, width, len(colour))))


def draw(*, size=(20, 30), ref=None, score=None, index=None):
    """The panels of a sheet: lr, reference, result, origin, score, and the legend."""
    height, width = size
    ref = ref or solid(4 * height, 4 * width, 0, 255, 0)
    if index is None:  # every patch from its own place
        index = torch.arange(height)[:, None] * 4 * ref.size[1] + torch.arange(width) * 4
    if score is None:
        score = torch.ones(size)
    image = solid(4 * height, 4 * width, 0, 0, 255)
    sheet = draw_match(solid(height, width, 255, 0, 0), ref, image, score, index).pixels
    step_y, step_x = (sheet.shape[0] - GAP) // 2, PANEL + GAP
    assert sheet.shape[1] == 3 * step_x + GAP
    tops = [GAP + CAPTION, GAP + CAPTION + step_y]
    return [
        sheet[top : top + step_y - CAPTION - GAP, left : left + PANEL]
        for top in tops
        for left in range(GAP, 3 * step_x, step_x)
    ]


def test_images_fill_their_panels():
    low, ref, result, *_ = draw()
    assert low.shape == (320, 480, 3)
    assert (low == [255, 0, 0]).all()
    assert (ref == [0, 255, 0]).all()
    assert (result == [0, 0, 255]).all()


def test_a_panel_keeps_proportions():
    _, ref, *_ = draw(ref=solid(100, 50, 0, 255, 0))
    assert (ref[:, :160] == [0, 255, 0]).all()  # 320 high, as the others
    assert (ref[:, 160:] == 255).all()


@each("kind", ["grey", "deep", "alpha"])
def test_other_kinds_are_shown_in_8_bit_colour(kind):
    pixels = np.full((80, 120, 1), 100, np.uint8)
    ref = {
        "grey": Image(pixels),
        "deep": Image(pixels.repeat(3, axis=2).astype(np.uint16) * 257),
        "alpha": Image(pixels, pixels[..., 0] // 2),
    }[kind]
    assert (draw(ref=ref)[1] == 100).all()


def test_patches_from_their_own_place_are_nearly_white():
    flow = draw()[3]
    assert (flow == flow[0, 0]).all()
    assert flow[0, 0].min() > 225
    assert np.ptp(flow[0, 0].astype(int)) <= 12  # 0.5 pixel off, for a 4x4 block has no centre


@each(
    ("down", "right", "brightest", "darkest"),
    [(0, 9, 0, 1), (0, -9, 1, 0), (-9, 0, 2, 1), (9, 0, 0, 2)],
)
def test_the_direction_gives_the_hue(down, right, brightest, darkest):
    """Right is red, left green to cyan, up violet-blue, down yellow."""
    index = torch.full((20, 30), 0)
    own = torch.meshgrid(torch.arange(20) * 4, torch.arange(30) * 4, indexing="ij")
    row, column = own[0] + 40 * down, own[1] + 40 * right
    index = row.clamp(0, 76) * 120 + column.clamp(0, 116)
    colour = draw(index=index)[3][160, 240].astype(int)
    assert colour[brightest] - colour[darkest] > 40


def test_the_distance_gives_the_saturation():
    own = torch.meshgrid(torch.arange(20) * 4, torch.arange(30) * 4, indexing="ij")
    index = own[0] * 120 + (own[1] // 2 // 4 * 4)  # the farther right, the farther away
    flow = draw(index=index)[3].astype(int)
    spread = np.ptp(flow, axis=2)[160, 8::16]
    assert (np.diff(spread) >= -4).all()
    assert spread[0] < 15
    assert spread[-1] > 70


def test_the_score_gives_even_steps_of_lightness():
    score = torch.linspace(0.5, 1, 30).expand(20, 30)
    heat = draw(score=score)[4][160, 8::16]
    steps = np.diff(lightness(heat))[1:]
    assert (steps > 0).all()
    assert steps.max() < 1.6 * steps.mean()
    assert lightness(heat[0]) < 20
    assert lightness(heat[-1]) > 88


def test_the_wheel_is_even_around():
    legend = draw()[5]
    side = 220
    angle = np.arange(0, 2 * np.pi, 0.3)
    for radius in (0.3, 0.9):
        y, x = (side / 2 * (1 + radius * f(angle)) for f in (np.sin, np.cos))
        around = lightness(legend[y.astype(int), x.astype(int)])
        assert np.ptp(around) < 8 * radius
    assert lightness(legend[side // 2, side // 2]) > 92
    assert (legend[0, 0] == 255).all()  # paper, outside the disc


@each("size", [(1, 1), (1, 40), (40, 1), (50, 20)])
def test_every_size_is_drawn(size):
    low, *_, flow, heat, _ = draw(size=size, score=torch.full(size, 0.5))
    scale = min(480 / size[1], low.shape[0] / size[0])
    shown = round(size[0] * scale), round(size[1] * scale)
    for panel in (flow, heat):
        inside = panel[: shown[0], : shown[1]]
        assert (inside == inside[0, 0]).all()
        assert (panel[shown[0] :] == 255).all()
        assert (panel[:, shown[1] :] == 255).all()
    assert (low[: shown[0], : shown[1]] == [255, 0, 0]).all()


def test_runs_are_equal():
    score = torch.rand(20, 30)
    for first, second in zip(draw(score=score), draw(score=score), strict=True):
        np.testing.assert_array_equal(first, second)


def test_several_references_are_framed_in_the_colours_of_what_they_served():
    height, width = 20, 30
    refs = [solid(80, 120, *colour) for colour in ((9, 9, 9), (99, 99, 99), (200, 200, 200))]
    origin = torch.zeros(height, width, dtype=torch.int64)
    origin[:, 15:] = 2
    index = torch.arange(height)[:, None] * 4 * 120 + torch.arange(width) * 4
    result = solid(4 * height, 4 * width, 0, 0, 255)
    score = torch.ones(height, width)
    low = solid(height, width, 255, 0, 0)
    sheet = draw_match(low, refs, result, score, index, origin).pixels
    step_y, step_x = (sheet.shape[0] - GAP) // 2, PANEL + GAP
    assert sheet.shape[1] == 4 * step_x + GAP
    top, high = GAP + CAPTION, step_y - CAPTION - GAP
    which = sheet[top : top + high, GAP + 3 * step_x : GAP + 3 * step_x + PANEL]
    left, right = which[high // 2, 10], which[high // 2, PANEL - 10]
    assert np.abs(left.astype(int) - right).max() > 60
    assert (which[:, :230] == left).all() and (which[:, 250:] == right).all()

    panel = sheet[top : top + high, GAP + step_x : GAP + step_x + PANEL]
    assert (panel[2, 2] == left).all(), "the first reference is in the colour of its patches"
    for ref in refs:
        assert (panel == ref.pixels[0, 0]).all(2).sum() > 2000
    colours = {tuple(panel[y, x]) for y in range(high) for x in (2, panel.shape[1] // 2 + 2)}
    assert tuple(right) in colours


def test_offsets_count_in_the_reference_of_each_patch():
    """The second is half as large: the same place has another index, and is white all the same."""
    origin = torch.zeros(20, 30, dtype=torch.int64)
    origin[10:] = 1
    row, column = torch.arange(20)[:, None], torch.arange(30)
    first = row * 4 * 120 + column * 4
    second = row * 2 * 60 + column * 2
    index = torch.where(origin == 0, first, second)
    refs = [solid(80, 120, 9, 9, 9), solid(40, 60, 9, 9, 9)]
    result, low = solid(80, 120, 0, 0, 255), solid(20, 30, 255, 0, 0)
    sheet = draw_match(low, refs, result, torch.ones(20, 30), index, origin).pixels
    step_y = (sheet.shape[0] - GAP) // 2
    top = GAP + CAPTION + step_y
    flow = sheet[top : top + step_y - CAPTION - GAP, GAP : GAP + PANEL]
    assert flow.min() > 180


# --- a result beside the truth --------------------------------------------------------------------

STEP = PANEL + GAP


def compare(size=(40, 60), refs=(), origin=None):
    """A sheet of three images; the first is wrong in a block of 4x4, below and to the right."""
    height, width = size
    truth = np.zeros((height, width, 3), np.uint8)
    truth[..., 1] = 200
    start, result = truth.copy(), truth.copy()
    start[height - 8 : height - 4, width - 9 : width - 5] = [0, 0, 255]
    result[0, 0] = 255
    panels = [("start", Image(start)), ("result", Image(result)), ("truth", Image(truth))]
    return draw_comparison(panels, refs, origin).pixels


@each("size", [(40, 60), (60, 40), (21, 400)])
def test_what_is_magnified_is_where_the_first_panel_is_worst(size):
    sheet = compare(size)
    scale = min(PANEL / size[1], 1.5 * PANEL / size[0])
    height, width = (round(n * scale) for n in size)
    assert sheet.shape == (2 * (height + GAP) + CAPTION + GAP, 3 * STEP + GAP, 3)
    below = sheet[GAP + CAPTION + height + GAP :]
    start, result, truth = (below[:height, GAP + n * STEP :][:, :width] for n in range(3))
    blue = (start == [0, 0, 255]).all(2)
    rows, columns = (-(-n // 4) for n in size)
    assert blue.mean() == pytest.approx(4 / rows * 4 / columns, rel=0.05)
    assert (start[~blue] == [0, 200, 0]).all()
    assert (result == [0, 200, 0]).all()
    assert (truth == [0, 200, 0]).all()


def test_the_frame_is_around_what_is_magnified():
    sheet = compare()[GAP + CAPTION :, GAP:][:320, :PANEL]
    rows, columns = np.nonzero((sheet == [230, 30, 60]).all(2))
    blue = np.argwhere((sheet == [0, 0, 255]).all(2))
    assert rows.max() - rows.min() + 1 == 80  # a quarter of each side
    assert columns.max() - columns.min() + 1 == 120
    assert (blue.min(0) > [rows.min(), columns.min()]).all()
    assert (blue.max(0) < [rows.max(), columns.max()]).all()


def test_references_are_beside_it():
    ref = solid(300, 300, 255, 0, 0)
    sheet = compare(refs=[ref])
    panel = sheet[GAP + CAPTION :, GAP + 3 * STEP :][:320, :320]
    assert (panel == [255, 0, 0]).all()
    origin = np.array([[0, 1, 1, 1]])
    other = solid(300, 300, 255, 255, 0)
    two = compare(refs=[ref, other], origin=origin)[:, 3 * STEP :]
    for colour in ([255, 0, 0], [255, 255, 0]):
        assert (two == colour).all(2).sum() > 10000


def test_a_long_caption_stays_over_its_panel():
    image = solid(40, 60, 0, 0, 0)
    panels = [("a long name of an image " * 9, image), ("truth", image)]
    caption = draw_comparison(panels, []).pixels[: GAP + CAPTION]
    assert (caption[:, GAP : GAP + PANEL] != 255).any()
    assert (caption[:, GAP + PANEL : STEP + GAP] == 255).all()
