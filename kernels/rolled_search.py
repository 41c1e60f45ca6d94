"""The search in one kernel, with 3 * C products per pair: for patches of 3x3.

A program is a walk (`walk.py`) with one tile of query columns and one tile of key columns. The
three taps along a row go into the product, the three rows are added up on the way. Nothing but the
maximum leaves the program.
"""

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels import tiles
from ttsr_fast.kernels.best import merge
from ttsr_fast.kernels.operands import Operands, columns, multiply_add
from ttsr_fast.kernels.pack import Packed
from ttsr_fast.kernels.patch_norm import image_stride, load_scale
from ttsr_fast.kernels.tiles import Tile
from ttsr_fast.kernels.walk import walk

KERNEL = 3


def rolled_search(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, HKo, WKo]
    best: Tensor,  # [N, Ho, Wo], merged into
    padding: int,
    operands: Operands,
    tile: Tile,
) -> None:
    descriptors = tiles.has_descriptors()
    n, c, hp, wp = query.size
    n_k, _, hkp, wkp = key.size
    ho, wo, hko, wko = (size - KERNEL + 1 for size in (hp, wp, hkp, wkp))
    query_tiles, key_tiles = triton.cdiv(wo, tile.block_q), triton.cdiv(wko, tile.block_k)
    rolled_search_kernel[((ho + hko - 1) * n * query_tiles * key_tiles,)](
        _rows(query, tile.block_q, tile.block_c, descriptors),
        _rows(key, tile.block_k, tile.block_c, descriptors),
        scale,
        best,
        n,
        image_stride(n_k, 1),
        image_stride(len(scale), 1),
        hp,
        wp,
        hkp,
        wkp,
        query_tiles,
        key_tiles,
        C=c,
        STORED=operands.stored,
        MULTIPLIED=operands.multiplied,
        INPUT_PRECISION=operands.input_precision,
        BORDER=padding > 0,
        DESCRIPTORS=descriptors,
        LAZY=tiles.lazy(),
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        BLOCK_C=tile.block_c,
        **tile.options,
    )


def _rows(packed: Packed, block: int, block_c: int, descriptors: bool):
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
        "N",
        "stride_key",
        "stride_scale",
        "HP",
        "WP",
        "HKP",
        "WKP",
        "QUERY_TILES",
        "KEY_TILES",
    ]
)
def rolled_search_kernel(
    query,  # [N*HP*WP + slack, STORED*C], a descriptor or a pointer
    key,  # [N*HKP*WKP + slack, STORED*C], likewise
    p_scale,  # [N or 1, HKO, WKO]
    p_best,  # [N, HO, WO]
    N,
    stride_key,  # 0 if one key serves all images, else 1
    stride_scale,  # likewise
    HP,
    WP,
    HKP,
    WKP,
    QUERY_TILES,
    KEY_TILES,
    C: tl.constexpr,
    STORED: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    LAZY: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    HO, WO, HKO, WKO = HP - 2, WP - 2, HKP - 2, WKP - 2
    WIDTH: tl.constexpr = STORED * C
    STEPS: tl.constexpr = C // BLOCK_C
    SECTIONS: tl.constexpr = 2 * MULTIPLIED - 1
    i_p = tl.program_id(0)
    i_k, i_q = i_p % KEY_TILES, i_p // KEY_TILES % QUERY_TILES
    i_p = i_p // (KEY_TILES * QUERY_TILES)
    i_n = (i_p % N).to(tl.int64)
    offset, y_q, length = walk(i_p // N, HO, HKO)
    y_k = y_q + offset

    o_q, o_k = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_q, m_k = o_q < WO, o_k < WKO
    row_q = (i_n * HP + y_q) * WP + i_q * BLOCK_Q
    row_k = (i_n * stride_key * HKP + y_k) * WKP + i_k * BLOCK_K
    p_out = p_best + (i_n * HO + y_q) * WO + o_q
    p_scale += (i_n * stride_scale * HKO + y_k) * WKO
    b_last = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    b_pair = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for y in range(length + 2):
        b_row = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        steps = SECTIONS * 3 * STEPS
        if BORDER:  # the first and the last row of every walk lie in the padding of one map
            steps = tl.where((y == 0) | (y == length + 1), 0, steps)
        for step in range(steps):
            section, dx, c = step // (3 * STEPS), step // STEPS % 3, step % STEPS * BLOCK_C
            c_q, c_k = columns(section, c, C, MULTIPLIED)
            b_q = _load(query, row_q + y * WP + dx, c_q, WIDTH, DESCRIPTORS, BLOCK_Q, BLOCK_C)
            b_k = _load(key, row_k + y * WKP + dx, c_k, WIDTH, DESCRIPTORS, BLOCK_K, BLOCK_C)
            b_row = multiply_add(b_q, b_k.T, b_row, INPUT_PRECISION)
        b_t = b_pair + b_row
        b_pair = b_last + b_row
        b_last = b_row
        if y >= 2:
            row = y - 2
            b_scale = load_scale(p_scale + row * WKO + o_k, m_k)
            b_s = b_t * b_scale[None, :]
            merge(p_out + row * WO, b_s, (y_k + row) * WKO + o_k, m_q, LAZY)
