"""Rolled search: one kernel with 3 * C products per pair, for patches of 3x3.

A program processes one diagonal (`layout.py`) for one tile of query columns and one tile of key
columns. The three taps of a row are in the product; three rows are summed along the diagonal. Only
the maximum leaves the program. Narrow images are laid out in bands, so that tiles are full at any
width.
"""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels import tile_configs
from ttsr_fast.kernels.argmax import Argmax, merge
from ttsr_fast.kernels.key_scale import image_stride, load_scale
from ttsr_fast.kernels.layout import Layout, column_of, diagonal, size_names
from ttsr_fast.kernels.pack import Packed
from ttsr_fast.kernels.precision import multiply_add
from ttsr_fast.kernels.tile_configs import TileConfig

HALO = 2
MIN_BAND_HEIGHT = 12  # the halo of a band is stored and multiplied again
MAX_BANDS = 12


@lru_cache(maxsize=256)
def layouts(
    query: tuple[int, int], key: tuple[int, int], padding: int, tile: TileConfig
) -> tuple[Layout, Layout]:
    """Bands of two grids of patches for the fewest multiplied pairs."""
    bands = [max(1, min(MAX_BANDS, height // MIN_BAND_HEIGHT)) for height, _ in (query, key)]
    queries, keys = (
        [Layout(*grid, HALO, bands=n + 1) for n in range(most)]
        for grid, most in zip((query, key), bands, strict=True)
    )
    return min(
        ((q, k) for q in queries for k in keys),
        key=lambda pair: multiplied_pairs(pair[0], pair[1], padding, tile),
    )


def multiplied_pairs(query: Layout, key: Layout, padding: int, tile: TileConfig) -> int:
    """Multiplied pairs of pixels of one image, padding of tiles included."""
    halo = HALO - _starts_in_padding(query, key, padding)
    rows = query.band_height * key.band_height + halo * _diagonals(query, key)
    query_tiles, key_tiles = _tiles(query, key, tile)
    return rows * query_tiles * tile.block_q * key_tiles * tile.block_k


def _diagonals(query: Layout, key: Layout) -> int:
    return query.band_height + key.band_height - 1


def _tiles(query: Layout, key: Layout, tile: TileConfig) -> tuple[int, int]:
    """Tiles of a line, up to its last patch."""
    ends = [x.line - x.piece + x.strip_width for x in (query, key)]
    return triton.cdiv(ends[0], tile.block_q), triton.cdiv(ends[1], tile.block_k)


def _starts_in_padding(query: Layout, key: Layout, padding: int) -> bool:
    """The first row of every diagonal is padding in one map, so its products are zero."""
    return padding > 0 and query.bands == key.bands == 1


def rolled_search(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, 1, band height, slots]
    argmax: Argmax,  # words are merged into
    padding: int,
    tile: TileConfig,
) -> None:
    precision = query.precision
    descriptors = tile_configs.has_descriptors()
    block_c = precision.block_c
    query_tiles, key_tiles = _tiles(query.layout, key.layout, tile)
    diagonals = _diagonals(query.layout, key.layout)
    rolled_search_kernel[(diagonals * query.images * query_tiles * key_tiles,)](
        _rows(query, tile.block_q, block_c, descriptors),
        _rows(key, tile.block_k, block_c, descriptors),
        scale,
        argmax.words,
        query.images,
        image_stride(key.images, 1),
        image_stride(len(scale), 1),
        *query.layout.sizes,
        *key.layout.sizes,
        scale.shape[3],
        query_tiles,
        key_tiles,
        int(_starts_in_padding(query.layout, key.layout, padding)),
        K=precision.products * query.channels,
        SECTIONS=len(precision.query_sections),
        C=query.channels,
        INPUT_PRECISION=precision.input_precision,
        DESCRIPTORS=descriptors,
        LAZY=tile_configs.lazy(),
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        BLOCK_C=block_c,
        **tile.options,
    )


def _rows(packed: Packed, block: int, block_c: int, descriptors: bool):
    """Rows of a packed map as a kernel takes them: a descriptor or a tensor."""
    if not descriptors:
        return packed.rows
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(packed.rows, [block, block_c])


@triton.jit
def _load(
    rows,  # [*, WIDTH], a descriptor or a pointer
    row,
    column,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # [BLOCK, BLOCK_C]
    if DESCRIPTORS:
        b_x = rows.load([row.to(tl.int32), column])
    else:
        o_rc = (tl.arange(0, BLOCK) * WIDTH)[:, None] + tl.arange(0, BLOCK_C)[None, :]
        b_x = tl.load(rows + (row * WIDTH + column) + o_rc)
    return b_x


@triton.jit(
    do_not_specialize=[
        *("N", "stride_key", "stride_scale", *size_names(), *size_names("_K")),
        *("SLOTS", "QUERY_TILES", "KEY_TILES", "FIRST"),
    ]
)
def rolled_search_kernel(
    query,  # [N*LINES*LINE + slack, SECTIONS*C], a descriptor or a pointer
    key,  # [N*LINES_K*LINE_K + slack, SECTIONS*C], the same
    p_scale,  # [N or 1, BAND_HEIGHT_K, SLOTS]
    p_argmax,  # [N, HEIGHT, WIDTH], merged into
    N,
    stride_key,  # of images, 0 or 1
    stride_scale,  # of images, 0 or 1
    HEIGHT,
    WIDTH,
    BAND_HEIGHT,
    STRIP_WIDTH,
    PIECE,
    LINE,
    LINES,
    HEIGHT_K,
    WIDTH_K,
    BAND_HEIGHT_K,
    STRIP_WIDTH_K,
    PIECE_K,
    LINE_K,
    LINES_K,
    SLOTS,
    QUERY_TILES,
    KEY_TILES,
    FIRST,  # 1 if row 0 of a diagonal is zero
    K: tl.constexpr,  # columns in the product
    SECTIONS: tl.constexpr,
    C: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LAZY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROW: tl.constexpr = SECTIONS * C
    i_p = tl.program_id(0)
    i_k, i_q = i_p % KEY_TILES, i_p // KEY_TILES % QUERY_TILES
    i_p = i_p // (KEY_TILES * QUERY_TILES)
    i_n = (i_p % N).to(tl.int64)
    offset, y_q, length = diagonal(i_p // N, BAND_HEIGHT, BAND_HEIGHT_K)
    y_k = y_q + offset

    o_q, o_k = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_out = column_of(o_q, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE)
    row_q = (i_n * LINES + y_q) * LINE + i_q * BLOCK_Q
    row_k = (i_n * stride_key * LINES_K + y_k) * LINE_K + i_k * BLOCK_K
    p_argmax += i_n * HEIGHT * WIDTH
    p_scale += i_n * stride_scale * BAND_HEIGHT_K * SLOTS
    b_last = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    b_pair = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for y in range(FIRST, length + 2):
        b_row = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        # Taps in the inner loop: two of three loads of the same channels hit the cache.
        for step in range(3 * (K // BLOCK_C)):
            dx, c = step % 3, step // 3 * BLOCK_C
            b_q = _load(query, row_q + y * LINE + dx, c, ROW, DESCRIPTORS, BLOCK_Q, BLOCK_C)
            b_k = _load(key, row_k + y * LINE_K + dx, c, ROW, DESCRIPTORS, BLOCK_K, BLOCK_C)
            b_row = multiply_add(b_q, b_k.T, b_row, INPUT_PRECISION)
        b_t = b_pair + b_row
        b_pair = b_last + b_row
        b_last = b_row
        if y >= 2:
            y_out, y_key = y_q + y - 2, y_k + y - 2
            b_s = b_t * load_scale(p_scale + y_key * SLOTS + o_k)[None, :]
            m_q = o_out < (HEIGHT - y_out) * WIDTH
            p_out = p_argmax + (o_out + y_out * WIDTH)
            merge(p_out, b_s, o_k, y_key * WIDTH_K, PIECE_K, BAND_HEIGHT_K * WIDTH_K, m_q, LAZY)
