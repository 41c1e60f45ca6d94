"""The running best of every query, as one 64-bit number that an atomic maximum can merge.

The upper half orders as the score does, the lower half falls with the key's index: the maximum is
the highest score and, among equal scores, the lowest index, in whatever order programs finish.

A score of NaN is that of a key that may not be matched: a maximum passes over it, on GPUs as in
Triton's language, and no comparison is true of it.
"""

import triton
import triton.language as tl

NO_KEY = tl.constexpr(2**31 - 1)
EMPTY = tl.constexpr(-0x7F800001 << 32)  # no key, with a score of -inf


@triton.jit
def encode(
    score,  # [...] float32
    index,  # [...] int32, not negative
):  # [...] int64
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ NO_KEY).to(tl.int64)


@triton.jit
def decode(argmax):  # [...] int64 -> [...] float32, [...] int32
    ordered = (argmax >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), argmax.to(tl.int32) ^ NO_KEY


@triton.jit
def first_of_row_maximum(
    b_s,  # [BLOCK_Q, BLOCK_K] scores
    b_m,  # [BLOCK_Q] their maximum over keys
    o_k,  # [BLOCK_K] columns or indices of the keys
):  # [BLOCK_Q] the lowest of those that have it
    return tl.min(tl.where(b_s == b_m[:, None], o_k[None, :], NO_KEY), axis=1)


@triton.jit
def merge(
    p_argmax,  # [BLOCK_Q] pointers to int64
    b_s,  # [BLOCK_Q, BLOCK_K] scores
    o_k,  # [BLOCK_K] columns of the keys, within a line of bands
    key,  # index of the key in column 0
    PIECE,  # columns of a band
    BAND,  # keys from one band to the next
    m_q,  # [BLOCK_Q]
    LAZY: tl.constexpr,  # whether to look for the index only where there is a better score
):
    """Raise the best of these queries to the best of these keys, where that is better."""
    b_m = tl.max(b_s, axis=1)
    # From the L2 cache, where the atomics are. It may be outdated, and then too low: they decide.
    known, _ = decode(tl.load(p_argmax, mask=m_q, other=EMPTY, cache_modifier=".cg"))
    m_q = m_q & (b_m >= known)
    improved = True
    if LAZY:
        improved = tl.max(m_q.to(tl.int32), axis=0) > 0
    if improved:
        column = first_of_row_maximum(b_s, b_m, o_k)
        index = key + column // PIECE * BAND + column % PIECE
        tl.atomic_max(p_argmax, encode(b_m, index), mask=m_q, sem="relaxed")
