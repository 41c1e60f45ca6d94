"""Scale of every key patch, from the squared norms of pixels.

A score is `total * scale`: `total` is the inner product of two patches, and `scale` is one over the
norm of the key patch. The scale is NaN for a key that must not match (`argmax.py`): an excluded
key, or a non-finite key patch. The lowest index of an allowed non-finite key patch goes to
`first_nonfinite_key`, and `rescore.py` turns all scores of the image into NaN.
"""

from typing import Protocol

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import Argmax
from ttsr_fast.kernels.layout import column_of, size_names
from ttsr_fast.kernels.pack import AMAX_BLOCKS, Packed, power_of_two_scale

BLOCK = 128


class Score(Protocol):
    """Normalisation of scores.

    A patch is divided by `max(norm, eps)`, or by `norm + eps` with `add_eps`.
    """

    @property
    def normalize(self) -> str: ...  # "both", "key" or "none"
    @property
    def eps(self) -> float: ...
    @property
    def add_eps(self) -> bool: ...


def key_scale(
    key: Packed,
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    scale: Tensor,  # [N or 1, strips, band height, slots], filled
    argmax: Argmax,  # first_nonfinite_key is merged into
    scoring: Score,
) -> None:
    """Scale of every key patch, for algorithms that read it more than once.

    A row of `scale` has a slot for every pixel of a line, and NaN up to whole tiles, so loads need
    no mask.
    """
    layout, slots = key.layout, scale.shape[3]
    blocks = triton.cdiv(scale[0].numel(), BLOCK)
    key_scale_kernel[(len(scale) * blocks,)](
        key.squared_norm,
        key.amax,
        key_mask,
        scale,
        argmax.first_nonfinite_key,
        image_stride(key.images, layout.pixels),
        image_stride(key.images, AMAX_BLOCKS.value),
        mask_stride(key_mask),
        *layout.sizes,
        layout.strips,
        slots,
        blocks,
        scoring.eps,
        KERNEL=layout.halo + 1,
        NORMALIZE=scoring.normalize != "none",
        ADD_EPS=scoring.add_eps,
        MASKED=key_mask is not None,
        SCALED=key.precision.scaled,
        BLOCK=BLOCK,
    )


def allocate_scale(
    key: Packed, images: int, tile: int
) -> Tensor:  # [images, strips, band height, slots]
    """Memory for the scales, with slots for whole tiles of `tile` keys."""
    layout = key.layout
    slots = triton.cdiv(layout.line, tile) * tile
    return key.squared_norm.new_empty(images, layout.strips, layout.band_height, slots)


def image_stride(images: int, stride: int) -> int:
    """Stride of the axis of images; 0 if one image is broadcast."""
    return stride if images > 1 else 0


def mask_stride(key_mask: Tensor | None) -> int:
    """Stride of the images of a contiguous mask."""
    return 0 if key_mask is None else image_stride(key_mask.shape[0], key_mask[0].numel())


@triton.jit
def box_sum(
    p_first,  # [BLOCK] pointers to the squared norm of a patch's first pixel
    m_p,  # [BLOCK]
    LINE,
    KERNEL: tl.constexpr,
):  # [BLOCK] squared norm of every patch
    # One tile, and its sums move to the warps that need them: every warp would load nine vectors.
    TAPS: tl.constexpr = 1 if KERNEL == 1 else 16 if KERNEL == 3 else 32 if KERNEL == 5 else 64
    tap = tl.arange(0, TAPS)
    o_tap = tap // KERNEL * LINE + tap % KERNEL
    mask = m_p[:, None] & (tap < KERNEL * KERNEL)[None, :]
    return tl.sum(tl.load(p_first[:, None] + o_tap[None, :], mask=mask, other=0.0), axis=1)


@triton.jit
def scaled_eps(eps, p_amax, SCALED: tl.constexpr):
    """`eps` in units of the packed map; never 0 if the map is scaled."""
    if SCALED:
        eps = tl.maximum(eps * power_of_two_scale(p_amax), 1e-30)
    return eps


@triton.jit
def denominator(norm, eps, ADD_EPS: tl.constexpr):
    """Divisor of a patch."""
    return norm + eps if ADD_EPS else tl.maximum(norm, eps)


@triton.jit
def patch_scale(
    p_first,  # [BLOCK] as in box_sum
    p_mask,  # [BLOCK] pointers into the mask, if MASKED
    p_first_nonfinite,  # of the image, merged into
    o_i,  # [BLOCK] indices of the keys
    m_k,  # [BLOCK] False where there is no key
    LINE,
    eps,
    KERNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    MASKED: tl.constexpr,
):  # [BLOCK]
    """Scale of every key patch; NaN where it must not match."""
    squared = box_sum(p_first, m_k, LINE, KERNEL)
    finite = squared < float("inf")  # NaN compares false
    if MASKED:
        m_k = m_k & (tl.load(p_mask, mask=m_k, other=0) != 0)
    tl.atomic_min(p_first_nonfinite + o_i * 0, o_i, mask=m_k & ~finite, sem="relaxed")
    scale = tl.full(squared.shape, 1.0, tl.float32)
    if NORMALIZE:
        scale = 1.0 / denominator(tl.sqrt(tl.where(finite, squared, 1.0)), eps, ADD_EPS)
    return tl.where(m_k & finite, scale, float("nan"))


@triton.jit(
    do_not_specialize=[
        *("stride_norm", "stride_amax", "stride_mask"),
        *(*size_names(), "STRIPS", "SLOTS", "BLOCKS"),
    ]
)
def key_scale_kernel(
    p_squared_norm,  # [N or 1, STRIPS, LINES, LINE]
    p_amax,  # [N or 1, AMAX_BLOCKS]
    p_mask,  # [N or 1, HEIGHT, WIDTH]
    p_scale,  # [N or 1, STRIPS, BAND_HEIGHT, SLOTS], written
    p_first_nonfinite,  # [N or 1]
    stride_norm,
    stride_amax,
    stride_mask,
    HEIGHT,
    WIDTH,
    BAND_HEIGHT,
    STRIP_WIDTH,
    PIECE,
    LINE,
    LINES,
    STRIPS,
    SLOTS,
    BLOCKS,
    eps: tl.float32,
    KERNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n, i_b = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    o_s = i_b * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < STRIPS * BAND_HEIGHT * SLOTS
    strip, y, o_c = o_s // (BAND_HEIGHT * SLOTS), o_s // SLOTS % BAND_HEIGHT, o_s % SLOTS
    o_i = column_of(o_c, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, strip) + y * WIDTH
    m_k = m_s & (o_i < HEIGHT * WIDTH)
    eps = scaled_eps(eps, p_amax + i_n * stride_amax, SCALED)
    p_first = p_squared_norm + i_n * stride_norm + ((strip * LINES + y) * LINE + o_c)
    p_allowed = o_i
    if MASKED:
        p_allowed = p_mask + i_n * stride_mask + o_i
    p_nonfinite = p_first_nonfinite + i_n
    scale = patch_scale(
        p_first, p_allowed, p_nonfinite, o_i, m_k, LINE, eps, KERNEL, NORMALIZE, ADD_EPS, MASKED
    )
    tl.store(p_scale + i_n * (STRIPS * BAND_HEIGHT * SLOTS) + o_s, scale, mask=m_s)


@triton.jit
def load_scale(
    p_scale,  # [BLOCK] pointers
):  # [BLOCK]
    """Scales from `key_scale`, loaded as a tile for the reason given in `box_sum`."""
    return tl.sum(tl.load(p_scale[:, None]), axis=1)
