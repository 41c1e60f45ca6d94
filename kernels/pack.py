"""Feature maps as the search reads them: padded, channels last, rounded to what is multiplied.

A pixel of a packed map is one row of channels; `layout.py` says which. Pixel (dy, dx) of a patch
is `dy * LINE + dx` rows after its first, so a tile of patches is a block of a matrix, and the same
tap of all its patches is a block further down. Rows that a tile reads beyond a line belong to no
patch and are masked in the end; `SLACK` rows of zeros follow the last pixel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import EMPTY, NO_KEY
from ttsr_fast.kernels.layout import Layout, size_names
from ttsr_fast.kernels.precision import Precision

SLACK = 288  # rows; no tile of up to 256 patches reads further beyond the last pixel
AMAX_BLOCKS = 64  # partial maxima of an image
BLOCK_X, BLOCK_C = 32, 64  # pixels and channels of a program; channels are padded to whole blocks
# A pixel of a larger norm is not finite: the sum of nine such squares would overflow float32.
LARGEST = tl.constexpr(2.0**62)


@dataclass(frozen=True)
class Packed:
    """A packed map.

    Attributes:
        rows: `[N*pixels + SLACK, sections*C]`, C whole blocks of channels.
        square: `[N*pixels + SLACK]` float32: squared norm of what is multiplied of a pixel; NaN for
            one that is not finite, whose row is zero.
        amax: `[N, AMAX_BLOCKS]` float32: partial maxima of the features, where they are scaled.
        images: N.
        channels: C.
        layout: of an image.
    """

    rows: Tensor
    square: Tensor
    amax: Tensor
    images: int
    channels: int
    layout: Layout


def pack(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    packed_query: Packed,  # filled
    packed_key: Packed,  # filled
    argmax: Tensor,  # [N, Ho, Wo] int64, filled with EMPTY
    first_nonfinite_key: Tensor,  # [N or 1] int32, filled with NO_KEY
    padding: int,
    precision: Precision,
) -> None:
    """Both maps, in one launch, or two where the features are scaled."""
    if precision.scaled:
        _amax(query, key, packed_query.amax, packed_key.amax)
    maps, programs = [], []
    for x, to in ((query, packed_query), (key, packed_key)):
        layout = to.layout
        blocks = triton.cdiv(layout.piece, BLOCK_X)
        runs = to.images * layout.strips * layout.lines * layout.bands
        maps += [x, *x.stride(), to.images, *x.shape[2:], *layout.sizes[2:]]
        maps += [layout.strips, blocks, to.rows, to.square, to.amax]
        programs.append(runs * blocks + triton.cdiv(SLACK, BLOCK_X))
    pack_kernel[(sum(programs),)](
        *maps,
        argmax,
        first_nonfinite_key,
        argmax.numel(),
        first_nonfinite_key.numel(),
        programs[0],
        query.shape[1],
        C_PACKED=packed_query.channels,
        PADDING=padding,
        SLACK=SLACK,
        QUERY_SECTIONS=precision.query_sections,
        KEY_SECTIONS=precision.key_sections,
        PARTS=precision.parts,
        MULTIPLIED=precision.multiplied,
        SCALED=precision.scaled,
        AMAX_BLOCKS=AMAX_BLOCKS,
        BLOCK_X=BLOCK_X,
        BLOCK_C=BLOCK_C,
    )


def allocate(x: Tensor, layout: Layout, precision: Precision) -> Packed:
    """Memory for a map `[N, C, H, W]`."""
    n, c = x.shape[:2]
    c = triton.cdiv(c, BLOCK_C) * BLOCK_C
    rows = n * layout.pixels + SLACK
    return Packed(
        x.new_empty(rows, len(precision.query_sections) * c, dtype=precision.dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(n, AMAX_BLOCKS if precision.scaled else 0, dtype=torch.float32),
        n,
        c,
        layout,
    )


def _amax(query: Tensor, key: Tensor, query_amax: Tensor, key_amax: Tensor) -> None:
    maps = []
    for x, amax in ((query, query_amax), (key, key_amax)):
        axes = sorted(range(1, 4), key=x.stride, reverse=True)  # as they lie in memory
        maps += [x, x.stride(0), *(x.stride(a) for a in axes), *(x.shape[a] for a in axes), amax]
    images = query.shape[0] + key.shape[0]
    amax_kernel[(images * AMAX_BLOCKS,)](
        *maps, query.shape[0], AMAX_BLOCKS=AMAX_BLOCKS, BLOCK_O=16, BLOCK_I=64
    )


@triton.jit
def power_of_two_scale(p_amax, AMAX_BLOCKS: tl.constexpr):
    """The power of two that brings the largest feature of an image into [2**14, 2**15)."""
    largest = tl.max(tl.load(p_amax + tl.arange(0, AMAX_BLOCKS)), axis=0)
    exponent = 127 + 14 + 127 - (largest.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return (exponent << 23).to(tl.float32, bitcast=True)


# Specialised on nothing but unit strides: no picture size compiles anew.
@triton.jit(
    do_not_specialize=[
        *("stride_n", "stride_a", "stride_b", "A", "B", "D"),
        *("stride_kn", "stride_ka", "stride_kb", "AK", "BK", "DK", "N"),
    ],
    do_not_specialize_on_alignment=["stride_d", "stride_kd"],
)
def amax_kernel(
    p_query,  # the axes of an image are A, B and D, from the outermost in memory to the innermost
    stride_n,
    stride_a,
    stride_b,
    stride_d,
    A,
    B,
    D,
    p_query_amax,  # [N, AMAX_BLOCKS], written
    p_key,
    stride_kn,
    stride_ka,
    stride_kb,
    stride_kd,
    AK,
    BK,
    DK,
    p_key_amax,  # [N or 1, AMAX_BLOCKS], written
    N,
    AMAX_BLOCKS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Partial maxima of the finite features of every image."""
    i_n, i_b = tl.program_id(0) // AMAX_BLOCKS, tl.program_id(0) % AMAX_BLOCKS
    if i_n < N:
        strides, sizes = (stride_n, stride_a, stride_b, stride_d), (A, B, D)
        _amax_block(p_query, strides, sizes, p_query_amax, i_n, i_b, AMAX_BLOCKS, BLOCK_O, BLOCK_I)
    else:
        i_n -= N
        strides, sizes = (stride_kn, stride_ka, stride_kb, stride_kd), (AK, BK, DK)
        _amax_block(p_key, strides, sizes, p_key_amax, i_n, i_b, AMAX_BLOCKS, BLOCK_O, BLOCK_I)


@triton.jit
def _amax_block(
    p_x,
    strides,
    sizes,
    p_amax,
    i_n,
    i_b,
    AMAX_BLOCKS: tl.constexpr,
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
    p_query_square,  # [N*pixels + SLACK], written
    p_query_amax,  # [N, AMAX_BLOCKS]
    p_key,  # [N or 1, C, HK, WK], and so on
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
    p_key_square,
    p_key_amax,
    p_argmax,  # [NUMEL_ARGMAX] int64, filled
    p_first_nonfinite,  # [NUMEL_NONFINITE] int32, filled
    NUMEL_ARGMAX,
    NUMEL_NONFINITE,
    QUERY_PROGRAMS,
    C,
    C_PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    SLACK: tl.constexpr,
    QUERY_SECTIONS: tl.constexpr,
    KEY_SECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    SCALED: tl.constexpr,
    AMAX_BLOCKS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_b = tl.program_id(0)
    # The programs have a place for every pixel, so for every query patch and every image.
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
            (IMAGES, H, W, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES, STRIPS, BLOCKS),
            (p_query_rows, p_query_square, p_query_amax),
            i_b,
            C,
            C_PACKED,
            PADDING,
            SLACK,
            QUERY_SECTIONS,
            PARTS,
            MULTIPLIED,
            SCALED,
            AMAX_BLOCKS,
            BLOCK_X,
            BLOCK_C,
        )
    else:
        _pack_pixels(
            (p_key, stride_kn, stride_kc, stride_kh, stride_kw),
            (
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
            ),
            (p_key_rows, p_key_square, p_key_amax),
            i_b - QUERY_PROGRAMS,
            C,
            C_PACKED,
            PADDING,
            SLACK,
            KEY_SECTIONS,
            PARTS,
            MULTIPLIED,
            SCALED,
            AMAX_BLOCKS,
            BLOCK_X,
            BLOCK_C,
        )


@triton.jit
def _pack_pixels(
    x,
    sizes,
    packed,
    i_b,
    C,
    C_PACKED: tl.constexpr,
    PADDING: tl.constexpr,
    SLACK: tl.constexpr,
    SECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    SCALED: tl.constexpr,
    AMAX_BLOCKS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p_x, stride_n, stride_c, stride_h, stride_w = x
    IMAGES, H, W, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES, STRIPS, BLOCKS = sizes
    p_rows, p_square, p_amax = packed
    # A run is a row of a piece: [image, strip, line, band].
    bands = LINE // PIECE
    runs = IMAGES * STRIPS * LINES * bands
    run = i_b // BLOCKS
    beyond = run >= runs  # the slack
    run = tl.where(beyond, runs, run)
    o_x = (i_b - run * BLOCKS) * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < tl.where(beyond, SLACK, PIECE)
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
        scale = power_of_two_scale(p_amax + tl.where(beyond, 0, i_n) * AMAX_BLOCKS, AMAX_BLOCKS)

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
            if part == 0 or MULTIPLIED == 3:
                multiplied += rounded.to(tl.float32)
        square += tl.sum(multiplied * multiplied, axis=1)
    tl.store(p_square + o_row, tl.where(finite, square, float("nan")), mask=m_x)
