"""Packing of feature maps: padded, channels last, rounded to the precision of the search.

A pixel of a packed map is one row of channels, at the place given by `layout.py`. Pixel (dy, dx) of
a patch is `dy * LINE + dx` rows after its first pixel. So a tile of patches is a block of a matrix,
and each tap of these patches is a block a few rows further. Rows that a tile reads beyond a line
belong to no patch and are masked at the end. `SLACK` rows of zeros follow the last pixel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import EMPTY, NO_KEY, Argmax
from ttsr_fast.kernels.layout import Layout, size_names
from ttsr_fast.kernels.precision import Precision

SLACK = tl.constexpr(288)  # rows; a tile of up to 256 patches reads less beyond the last pixel
AMAX_BLOCKS = tl.constexpr(64)  # partial maxima of an image
BLOCK_X, BLOCK_C = 32, 64  # pixels and channels of a program; channels are padded to whole blocks
# A pixel with a larger norm counts as non-finite: the sum of nine squares would overflow float32.
LARGEST = tl.constexpr(2.0**62)


class Packed(NamedTuple):
    """Packed map.

    Attributes:
        rows: `[N*pixels + SLACK, sections*C]`, C whole blocks of channels.
        squared_norm: `[N*pixels + SLACK]` float32, of the multiplied part of a pixel; NaN for a
            non-finite pixel, and its row is zero.
        amax: `[N, AMAX_BLOCKS]` float32, partial maxima of the features if they are scaled.
        images: N.
        channels: C.
        layout: of an image.
        precision: of the features.
    """

    rows: Tensor
    squared_norm: Tensor
    amax: Tensor
    images: int
    channels: int
    layout: Layout
    precision: Precision


def pack(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    packed_query: Packed,  # filled
    packed_key: Packed,  # filled
    argmax: Argmax,  # filled with EMPTY and NO_KEY
    padding: int,
) -> None:
    """Pack both maps in one launch, or two if the features are scaled."""
    precision = packed_query.precision
    if precision.scaled:
        _amax(query, key, packed_query.amax, packed_key.amax)
    maps, programs = [], []
    for x, to in ((query, packed_query), (key, packed_key)):
        layout = to.layout
        blocks = triton.cdiv(layout.piece, BLOCK_X)
        runs = to.images * layout.strips * layout.lines * layout.bands
        maps += [x, *x.stride(), to.images, *x.shape[2:], *layout.sizes[2:]]
        maps += [layout.strips, blocks, to.rows, to.squared_norm, to.amax]
        programs.append(runs * blocks + triton.cdiv(SLACK.value, BLOCK_X))
    pack_kernel[(sum(programs),)](
        *maps,
        *argmax,
        argmax.words.numel(),
        argmax.first_nonfinite_key.numel(),
        programs[0],
        query.shape[1],
        C_PACKED=packed_query.channels,
        PADDING=padding,
        QUERY_SECTIONS=precision.query_sections,
        KEY_SECTIONS=precision.key_sections,
        PARTS=precision.parts,
        PRODUCTS=precision.products,
        SCALED=precision.scaled,
        BLOCK_X=BLOCK_X,
        BLOCK_C=BLOCK_C,
    )


def allocate(
    x: Tensor,  # [N, C, H, W]
    layout: Layout,
    precision: Precision,
) -> Packed:
    n, c = x.shape[:2]
    c = triton.cdiv(c, BLOCK_C) * BLOCK_C
    rows = n * layout.pixels + SLACK.value
    return Packed(
        x.new_empty(rows, len(precision.query_sections) * c, dtype=precision.dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(n, AMAX_BLOCKS.value if precision.scaled else 0, dtype=torch.float32),
        n,
        c,
        layout,
        precision,
    )


def _amax(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    query_amax: Tensor,  # [N, AMAX_BLOCKS], filled
    key_amax: Tensor,  # [N or 1, AMAX_BLOCKS], filled
) -> None:
    maps = []
    for x, amax in ((query, query_amax), (key, key_amax)):
        axes = sorted(range(1, 4), key=x.stride, reverse=True)  # from the outermost in memory
        maps += [x, x.stride(0), *(x.stride(a) for a in axes), *(x.shape[a] for a in axes), amax]
    images = query.shape[0] + key.shape[0]
    amax_kernel[(images * AMAX_BLOCKS.value,)](*maps, query.shape[0], BLOCK_O=16, BLOCK_I=64)


@triton.jit
def power_of_two_scale(p_amax):
    """Power of two that moves the largest feature of an image into [2**14, 2**15)."""
    largest = tl.max(tl.load(p_amax + tl.arange(0, AMAX_BLOCKS)), axis=0)
    exponent = 127 + 14 + 127 - (largest.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return (exponent << 23).to(tl.float32, bitcast=True)


# Specialised on unit strides alone: no image size compiles again.
@triton.jit(
    do_not_specialize=[
        *("stride_n", "stride_a", "stride_b", "A", "B", "D"),
        *("stride_kn", "stride_ka", "stride_kb", "AK", "BK", "DK", "N"),
    ],
    do_not_specialize_on_alignment=["stride_d", "stride_kd"],
)
def amax_kernel(
    p_query,  # [N, A, B, D], axes of an image from the outermost in memory to the innermost
    stride_n,
    stride_a,
    stride_b,
    stride_d,
    A,
    B,
    D,
    p_query_amax,  # [N, AMAX_BLOCKS], written
    p_key,  # [N or 1, AK, BK, DK]
    stride_kn,
    stride_ka,
    stride_kb,
    stride_kd,
    AK,
    BK,
    DK,
    p_key_amax,  # [N or 1, AMAX_BLOCKS], written
    N,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Partial maxima of the finite features of every image."""
    i_n, i_b = tl.program_id(0) // AMAX_BLOCKS, tl.program_id(0) % AMAX_BLOCKS
    if i_n < N:
        strides, sizes = (stride_n, stride_a, stride_b, stride_d), (A, B, D)
        _amax_block(p_query, strides, sizes, p_query_amax, i_n, i_b, BLOCK_O, BLOCK_I)
    else:
        i_n -= N
        strides, sizes = (stride_kn, stride_ka, stride_kb, stride_kd), (AK, BK, DK)
        _amax_block(p_key, strides, sizes, p_key_amax, i_n, i_b, BLOCK_O, BLOCK_I)


@triton.jit
def _amax_block(
    p_x,
    strides,
    sizes,
    p_amax,  # [*, AMAX_BLOCKS], written
    i_n,
    i_b,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    stride_n, stride_a, stride_b, stride_d = strides
    A, B, D = sizes
    largest = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for outer in range(i_b * BLOCK_O, A * B, AMAX_BLOCKS * BLOCK_O):
        o_o = (outer + tl.arange(0, BLOCK_O)).to(tl.int64)
        p_o = p_x + i_n.to(tl.int64) * stride_n + o_o // B * stride_a + o_o % B * stride_b
        for inner in range(0, D, BLOCK_I):
            o_i = (inner + tl.arange(0, BLOCK_I)).to(tl.int64)
            mask = (o_o < A * B)[:, None] & (o_i < D)[None, :]
            b_x = tl.load(p_o[:, None] + (o_i * stride_d)[None, :], mask=mask, other=0.0)
            b_x = tl.abs(b_x.to(tl.float32))
            largest = tl.maximum(largest, tl.where(b_x < LARGEST, b_x, 0.0))
    tl.store(p_amax + i_n * AMAX_BLOCKS + i_b, tl.max(largest))


@triton.jit(
    do_not_specialize=[
        *("stride_n", "stride_h", "IMAGES", "H", "W", *size_names()[2:]),
        *("stride_kn", "stride_kh", "IMAGES_K", "HK", "WK", *size_names("_K")[2:]),
        *("STRIPS", "BLOCKS", "STRIPS_K", "BLOCKS_K"),
        *("NUMEL_ARGMAX", "NUMEL_NONFINITE", "QUERY_PROGRAMS", "C"),
    ],
    do_not_specialize_on_alignment=["stride_c", "stride_w", "stride_kc", "stride_kw"],
)
def pack_kernel(
    p_query,  # [N, C, H, W]
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    IMAGES,
    H,
    W,
    BAND_HEIGHT,
    STRIP_WIDTH,
    PIECE,
    LINE,
    LINES,
    STRIPS,
    BLOCKS,  # of BLOCK_X pixels in a row of a piece
    p_query_rows,  # [N*pixels + SLACK, sections*C_PACKED], written
    p_query_squared_norm,  # [N*pixels + SLACK], written
    p_query_amax,  # [N, AMAX_BLOCKS]
    p_key,  # [N or 1, C, HK, WK]; the same parameters again
    stride_kn,
    stride_kc,
    stride_kh,
    stride_kw,
    IMAGES_K,
    HK,
    WK,
    BAND_HEIGHT_K,
    STRIP_WIDTH_K,
    PIECE_K,
    LINE_K,
    LINES_K,
    STRIPS_K,
    BLOCKS_K,
    p_key_rows,
    p_key_squared_norm,
    p_key_amax,
    p_argmax,  # [NUMEL_ARGMAX] int64, filled
    p_first_nonfinite,  # [NUMEL_NONFINITE] int32, filled
    NUMEL_ARGMAX,
    NUMEL_NONFINITE,
    QUERY_PROGRAMS,
    C,
    C_PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    QUERY_SECTIONS: tl.constexpr,
    KEY_SECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0)
    # Programs cover every pixel, so every query patch and every image.
    o_fill = i_b.to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X)
    tl.store(p_argmax + o_fill, tl.full([BLOCK_X], EMPTY, tl.int64), mask=o_fill < NUMEL_ARGMAX)
    tl.store(
        p_first_nonfinite + o_fill,
        tl.full([BLOCK_X], NO_KEY, tl.int32),
        mask=o_fill < NUMEL_NONFINITE,
    )
    if i_b < QUERY_PROGRAMS:
        _pack_pixels(
            (p_query, stride_n, stride_c, stride_h, stride_w),
            (IMAGES, H, W),
            (BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES, STRIPS, BLOCKS),
            (p_query_rows, p_query_squared_norm, p_query_amax),
            i_b,
            C,
            C_PACKED,
            PADDING,
            QUERY_SECTIONS,
            PARTS,
            PRODUCTS,
            SCALED,
            BLOCK_X,
            BLOCK_C,
        )
    else:
        _pack_pixels(
            (p_key, stride_kn, stride_kc, stride_kh, stride_kw),
            (IMAGES_K, HK, WK),
            (BAND_HEIGHT_K, STRIP_WIDTH_K, PIECE_K, LINE_K, LINES_K, STRIPS_K, BLOCKS_K),
            (p_key_rows, p_key_squared_norm, p_key_amax),
            i_b - QUERY_PROGRAMS,
            C,
            C_PACKED,
            PADDING,
            KEY_SECTIONS,
            PARTS,
            PRODUCTS,
            SCALED,
            BLOCK_X,
            BLOCK_C,
        )


@triton.jit
def _pack_pixels(
    x,  # pointer and strides of the map
    sizes,  # of the map
    layout,
    packed,  # pointers, written but for amax
    i_b,
    C,
    C_PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    SECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p_x, stride_n, stride_c, stride_h, stride_w = x
    IMAGES, H, W = sizes
    BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES, STRIPS, BLOCKS = layout
    p_rows, p_squared_norm, p_amax = packed
    # A run is a row of a piece: run = [image, strip, line, band].
    bands = LINE // PIECE
    runs = IMAGES * STRIPS * LINES * bands
    run = i_b // BLOCKS
    in_slack = run >= runs
    run = tl.where(in_slack, runs, run)
    o_x = (i_b - run * BLOCKS) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < tl.where(in_slack, SLACK, PIECE)
    band, line, strip = run % bands, run // bands % LINES, run // (bands * LINES) % STRIPS
    i_n = (run // (bands * LINES * STRIPS)).to(tl.int64)
    y, x = band * BAND_HEIGHT + line - PADDING, strip * STRIP_WIDTH + o_x - PADDING
    inside = (run < runs) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    p_pixel = p_x + i_n * stride_n + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w

    total = tl.zeros([BLOCK_X], tl.float32)
    for c in range(0, C_PACKED, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
        m_xc = inside[:, None] & (o_c < C)[None, :]
        # [BLOCK_X, BLOCK_C]
        b_x = tl.load(p_pixel[:, None] + (o_c * stride_c)[None, :], mask=m_xc, other=0.0)
        b_x = b_x.to(tl.float32)
        total += tl.sum(b_x * b_x, axis=1)
    finite = total <= LARGEST * LARGEST  # NaN compares false
    scale = 1.0
    if SCALED:
        scale = power_of_two_scale(p_amax + tl.where(in_slack, 0, i_n) * AMAX_BLOCKS)

    WIDTH: tl.constexpr = len(SECTIONS) * C_PACKED
    o_row = run.to(tl.int64) * PIECE + o_x
    square = tl.zeros([BLOCK_X], tl.float32)
    for c in range(0, C_PACKED, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C)).to(tl.int64)
        m_xc = (inside & finite)[:, None] & (o_c < C)[None, :]
        left = tl.load(p_pixel[:, None] + (o_c * stride_c)[None, :], mask=m_xc, other=0.0)
        left = left.to(tl.float32) * scale
        multiplied = tl.zeros([BLOCK_X, BLOCK_C], tl.float32)
        p_row = p_rows + (o_row * WIDTH)[:, None] + o_c[None, :]
        for part in tl.static_range(PARTS):
            rounded = left.to(p_rows.dtype.element_ty)
            for section in tl.static_range(len(SECTIONS)):
                if SECTIONS[section] == part:
                    tl.store(p_row + section * C_PACKED, rounded, mask=m_x[:, None])
            left -= rounded.to(tl.float32)
            if part == 0 or PRODUCTS == 3:
                multiplied += rounded.to(tl.float32)
        square += tl.sum(multiplied * multiplied, axis=1)
    tl.store(p_squared_norm + o_row, tl.where(finite, square, float("nan")), mask=m_x)
