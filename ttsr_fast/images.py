"""Pictures as arrays: reading, writing, bicubic resizing, conversion to tensors.

A picture keeps what it was read with: grey stays grey, 16 bits stay 16 bits, transparency and the
colour profile are carried along. Resizing is Pillow's antialiased bicubic, with which TTSR was
trained and is measured; no other bicubic gives the same numbers. Of 16-bit colour Pillow keeps 8
bits, so imagecodecs and tifffile read and write it. All three are imported when needed.
"""

import io
import os
import struct
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's conversion to grey
SCALE = 4
_BITS, _ORIENTATION, _PLANES, _EXTRA = 258, 274, 284, 338  # tags of TIFF and EXIF
# What the libraries raise at a damaged file.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)


class _Format(NamedTuple):
    name: str  # Pillow's
    alpha: bool
    deep: tuple[int, ...]  # numbers of channels, alpha included, that it holds with 16 bits
    options: dict[str, Any]


_JPEG = _Format("JPEG", False, (), {"quality": 95, "subsampling": 0})
_TIFF = _Format("TIFF", True, (1,), {"compression": "tiff_adobe_deflate"})
_FORMATS = {
    ".png": _Format("PNG", True, (1, 2, 3, 4), {}),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WEBP", True, (), {"lossless": True, "exact": True}),
    ".bmp": _Format("BMP", False, (), {}),
}
SUFFIXES = tuple(_FORMATS)


@dataclass(frozen=True)
class Image:
    """A picture in memory.

    Attributes:
        pixels: `[H, W, 1]` (grey) or `[H, W, 3]` (RGB), uint8 or uint16.
        alpha: `[H, W]`, dtype of `pixels`, or None for an opaque picture.
        icc_profile: the colour profile that the file came with.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc_profile: bytes | None = None

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
        """Write a file in the format of its suffix; it appears whole or not at all.

        JPEG is written with quality 95, WebP lossless; 16-bit colour goes into PNG only.

        Raises:
            ValueError: an unknown suffix, or a format that cannot hold this picture.
            OSError: the folder is missing or cannot be written to.
        """
        path = Path(path)
        check_output(path, self)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(unfinished, "wb") as file:
                file.write(_encode(self, path))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def read_image(path: str | os.PathLike[str]) -> Image:
    """Read a picture, turned upright if its EXIF orientation says so.

    Palettes become RGB and black-and-white becomes grey. All 16 bits of grey and colour are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, is damaged or cut short, too large, has several frames, or has
            another colour mode than grey, palette and RGB. The message names the file.
        ImportError: it has 16-bit colour, and imagecodecs or tifffile is not installed.
    """
    pillow, path = _pillow(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pillow.Image.DecompressionBombWarning)
            array, icc_profile = _decode(path)
    except pillow.Image.DecompressionBombError:
        raise ValueError(
            f"cannot read {path}: it has more than {2 * pillow.Image.MAX_IMAGE_PIXELS} pixels, "
            "Pillow's limit; crop it, or in Python raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from None
    except pillow.UnidentifiedImageError:
        raise ValueError(f"cannot read {path}: it is no picture, or damaged") from None
    except _DAMAGED as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    return _split(array, icc_profile)


def as_image(source: Any, name: str = "image") -> Image:
    """A picture from whatever holds one.

    Args:
        source: an `Image`; a path; a Pillow image; an array `[H, W]` or `[H, W, 1 to 4]` of uint8
            or uint16 (grey, grey + alpha, RGB, RGBA); or a floating-point tensor `[3 or 1, H, W]`,
            with or without a batch axis of 1, in [-1, 1], which is rounded to 16 bits.
        name: what errors call it.

    Raises:
        TypeError: another type or dtype.
        ValueError: a shape without pixels or of other channels, a NaN; and as `read_image`.
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
    if isinstance(source, _pillow().Image.Image):
        try:
            return _split(_to_array(source), source.info.get("icc_profile"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    raise TypeError(
        f"{name} must be a path, a Pillow image, an array or a tensor, got {type(source).__name__}"
    )


def check_output(path: str | os.PathLike[str], image: Image) -> None:
    """Raise what `image.save(path)` would raise, before the work is done.

    `image` may be of another size: only its channels and its depth matter.

    Raises:
        ValueError: an unknown suffix, or a format that cannot hold such a picture.
        OSError: the folder is missing or cannot be written to, or `path` is a folder.
        ImportError: 16-bit colour, and imagecodecs or tifffile is not installed.
    """
    path = Path(path)
    reason = why_not_in(path.suffix, image)
    if reason is not None:
        raise ValueError(f"cannot write {path}: {reason}")
    if image.pixels.dtype == np.uint16 and image.to_array().ndim == 3:
        _codecs()
    check_place(path)


def check_place(path: Path) -> None:
    """Raise OSError if no file can be written there, of whatever kind."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise PermissionError(
            f"cannot write {path}: no file can be made in {path.parent} ({error.strerror})"
        ) from error


def why_not_in(suffix: str, image: Image) -> str | None:
    """Why files of this suffix cannot hold `image`, None if they can."""
    form = _FORMATS.get(suffix.lower())
    if form is None:
        return f"the suffix must be one of {' '.join(SUFFIXES)}"
    if image.alpha is not None and not form.alpha:
        return f"{form.name} holds no transparency; use .png"
    channels = image.pixels.shape[2] + (image.alpha is not None)
    if image.pixels.dtype == np.uint16 and channels not in form.deep:
        kind = ("grey", "grey with alpha", "RGB", "RGBA")[channels - 1]
        return f"{form.name} is not written in 16-bit {kind}; use .png"
    return None


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic, antialiased when it reduces.

    Args:
        pixels: `[H, W]` or `[H, W, C]`. uint8 takes Pillow's own 8-bit path; uint16 is resized as
            float32 per channel, rounded and clipped; float32 per channel and not clipped.
        size: height and width.

    Returns:
        The same dtype and channels at the new size.
    """
    pillow = _pillow()
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
    """`[H, W, C]` enlarged four times."""
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
    if planes.isnan().any():
        raise ValueError(f"{name} {list(x.shape)} holds NaN")
    like = np.empty((0, 0, planes.shape[0]), np.uint16)
    return Image(from_tensor(planes[None].expand(1, 3, -1, -1), like))


def _split(array: np.ndarray, icc_profile: bytes | None = None) -> Image:
    """`[H, W, 1 to 4]` into colour and alpha."""
    colours = 1 if array.shape[2] < 3 else 3
    alpha = array[..., colours] if array.shape[2] > colours else None
    return Image(array[..., :colours], alpha, icc_profile)


def _decode(path: Path) -> tuple[np.ndarray, bytes | None]:
    """Pixels `[H, W, 1 to 4]` and colour profile of a file."""
    with _pillow().Image.open(path) as opened:
        if getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO":
            raise ValueError(f"it holds {opened.n_frames} frames, one is expected")
        icc_profile = opened.info.get("icc_profile")
        tags = opened.tag_v2 if opened.format == "TIFF" else {}
        bits = path.read_bytes()[24] if opened.format == "PNG" else np.max(tags.get(_BITS, 8))
        mixed = opened.mode in ("LA", "RGB", "RGBA") or "transparency" in opened.info
        if bits <= 8 or not mixed:  # Pillow keeps every bit
            return _to_array(opened), icc_profile
        orientation = opened.getexif().get(_ORIENTATION)
        opened.load()  # finds what is damaged or cut short
        array = _decode_16_bits(opened, path)
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(array[::rows, ::columns]), icc_profile


def _decode_16_bits(opened: Any, path: Path) -> np.ndarray:
    """`[H, W, 2 to 4]` of a PNG or TIFF as it is stored; Pillow would keep 8 bits of a sample."""
    imagecodecs, tifffile = _codecs()
    if opened.format == "PNG":
        return imagecodecs.png_decode(path.read_bytes())
    if 1 in opened.tag_v2.get(_EXTRA, ()):
        raise ValueError("16-bit colour multiplied by its alpha is not supported")
    array = tifffile.imread(path, key=0)
    if opened.tag_v2.get(_PLANES) == 2:
        array = np.moveaxis(array, 0, 2)
    return array[..., : len(opened.mode)]  # without samples that are neither colour nor alpha


def _to_array(image: Any) -> np.ndarray:
    """`[H, W, 1 to 4]` of a Pillow image of any mode that is supported."""
    image = _pillow().ImageOps.exif_transpose(image)
    if 0 in image.size:
        raise ValueError(f"it has no pixels ({image.width}x{image.height})")
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("L", "RGB") and image.has_transparency_data:
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "I;16", "I;16L", "I;16B", "I;16N"):
        raise ValueError(f"mode {image.mode} is not supported; convert it to grey or RGB")
    array = np.asarray(image)
    array = array.astype(array.dtype.newbyteorder("="))
    return array[..., None] if array.ndim == 2 else array


def _encode(image: Image, path: Path) -> bytes:
    form, array = _FORMATS[path.suffix.lower()], image.to_array()
    buffer = io.BytesIO()
    try:
        if array.dtype == np.uint16 and array.ndim == 3:
            return _encode_png16(array, image.icc_profile)
        picture = _pillow().Image.fromarray(array)
        picture.save(buffer, form.name, icc_profile=image.icc_profile, **form.options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    return buffer.getvalue()


def _encode_png16(array: np.ndarray, icc_profile: bytes | None) -> bytes:
    """PNG of `[H, W, 2 to 4]` uint16, which Pillow does not write."""
    imagecodecs, _ = _codecs()
    png = imagecodecs.png_encode(np.ascontiguousarray(array), filter=imagecodecs.PNG.FILTER.UP)
    if icc_profile is None:
        return png
    chunk = b"iCCPicc\0\0" + zlib.compress(icc_profile)
    size, checksum = struct.pack(">I", len(chunk) - 4), struct.pack(">I", zlib.crc32(chunk))
    return png[:33] + size + chunk + checksum + png[33:]  # behind the header


def _pillow() -> Any:
    """The package PIL, imported when it is first needed: the rest of ttsr_fast works without it."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'ttsr-fast[cli]'") from error
    return PIL


def _codecs() -> tuple[Any, Any]:
    """The packages imagecodecs and tifffile, which only 16-bit colour needs."""
    try:
        import imagecodecs
        import tifffile
    except ImportError as error:
        raise ImportError(
            "16-bit colour needs imagecodecs and tifffile: pip install 'ttsr-fast[cli]'"
        ) from error
    return imagecodecs, tifffile
