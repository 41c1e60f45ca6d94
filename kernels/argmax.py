"""Running argmax of every query: one 64-bit word, merged by an atomic maximum.

The upper half is the score, as an integer of the same order. The lower half falls as the index of
the key rises. The maximum is the highest score and, among equal scores, the lowest index, in any
order of programs.

Keys that must not match get score NaN: `tl.max` skips NaN, and every comparison with NaN is false.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

NO_KEY = tl.constexpr(2**31 - 1)
EMPTY = tl.constexpr(-0x7F800001 << 32)  # score -inf, index NO_KEY


class Argmax(NamedTuple):
    """Running result of a search.

    Attributes:
        words: `[N, Ho, Wo]` int64, from `encode`.
        first_nonfinite_key: `[N or 1]` int32, lowest index of an allowed key patch with a
            non-finite feature; NO_KEY if there is none.
    """

    words: Tensor
    first_nonfinite_key: Tensor


@triton.jit
def encode(
    score,  # [...] float32
    index,  # [...] int32, not negative
):  # [...] int64
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (index ^ NO_KEY).to(tl.int64)


@triton.jit
def decode(word):  # [...] int64 -> [...] float32, [...] int32
    ordered = (word >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), word.to(tl.int32) ^ NO_KEY


@triton.jit
def first_argmax(
    b_s,  # [BLOCK_Q, BLOCK_K] scores
    b_m,  # [BLOCK_Q] maxima over keys
    o_k,  # [BLOCK_K] columns or indices of the keys
):  # [BLOCK_Q] the lowest with the maximum
    return tl.min(tl.where(b_s == b_m[:, None], o_k[None, :], NO_KEY), axis=1)


@triton.jit
def merge(
    p_argmax,  # [BLOCK_Q] pointers to int64
    b_s,  # [BLOCK_Q, BLOCK_K] scores
    o_k,  # [BLOCK_K] columns of the keys in a line of bands
    key,  # index of the key in column 0
    PIECE,  # columns of a band
    BAND,  # keys from one band to the next
    m_q,  # [BLOCK_Q]
    LAZY: tl.constexpr,  # skips the index where no score improves
):
    """Merge a tile of scores into the words of its queries."""
    b_m = tl.max(b_s, axis=1)
    # From the L2 cache, where the atomics are. An outdated value is too low: the atomics decide.
    known, _ = decode(tl.load(p_argmax, mask=m_q, other=EMPTY, cache_modifier=".cg"))
    m_q = m_q & (b_m >= known)
    improved = True
    if LAZY:
        improved = tl.max(m_q.to(tl.int32), axis=0) > 0
    if improved:
        column = first_argmax(b_s, b_m, o_k)
        index = key + column // PIECE * BAND + column % PIECE
        tl.atomic_max(p_argmax, encode(b_m, index), mask=m_q, sem="relaxed")
