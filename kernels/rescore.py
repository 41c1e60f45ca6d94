"""Score and index of every query from its argmax."""

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import NO_KEY, Argmax, decode
from ttsr_fast.kernels.key_scale import (
    Score,
    box_sum,
    denominator,
    image_stride,
    mask_stride,
    scaled_eps,
)
from ttsr_fast.kernels.layout import first_pixel, size_names
from ttsr_fast.kernels.pack import AMAX_BLOCKS, Packed, power_of_two_scale

BLOCK_Q, BLOCK_C = 16, 32


def rescore(
    query: Packed,
    key: Packed,
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    argmax: Argmax,
    match: tuple[Tensor, Tensor],  # score and index, [N, Ho, Wo], filled
    scoring: Score,
) -> None:
    """Decode the argmax, score its pair from all stored parts, and divide by the query's norm.

    So the score belongs to the features as given, in every precision. It is NaN:

    - for a non-finite query patch, with the first allowed key as index;
    - for the whole image if an allowed key patch is not finite, with the index of that patch;
    - for the whole image if no key is allowed.
    """
    precision = query.precision
    blocks = triton.cdiv(match[0][0].numel(), BLOCK_Q)
    rescore_kernel[(query.images * blocks,)](
        query.rows,
        query.squared_norm,
        query.amax,
        key.rows,
        key.amax,
        key_mask,
        *argmax,
        *match,
        blocks,
        image_stride(key.images, 1),
        mask_stride(key_mask),
        image_stride(len(argmax.first_nonfinite_key), 1),
        query.layout.pixels,
        *query.layout.sizes,
        key.layout.pixels,
        *key.layout.sizes,
        scoring.eps,
        C=query.channels,
        SECTIONS=len(precision.query_sections),
        PARTS=precision.parts,
        SCALED=precision.scaled,
        RESCORE=not precision.exact,
        NORMALIZE_QUERY=scoring.normalize == "both",
        NORMALIZE_KEY=scoring.normalize != "none",
        ADD_EPS=scoring.add_eps,
        KERNEL=query.layout.halo + 1,
        MASKED=key_mask is not None,
        BLOCK_Q=BLOCK_Q,
        BLOCK_C=BLOCK_C,
    )


@triton.jit
def _load_parts(p_x, m_x, C: tl.constexpr, PARTS: tl.constexpr):
    """Sum of all parts: the features, scaled."""
    b_x = tl.load(p_x, mask=m_x[:, None], other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        b_x += tl.load(p_x + part * C, mask=m_x[:, None], other=0.0).to(tl.float32)
    return b_x


@triton.jit
def _first_allowed(p_mask, KEYS, BLOCK: tl.constexpr):
    """First True of a mask of KEYS elements; 0 if there is none."""
    first = KEYS
    for start in range(0, KEYS, BLOCK):
        o_k = start + tl.arange(0, BLOCK)
        allowed = tl.load(p_mask + o_k, mask=o_k < KEYS, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(allowed, o_k, KEYS), axis=0))
    return tl.where(first < KEYS, first, 0)


@triton.jit(
    do_not_specialize=[
        *("BLOCKS", "stride_key", "stride_mask", "stride_nonfinite"),
        *("PIXELS", *size_names(), "PIXELS_K", *size_names("_K")),
    ]
)
def rescore_kernel(
    p_query,  # [N*PIXELS + slack, SECTIONS*C]
    p_query_squared_norm,  # [N*PIXELS + slack]
    p_query_amax,  # [N, AMAX_BLOCKS]
    p_key,  # [N*PIXELS_K + slack, SECTIONS*C]
    p_key_amax,  # [N or 1, AMAX_BLOCKS]
    p_mask,  # [N or 1, HEIGHT_K, WIDTH_K]
    p_argmax,  # [N, HEIGHT, WIDTH]
    p_first_nonfinite,  # [N or 1]
    p_score,  # [N, HEIGHT, WIDTH], written
    p_index,  # [N, HEIGHT, WIDTH], written
    BLOCKS,
    stride_key,  # of images, 0 or 1
    stride_mask,
    stride_nonfinite,
    PIXELS,
    HEIGHT,
    WIDTH,
    BAND_HEIGHT,
    STRIP_WIDTH,
    PIECE,
    LINE,
    LINES,
    PIXELS_K,
    HEIGHT_K,
    WIDTH_K,
    BAND_HEIGHT_K,
    STRIP_WIDTH_K,
    PIECE_K,
    LINE_K,
    LINES_K,
    eps: tl.float32,
    C: tl.constexpr,
    SECTIONS: tl.constexpr,
    PARTS: tl.constexpr,
    SCALED: tl.constexpr,
    RESCORE: tl.constexpr,
    NORMALIZE_QUERY: tl.constexpr,
    NORMALIZE_KEY: tl.constexpr,
    ADD_EPS: tl.constexpr,
    KERNEL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROW: tl.constexpr = SECTIONS * C
    i_n, i_b = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    o_q = i_b * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_q = o_q < HEIGHT * WIDTH
    o_out = i_n * (HEIGHT * WIDTH) + o_q
    b_score, b_index = decode(tl.load(p_argmax + o_out, mask=m_q, other=0))
    no_key = b_score == float("-inf")
    b_index = tl.where(no_key | ~m_q, 0, b_index)
    # [BLOCK_Q] first pixels
    o_first = i_n * PIXELS + first_pixel(o_q, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES)
    squared = box_sum(p_query_squared_norm + o_first, m_q, LINE, KERNEL)
    nonfinite_query = m_q & ~(squared < float("inf"))

    if RESCORE:
        i_k = i_n * stride_key
        o_key = i_k * PIXELS_K + first_pixel(
            b_index, WIDTH_K, BAND_HEIGHT_K, STRIP_WIDTH_K, PIECE_K, LINE_K, LINES_K
        )
        o_c = tl.arange(0, BLOCK_C)
        # [BLOCK_Q, BLOCK_C]
        p_q = p_query + (o_first * ROW)[:, None] + o_c[None, :]
        p_k = p_key + (o_key * ROW)[:, None] + o_c[None, :]
        b_product = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        b_square_q = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        b_square_k = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        for tap in range(KERNEL * KERNEL):
            dy, dx = tap // KERNEL, tap % KERNEL
            for c in range(0, C, BLOCK_C):
                b_q = _load_parts(p_q + ((dy * LINE + dx) * ROW + c), m_q, C, PARTS)
                b_k = _load_parts(p_k + ((dy * LINE_K + dx) * ROW + c), m_q, C, PARTS)
                b_product += b_q * b_k
                b_square_q += b_q * b_q
                b_square_k += b_k * b_k
        b_score = tl.sum(b_product, axis=1)
        squared = tl.sum(b_square_q, axis=1)
        p_amax_k = p_key_amax + i_k * AMAX_BLOCKS
        if NORMALIZE_KEY:
            least = scaled_eps(eps, p_amax_k, SCALED)
            norm_k = tl.sqrt(tl.sum(b_square_k, axis=1))
            b_score = b_score / denominator(norm_k, least, ADD_EPS)
        elif SCALED:
            b_score = b_score / power_of_two_scale(p_amax_k)
    p_amax_q = p_query_amax + i_n * AMAX_BLOCKS
    if NORMALIZE_QUERY:
        least = scaled_eps(eps, p_amax_q, SCALED)
        b_score = b_score / denominator(tl.sqrt(squared), least, ADD_EPS)
    elif SCALED:
        b_score = b_score / power_of_two_scale(p_amax_q)

    nonfinite_key = tl.load(p_first_nonfinite + i_n * stride_nonfinite)  # NO_KEY if there is none
    b_index = tl.where(nonfinite_key < NO_KEY, nonfinite_key, b_index)
    if MASKED:
        if tl.max(nonfinite_query.to(tl.int32), axis=0) > 0:
            first = _first_allowed(p_mask + i_n * stride_mask, HEIGHT_K * WIDTH_K, BLOCK=1024)
            b_index = tl.where(nonfinite_query, first, b_index)
    else:
        b_index = tl.where(nonfinite_query, 0, b_index)
    b_score = tl.where(nonfinite_query | no_key | (nonfinite_key < NO_KEY), float("nan"), b_score)
    tl.store(p_score + o_out, b_score, mask=m_q)
    tl.store(p_index + o_out, b_index.to(tl.int64), mask=m_q)
