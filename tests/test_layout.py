"""Layout of packed maps: bands, strips and blocks, and the useful share of tiles."""

import pytest
import torch
import triton
import triton.language as tl

from tests.checks import assert_same_choice
from tests.test_kernels import (  # noqa: F401  # a fixture and marks, used here too
    SMALL,
    _all_in_triton,
    maps,
    pytestmark,
    run,
    small_blocks,
)
from ttsr_fast.kernels import rolled, slab, tile_configs
from ttsr_fast.kernels import search as kernels
from ttsr_fast.kernels.layout import Layout, column_of, first_pixel
from ttsr_fast.kernels.tile_configs import TileConfig
from ttsr_fast.operators.patch import Patch

each = pytest.mark.parametrize


@triton.jit
def _evaluate(p_first, p_column, sizes, STRIPS, BLOCK: tl.constexpr):
    HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES = sizes
    o = tl.arange(0, BLOCK)
    first = first_pixel(o, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES)
    tl.store(p_first + o, first, mask=o < HEIGHT * WIDTH)
    column = column_of(o % LINE, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, o // LINE)
    tl.store(p_column + o, column, mask=o < STRIPS * LINE)


@each("halo", [0, 2, 4])
@each(("bands", "strips", "align"), [(1, 1, 1), (3, 1, 1), (1, 3, 4), (4, 1, 4), (2, 2, 1)])
@each(("height", "width"), [(1, 1), (7, 5), (4, 13), (9, 3)])
def test_every_patch_has_one_place(height, width, bands, strips, align, halo):
    layout = Layout(height, width, halo, bands, strips, align)
    first = torch.full((height * width,), -1, dtype=torch.int32)
    column = torch.full((strips * layout.line,), -1, dtype=torch.int32)
    _evaluate[(1,)](first, column, layout.sizes, strips, BLOCK=256)
    strip, line = first // layout.line // layout.lines, first // layout.line % layout.lines
    own = column.view(strips, -1)[strip, first % layout.line] + line * width
    assert torch.equal(own, torch.arange(height * width, dtype=torch.int32))
    rows = torch.arange(layout.band_height, dtype=torch.int32)[:, None] * width
    found = (column + rows).flatten()
    assert torch.equal(found[found < height * width].sort().values, own), "each patch once"
    assert first.max() + halo * (layout.line + 1) < layout.pixels


@each(
    ("leading", "rows", "batch", "query_rows", "key_rows"),
    [(64, 28, 1, 4, 2), (64, 98, 2, 4, 5), (256, 49, 3, 7, 5)],
    ids=["overlapping_blocks", "images_down", "images_across"],
)
def test_slab_in_blocks(monkeypatch, leading, rows, batch, query_rows, key_rows):
    small_blocks(monkeypatch, leading, rows)
    blocks = slab.Blocks(*slab.layouts((7, 13), (5, 9)), images=3)
    assert (blocks.batch, blocks.query_rows, blocks.key_rows) == (batch, query_rows, key_rows)
    assert (blocks.query.strips, blocks.key.strips) == (3, 2)
    query, key = maps((3, 5, 7, 13), (3, 5, 5, 9))
    assert_same_choice(run("slab", query, key, tile=SMALL), query, key)


@each(("query", "key"), [((30, 5), (26, 9)), ((25, 3), (13, 11))])
@each("precision", ["fp32", "fp16x3"])
def test_rolled_in_bands(query, key, precision):
    """Bands of narrow maps; the last band may be shorter."""
    tile = TileConfig(32, 32, 4, 2)
    layouts = rolled.layouts(query, key, 1, tile)
    assert any(layout.bands > 1 for layout in layouts)
    query, key = maps((2, 5, *query), (1, 5, *key))
    match = run("rolled", query, key, precision=precision, tile=tile)
    assert_same_choice(match, query, key.expand(2, -1, -1, -1), precision=precision)


# Minimum share of all pairs that the rolled search multiplies on Hopper.
USEFUL = {
    (80, 120): 0.85,
    (125, 185): 0.85,
    (160, 240): 0.85,
    (270, 480): 0.90,
    (540, 960): 0.93,
    (160, 160): 0.79,
    (40, 40): 0.62,
}


@each("size", USEFUL)
def test_useful_share_of_tiles(size):
    """Share of pairs, with first and last rows of diagonals, and of the columns of tiles."""
    tile = tile_configs.TABLE["rolled", "sm_90", "tensor"]
    shape = (1, 256, *size)
    pairs = kernels.padded_pairs(shape, shape, Patch(3, 1), "rolled", tile)
    assert (size[0] * size[1]) ** 2 / pairs >= USEFUL[size]
    for layout, block in zip(rolled.layouts(size, size, 1, tile), (128, 128), strict=True):
        columns = -(-layout.line // block) * block
        assert (layout.bands * size[1] / columns) ** 2 > 0.87
