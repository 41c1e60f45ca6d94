"""Images as arrays: reading, writing, bicubic resizing, conversion to tensors.

Grey stays grey, 16 bits stay 16 bits, transparency and colour information are kept. Resizing is
Pillow's antialiased bicubic, with which TTSR is trained and measured; other bicubics differ.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttsr_fast import files
from ttsr_fast.files import shown
from ttsr_fast.images import decode, formats
from ttsr_fast.images.decode import size_of as size_of
from ttsr_fast.images.formats import SUFFIXES as SUFFIXES
from ttsr_fast.images.formats import Chunks

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to grey
SCALE = 4

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """An image in memory.

    Attributes:
        pixels: `[H, W, 1]` (grey) or `[H, W, 3]` (RGB), uint8 or uint16.
        alpha: `[H, W]`, dtype of `pixels`, or None for an opaque image.
        icc_profile: the colour profile of the file.
        colour_chunks: kind and content of the chunks gAMA, cHRM, sRGB, cICP, mDCV and cLLI of a
            PNG, which define its colours.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None
    colour_chunks: Chunks = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def to_array(self) -> np.ndarray:
        """`[H, W]` for plain grey, otherwise `[H, W, C]` with alpha as the last channel."""
        planes = self.pixels if self.alpha is None else np.dstack((self.pixels, self.alpha))
        return planes[..., 0] if planes.shape[2] == 1 else planes

    def to_tensor(self) -> Tensor:
        """`[1, 3, H, W]`, float32 RGB in [-1, 1], without alpha."""
        return to_tensor(self.pixels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file in the format of its suffix, whole or not at all.

        JPEG is written with quality 95, WebP lossless; only PNG takes 16-bit colour. BMP holds no
        colour profile, and only PNG has `colour_chunks`: a warning is logged if colours change.

        Raises:
            ValueError: an unknown suffix, or a format that cannot hold this image.
            OSError: the folder is missing or cannot be written to, or the disk is full.
        """
        path = Path(path)
        check_output(path, self)
        lost = formats.lost_colours(path.suffix, self.icc_profile, self.colour_chunks)
        if lost is not None:
            _logger.warning("%s: %s", shown(path), lost)
        try:
            content = formats.encode(
                self.to_array(), path.suffix, self.icc_profile, self.colour_chunks
            )
        except ValueError as error:
            raise ValueError(f"cannot write {shown(path)}: {error}") from error
        files.write_bytes(path, content)


def read_image(path: str | os.PathLike[str]) -> Image:
    """Read an image, upright by its EXIF orientation.

    The content determines the format: PNG, TIFF, JPEG, WebP or BMP. Palettes become RGB and
    black-and-white becomes grey. All bits of grey and colour are kept; 9 to 15 bits are stretched
    to 16.

    Raises:
        OSError: no such file (FileNotFoundError), a folder or no regular file, or one that cannot
            be opened.
        ValueError: it is no image, damaged, cut short or too large, or has several frames, a colour
            mode other than grey, palette and RGB, or signed or floating-point samples. The message
            names the file.
        ImportError: it has 16-bit colour, and imagecodecs or tifffile is not installed.
    """
    array, icc_profile, colour_chunks = decode.decode(Path(path))
    return _split(array, icc_profile, colour_chunks)


def as_image(source: Any, name: str = "image") -> Image:
    """An image from any supported source.

    Args:
        source: an `Image`; a path; a Pillow image, with its colour profile but no other colour
            information; an array `[H, W]` or `[H, W, 1 to 4]` of uint8 or uint16 (grey, grey +
            alpha, RGB, RGBA); or a floating-point tensor `[3 or 1, H, W]`, with or without a batch
            axis of 1, in [-1, 1], which is rounded to 16 bits.
        name: name in errors.

    Raises:
        TypeError: another type or dtype.
        ValueError: a shape without pixels or with other channels, NaN, infinity; and as
            `read_image`.
    """
    if isinstance(source, Image):
        return source
    if isinstance(source, (str, os.PathLike)):
        return read_image(source)
    if isinstance(source, np.ndarray):
        if source.dtype not in (np.uint8, np.uint16):
            raise TypeError(f"{name} must be an array of uint8 or uint16, got {source.dtype}")
        if source.ndim == 2:
            source = source[..., None]
        if source.ndim != 3 or not 1 <= source.shape[2] <= 4 or 0 in source.shape:
            raise ValueError(
                f"{name} must be a non-empty [H, W] or [H, W, 1 to 4], got {list(source.shape)}"
            )
        return _split(source)
    if isinstance(source, Tensor):
        return _from_tensor(source, name)
    if isinstance(source, formats.pillow().Image.Image):
        try:  # Pillow may read its file only now
            return _split(decode.to_array(source), source.info.get("icc_profile"))
        except Exception as error:  # decoders raise errors of any type
            raise ValueError(f"{name}: {formats.reason_of(error)}") from error
    raise TypeError(
        f"{name} must be a path, a Pillow image, an array or a tensor, got {type(source).__name__}"
    )


def check_output(path: str | os.PathLike[str], image: Image, scale: int = 1) -> None:
    """Raise the errors of `save` to this path, before any work.

    Args:
        path: the file to write.
        image: the image, or another one with its channels and its depth.
        scale: factor of the written image along each axis.

    Raises:
        ValueError: an unknown suffix, or a format that cannot hold such an image.
        OSError: the folder is missing or cannot be written to, or `path` is a folder.
        ImportError: 16-bit colour, and imagecodecs or tifffile is not installed.
    """
    path = Path(path)
    reason = why_not_in(path.suffix, image, scale)
    if reason is not None:
        raise ValueError(f"cannot write {shown(path)}: {reason}")
    if image.pixels.dtype == np.uint16 and image.to_array().ndim == 3:
        formats.codecs()
    files.check_writable(path)


def why_not_in(suffix: str, image: Image, scale: int = SCALE) -> str | None:
    """Reason why files of this suffix cannot hold `image`, `scale` times larger; or None."""
    channels = image.pixels.shape[2] + (image.alpha is not None)
    height, width = image.size
    size = height * scale, width * scale
    return formats.why_not(suffix, channels, image.pixels.dtype, size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic, antialiased when it reduces.

    Args:
        pixels: `[H, W]` or `[H, W, C]`. uint8 takes Pillow's own 8-bit path; uint16 is resized as
            float32 per channel, rounded and clipped; float32 per channel and not clipped.
        size: height and width.

    Returns:
        The same dtype and channels at the new size.
    """
    pillow = formats.pillow()
    bicubic, shape = pillow.Image.Resampling.BICUBIC, size[::-1]
    if pixels.ndim == 3 and (pixels.shape[2] != 3 or pixels.dtype != np.uint8):
        planes = [resize(pixels[..., c], size) for c in range(pixels.shape[2])]
        return np.stack(planes, axis=2)
    if pixels.dtype == np.uint8:
        return np.asarray(pillow.Image.fromarray(pixels).resize(shape, bicubic))
    resized = np.asarray(pillow.Image.fromarray(pixels.astype(np.float32)).resize(shape, bicubic))
    if pixels.dtype == np.uint16:
        resized = resized.round().clip(0, 65535)
    return resized.astype(pixels.dtype)


def downscale(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, C]` reduced four times: TTSR's degradation. H and W must be multiples of 4."""
    return resize(pixels, (pixels.shape[0] // SCALE, pixels.shape[1] // SCALE))


def upscale_bicubic(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, C]` upscaled four times."""
    return resize(pixels, (pixels.shape[0] * SCALE, pixels.shape[1] * SCALE))


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 or uint16 `[H, W, 1 or 3]` to float32 `[1, 3, H, W]` in [-1, 1]; grey is repeated."""
    half = np.iinfo(pixels.dtype).max / 2
    x = torch.from_numpy(pixels.astype(np.float32)[None]).permute(0, 3, 1, 2)
    return (x / half - 1).expand(1, 3, -1, -1)


def from_tensor(
    x: Tensor,  # [1, 3, H, W]
    like: np.ndarray,  # [*, *, 1 or 3]
) -> np.ndarray:  # [H, W, 1 or 3]
    """[-1, 1] to the dtype of `like`, rounded and clipped; its luma where `like` is grey."""
    planes = x[0].permute(1, 2, 0).double().cpu().numpy()
    if like.shape[2] == 1:
        planes = planes @ np.array(LUMA)[:, None]
    half = np.iinfo(like.dtype).max / 2
    return ((planes + 1) * half).round().clip(0, 2 * half).astype(like.dtype)


def resize_tensor(
    x: Tensor,  # [1, C, H, W]
    size: tuple[int, int],
) -> Tensor:  # [1, C, *size]
    """`resize` of float32 channels, without rounding or clipping; on the device of `x`."""
    planes = x[0].permute(1, 2, 0).float().cpu().numpy()
    return torch.from_numpy(resize(planes, size)[None]).permute(0, 3, 1, 2).to(x.device)


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, 1 or 3]` to its luma `[H, W, 1]`, dtype kept."""
    if pixels.shape[2] == 1:
        return pixels
    return (pixels @ np.array(LUMA)[:, None]).round().astype(pixels.dtype)


def _from_tensor(x: Tensor, name: str) -> Image:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor in [-1, 1], got {x.dtype}")
    planes = x.detach()[0] if x.dim() == 4 and x.shape[0] == 1 else x.detach()
    if planes.dim() != 3 or planes.shape[0] not in (1, 3) or planes.numel() == 0:
        raise ValueError(f"{name} must be a non-empty [3 or 1, H, W], got {list(x.shape)}")
    if not planes.isfinite().all():
        kind = "NaN" if planes.isnan().any() else "infinity"
        raise ValueError(f"{name} {list(x.shape)} holds {kind}")
    like = np.empty((0, 0, planes.shape[0]), np.uint16)
    return Image(from_tensor(planes[None].expand(1, 3, -1, -1), like))


def _split(
    array: np.ndarray,  # [H, W, 1 to 4]
    icc_profile: bytes | None = None,
    colour_chunks: Chunks = (),
) -> Image:
    colours = 1 if array.shape[2] < 3 else 3
    alpha = array[..., colours] if array.shape[2] > colours else None
    return Image(array[..., :colours], alpha, icc_profile, colour_chunks)
