"""Norms of patches, from the squared norms of pixels, and the scale they give a key.

A score is `total * scale`: `total` is the inner product of two patches and `scale` one over the
norm of the key patch, or NaN for a key that must not match (`argmax.py`). A non-finite key patch
never matches. The lowest index of an allowed one goes to `first_nonfinite_key`, and `rescore.py`
turns all scores of the image into NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.layout import column_of, size_names
from ttsr_fast.kernels.pack import AMAX_BLOCKS, Packed, power_of_two_scale

BLOCK = 128


def key_scale(
    key: Packed,
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    scale: Tensor,  # [N or 1, strips, band height, slots], filled
    first_nonfinite_key: Tensor,  # [N or 1], merged into
    kernel_size: int,
    normalize: bool,
    eps: float,
    add_eps: bool,
    scaled: bool,
) -> None:
    """The scale of every key patch, for the algorithms that read it more than once.

    A row of `scale` has a slot for every pixel of a line and is filled up with NaN to whole tiles,
    so that nobody who reads it needs a mask.
    """
    layout, slots = key.layout, scale.shape[3]
    blocks = triton.cdiv(scale[0].numel(), BLOCK)
    key_scale_kernel[(len(scale) * blocks,)](
        key.square,
        key.amax,
        key_mask,
        scale,
        first_nonfinite_key,
        image_stride(key.images, layout.pixels),
        image_stride(key.images, AMAX_BLOCKS),
        mask_stride(key_mask),
        *layout.sizes,
        layout.strips,
        slots,
        blocks,
        eps,
        KERNEL=kernel_size,
        NORMALIZE=normalize,
        ADD_EPS=add_eps,
        MASKED=key_mask is not None,
        SCALED=scaled,
        AMAX_BLOCKS=AMAX_BLOCKS,
        BLOCK=BLOCK,
    )


def allocate_scale(
    key: Packed, images: int, tile: int
) -> Tensor:  # [images, strips, band height, slots]
    """Memory for the scales, with slots for whole tiles of keys."""
    layout = key.layout
    slots = triton.cdiv(layout.line, tile) * tile
    return key.square.new_empty(images, layout.strips, layout.band_height, slots)


def image_stride(images: int, stride: int) -> int:
    """The stride of an axis of images, 0 if one serves all."""
    return stride if images > 1 else 0


def mask_stride(key_mask: Tensor | None) -> int:
    """The stride of the images of a contiguous mask."""
    return 0 if key_mask is None else image_stride(key_mask.shape[0], key_mask[0].numel())


@triton.jit
def box_sum(
    p_first,  # [BLOCK] pointers to the squared norm of the first pixel of every patch
    m_p,  # [BLOCK]
    LINE,
    KERNEL: tl.constexpr,
):  # [BLOCK] squared norm of every patch
    # As one tile, whose sums then move to where they are needed: nine vectors would be loaded again
    # by every warp that needs them.
    TAPS: tl.constexpr = 1 if KERNEL == 1 else 16 if KERNEL == 3 else 32 if KERNEL == 5 else 64
    tap = tl.arange(0, TAPS)
    o_tap = tap // KERNEL * LINE + tap % KERNEL
    mask = m_p[:, None] & (tap < KERNEL * KERNEL)[None, :]
    return tl.sum(tl.load(p_first[:, None] + o_tap[None, :], mask=mask, other=0.0), axis=1)


@triton.jit
def scaled_eps(eps, p_amax, SCALED: tl.constexpr, AMAX_BLOCKS: tl.constexpr):
    """What bounds or is added to a norm, in units of the packed map; never 0."""
    if SCALED:
        eps = tl.maximum(eps * power_of_two_scale(p_amax, AMAX_BLOCKS), 1e-30)
    return eps


@triton.jit
def denominator(norm, eps, ADD_EPS: tl.constexpr):
    """What a patch of that norm is divided by."""
    return norm + eps if ADD_EPS else tl.maximum(norm, eps)


@triton.jit
def patch_scale(
    p_first,  # [BLOCK] as in box_sum
    p_mask,  # [BLOCK] pointers into the mask, unless MASKED is False
    p_first_nonfinite,
    o_i,  # [BLOCK] indices of the keys
    m_k,  # [BLOCK] False for what is no key
    LINE,
    eps,
    KERNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ADD_EPS: tl.constexpr,
    MASKED: tl.constexpr,
):  # [BLOCK]
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
        *("stride_square", "stride_amax", "stride_mask"),
        *(*size_names(), "STRIPS", "SLOTS", "BLOCKS"),
    ]
)
def key_scale_kernel(
    p_square,  # [N or 1, STRIPS, LINES, LINE]
    p_amax,  # [N or 1, AMAX_BLOCKS]
    p_mask,  # [N or 1, HEIGHT, WIDTH]
    p_scale,  # [N or 1, STRIPS, BAND_HEIGHT, SLOTS], written
    p_first_nonfinite,  # [N or 1]
    stride_square,
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
    AMAX_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_n, i_b = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS
    o_s = i_b * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < STRIPS * BAND_HEIGHT * SLOTS
    strip, y, o_c = o_s // (BAND_HEIGHT * SLOTS), o_s // SLOTS % BAND_HEIGHT, o_s % SLOTS
    o_i = column_of(o_c, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, strip) + y * WIDTH
    m_k = m_s & (o_i < HEIGHT * WIDTH)
    eps = scaled_eps(eps, p_amax + i_n * stride_amax, SCALED, AMAX_BLOCKS)
    p_first = p_square + i_n * stride_square + ((strip * LINES + y) * LINE + o_c)
    p_allowed = o_i
    if MASKED:
        p_allowed = p_mask + i_n * stride_mask + o_i
    scale = patch_scale(
        p_first,
        p_allowed,
        p_first_nonfinite + i_n,
        o_i,
        m_k,
        LINE,
        eps,
        KERNEL,
        NORMALIZE,
        ADD_EPS,
        MASKED,
    )
    tl.store(p_scale + i_n * (STRIPS * BAND_HEIGHT * SLOTS) + o_s, scale, mask=m_s)


@triton.jit
def load_scale(
    p_scale,  # [BLOCK] pointers
):  # [BLOCK]
    """What `key_scale` stored; as a tile, for the reason given in `box_sum`."""
    return tl.sum(tl.load(p_scale[:, None]), axis=1)
