"""Direct search: nine shifted products, any kernel size, one launch for a whole batch.

A program keeps the running argmax of a tile of query patches over tiles of key patches. The product
of two tiles runs over all taps of a patch and all channels. A tap is the same tile, a few rows
further in the packed map (`pack.py`), so patches are never formed.
"""

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels import tile_configs
from ttsr_fast.kernels.argmax import NO_KEY, Argmax, encode, first_argmax
from ttsr_fast.kernels.key_scale import Score, image_stride, mask_stride, patch_scale, scaled_eps
from ttsr_fast.kernels.pack import AMAX_BLOCKS, Packed
from ttsr_fast.kernels.precision import multiply_add
from ttsr_fast.kernels.tile_configs import TileConfig

PROGRAMS = 528  # minimum, tiles permitting: four for each multiprocessor of an H100


def direct_search(
    query: Packed,
    key: Packed,
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    argmax: Argmax,  # merged into
    scoring: Score,
    tile: TileConfig,
) -> None:
    n, q, k, precision = query.images, query.layout, key.layout, query.precision
    query_tiles = triton.cdiv(q.height * q.line, tile.block_q)
    key_tiles = triton.cdiv(k.height * k.line, tile.block_k)
    splits = min(key_tiles, triton.cdiv(PROGRAMS, n * query_tiles))
    tiles_per_split = triton.cdiv(key_tiles, splits)
    splits = triton.cdiv(key_tiles, tiles_per_split)
    direct_search_kernel[(n * splits * query_tiles,)](
        query.rows,
        key.rows,
        key.squared_norm,
        key.amax,
        key_mask,
        *argmax,
        q.pixels,
        image_stride(key.images, k.pixels),
        image_stride(key.images, AMAX_BLOCKS.value),
        mask_stride(key_mask),
        image_stride(len(argmax.first_nonfinite_key), 1),
        *(q.line, k.line, q.height, q.width, k.height, k.width),
        *(query_tiles, key_tiles, splits, tiles_per_split),
        scoring.eps,
        K=precision.products * query.channels,
        SECTIONS=len(precision.query_sections),
        C=query.channels,
        SCALED=precision.scaled,
        INPUT_PRECISION=precision.input_precision,
        KERNEL=q.halo + 1,
        NORMALIZE=scoring.normalize != "none",
        ADD_EPS=scoring.add_eps,
        MASKED=key_mask is not None,
        LAZY=tile_configs.lazy(),
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        BLOCK_C=precision.block_c,
        **tile.options,
    )


@triton.jit(
    do_not_specialize=[
        *("ROWS_Q", "stride_key", "stride_amax", "stride_mask", "stride_nonfinite"),
        *("WP", "WKP", "HO", "WO", "HKO", "WKO"),
        *("QUERY_TILES", "KEY_TILES", "SPLITS", "TILES_PER_SPLIT"),
    ]
)
def direct_search_kernel(
    p_query,  # [N*ROWS_Q + slack, SECTIONS*C]
    p_key,  # [N*ROWS_K + slack, SECTIONS*C]
    p_squared_norm,  # [N*ROWS_K + slack]
    p_amax,  # [N or 1, AMAX_BLOCKS]
    p_mask,  # [N or 1, HKO, WKO]
    p_argmax,  # [N, HO, WO], merged into
    p_first_nonfinite,  # [N or 1], merged into
    ROWS_Q,
    stride_key,  # of images, in rows
    stride_amax,
    stride_mask,
    stride_nonfinite,
    WP,  # pixels of a line, padding included
    WKP,
    HO,
    WO,
    HKO,
    WKO,
    QUERY_TILES,
    KEY_TILES,
    SPLITS,
    TILES_PER_SPLIT,
    eps: tl.float32,
    K: tl.constexpr,  # columns in the product
    SECTIONS: tl.constexpr,
    C: tl.constexpr,
    SCALED: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    KERNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    MASKED: tl.constexpr,
    LAZY: tl.constexpr,  # as in `argmax.merge`
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_q, i_s = i_p % QUERY_TILES, i_p // QUERY_TILES % SPLITS
    i_n = (i_p // (QUERY_TILES * SPLITS)).to(tl.int64)
    ROW: tl.constexpr = SECTIONS * C
    TAPS: tl.constexpr = KERNEL * KERNEL
    STEPS: tl.constexpr = C // BLOCK_C
    PER_TAP: tl.constexpr = (p_query.dtype.element_ty == tl.float32) & (INPUT_PRECISION == "ieee")
    eps = scaled_eps(eps, p_amax + i_n * stride_amax, SCALED)

    o_c = tl.arange(0, BLOCK_C)
    o_q = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q)  # first pixels, row-major in the padded map
    m_q = (o_q < HO * WP) & (o_q % WP < WO)
    p_q = p_query + (i_n * ROWS_Q + i_q * BLOCK_Q) * ROW
    o_qc = (tl.arange(0, BLOCK_Q) * ROW)[:, None] + o_c[None, :]  # [BLOCK_Q, BLOCK_C]
    o_kc = (tl.arange(0, BLOCK_K) * ROW)[None, :] + o_c[:, None]  # [BLOCK_C, BLOCK_K]
    b_score = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_index = tl.full([BLOCK_Q], NO_KEY, tl.int32)
    first_tile = i_s * TILES_PER_SPLIT
    for i_k in range(first_tile, tl.minimum(first_tile + TILES_PER_SPLIT, KEY_TILES)):
        o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
        m_k = (o_k < HKO * WKP) & (o_k % WKP < WKO)
        p_k = p_key + (i_n * stride_key + i_k * BLOCK_K) * ROW
        b_t = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        b_taps = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
        for step in range(TAPS * (K // BLOCK_C)):
            if PER_TAP:  # noqa: SIM102  # a chain of 9 * C sums would lose too much precision
                if step % STEPS == 0:
                    b_taps += b_t
                    b_t = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
            section, tap, c = step // (TAPS * STEPS), step // STEPS % TAPS, step % STEPS * BLOCK_C
            dy, dx = tap // KERNEL, tap % KERNEL
            if K > C:
                c += section * C
            b_q = tl.load(p_q + ((dy * WP + dx).to(tl.int64) * ROW + c) + o_qc)
            b_k = tl.load(p_k + ((dy * WKP + dx).to(tl.int64) * ROW + c) + o_kc)
            b_t = multiply_add(b_q, b_k, b_t, INPUT_PRECISION)
        b_t += b_taps
        o_i = o_k // WKP * WKO + o_k % WKP
        p_allowed = o_i
        if MASKED:
            p_allowed = p_mask + i_n * stride_mask + o_i
        p_first = p_squared_norm + i_n * stride_key + o_k
        p_nonfinite = p_first_nonfinite + i_n * stride_nonfinite
        b_scale = patch_scale(
            p_first, p_allowed, p_nonfinite, o_i, m_k, WKP, eps, KERNEL, NORMALIZE, ADD_EPS, MASKED
        )
        b_s = b_t * b_scale[None, :]
        b_m = tl.max(b_s, axis=1)
        better = b_m > b_score  # keys ascend: the first of equal scores stays
        improved = True
        if LAZY:
            improved = tl.max(better.to(tl.int32), axis=0) > 0
        if improved:
            b_i = first_argmax(b_s, b_m, o_i)
            b_index = tl.where(better, b_i, b_index)
            b_score = tl.where(better, b_m, b_score)
    p_out = p_argmax + i_n * (HO * WO) + (o_q // WP * WO + o_q % WP)
    tl.atomic_max(p_out, encode(b_score, b_index), mask=m_q, sem="relaxed")
