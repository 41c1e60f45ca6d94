"""Images in files, in memory and as tensors."""

from ttsr_fast.images.decode import size_of
from ttsr_fast.images.formats import SUFFIXES
from ttsr_fast.images.image import (
    LUMA,
    SCALE,
    Image,
    as_image,
    check_output,
    downscale,
    from_tensor,
    read_image,
    resize,
    resize_tensor,
    to_grey,
    to_tensor,
    upscale_bicubic,
    why_not_in,
)

__all__ = [
    "LUMA",
    "SCALE",
    "SUFFIXES",
    "Image",
    "as_image",
    "check_output",
    "downscale",
    "from_tensor",
    "read_image",
    "resize",
    "resize_tensor",
    "size_of",
    "to_grey",
    "to_tensor",
    "upscale_bicubic",
    "why_not_in",
]
