"""Formats of image files: their limits, encoding, and the packages that do the work.

Pillow decodes and encodes all kinds but two: it keeps 8 bits of 16-bit colour, and lacks some kinds
of TIFF. imagecodecs and tifffile take those. All three packages are imported when needed.
"""

import ctypes
import io
import logging
import struct
import zlib
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ttsr_fast.files import shown
from ttsr_fast.optional import optional

# Chunks of PNG that define colours, beside iCCP, and their values for sRGB.
SRGB = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"sRGB": None,
    b"cICP": bytes((1, 13, 0, 1)),
    b"mDCV": None,
    b"cLLI": None,
}
Chunks = tuple[tuple[bytes, bytes], ...]


class _Format(NamedTuple):
    name: str  # Pillow's
    alpha: bool
    profile: bool
    deep: tuple[int, ...]  # numbers of channels, alpha included, that it holds with 16 bits
    side: int  # pixels along each side
    content: int  # bytes of all pixels
    options: dict[str, Any]


# libpng, which most programs use, reads no more than a million pixels along a side.
_PNG = _Format("PNG", True, True, (1, 2, 3, 4), 10**6, 2**63, {})
_JPEG = _Format("JPEG", False, True, (), 65500, 2**63, {"quality": 95, "subsampling": 0})
# Offsets of TIFF and the size of BMP have 32 bits.
_DEFLATE = {"compression": "tiff_adobe_deflate"}
_TIFF = _Format("TIFF", True, True, (1,), 2**31 - 1, 2**32 - 2**20, _DEFLATE)
_WEBP = _Format("WEBP", True, True, (), 16383, 2**63, {"lossless": True, "exact": True})
_BMP = _Format("BMP", False, False, (), 2**31 - 1, 2**32 - 2**20, {})
_FORMATS = {
    ".png": _PNG,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _WEBP,
    ".bmp": _BMP,
}
SUFFIXES = tuple(_FORMATS)
_PLUGINS = ("Bmp", "Jpeg", "Png", "Tiff", "WebP")  # of Pillow


def why_not(suffix: str, channels: int, dtype: np.dtype, size: tuple[int, int]) -> str | None:
    """Reason why files of this suffix cannot hold such an image; None if they can.

    Args:
        suffix: with its dot, in any case.
        channels: alpha included.
        dtype: uint8 or uint16.
        size: height and width.
    """
    form = _FORMATS.get(suffix.lower())
    if form is None:
        return f"the suffix must be one of {' '.join(SUFFIXES)}"
    if channels in (2, 4) and not form.alpha:
        return f"{form.name} holds no transparency; use .png"
    if dtype == np.uint16 and channels not in form.deep:
        kind = ("grey", "grey with alpha", "RGB", "RGBA")[channels - 1]
        return f"{form.name} is not written in 16-bit {kind}; use .png"
    other = "" if form is _PNG else "; use .png"
    if max(size) > form.side:
        return f"{form.name} holds {form.side} pixels along a side, not {max(size)}{other}"
    content = size[0] * size[1] * channels * dtype.itemsize
    if content > form.content:
        return f"{form.name} holds {form.content / 2**30:.3g} GiB, not {content / 2**30:.3g}{other}"
    return None


def lost_colours(suffix: str, icc_profile: bytes | None, chunks: Chunks) -> str | None:
    """Colour information that files of this suffix cannot hold and that changes the look."""
    form, kinds = _FORMATS[suffix.lower()], dict(chunks)
    if form is _PNG:
        return None
    if icc_profile and not form.profile:
        return f"{form.name} holds no colour profile, which is left out; .png keeps it"
    if icc_profile or b"sRGB" in kinds:
        kinds = {b"cICP": kinds[b"cICP"]} if b"cICP" in kinds else {}
    lost = [kind for kind, content in kinds.items() if not _as_in_srgb(kind, content)]
    if not lost:
        return None
    names = ", ".join(kind.decode() for kind in lost)
    return f"{form.name} holds no {names}, which says how colours are meant; .png keeps it"


def _as_in_srgb(kind: bytes, content: bytes) -> bool:
    """True if a chunk agrees with sRGB, up to a hundredth: programs round these numbers."""
    expected = SRGB[kind]
    if expected is None or kind == b"cICP":
        return expected in (None, content)
    form = f">{len(expected) // 4}I"
    numbers = zip(struct.unpack(form, content), struct.unpack(form, expected), strict=True)
    return all(100 * abs(found - number) <= number for found, number in numbers)


def encode(array: np.ndarray, suffix: str, icc_profile: bytes | None, chunks: Chunks) -> bytes:
    """Bytes of a file with `[H, W]` or `[H, W, 2 to 4]` of uint8 or uint16; or ValueError."""
    form, buffer = _FORMATS[suffix.lower()], io.BytesIO()
    try:
        if array.dtype == np.uint16 and array.ndim == 3:
            imagecodecs, _ = codecs()
            up = imagecodecs.PNG.FILTER.UP
            content = imagecodecs.png_encode(np.ascontiguousarray(array), filter=up)
        else:
            options = {**form.options, "icc_profile": icc_profile} if form is not _PNG else {}
            pillow().Image.fromarray(array).save(buffer, form.name, **options)
            content = buffer.getvalue()
    except ImportError:
        raise
    except Exception as error:  # encoders raise errors of any type
        raise ValueError(reason_of(error)) from error
    if form is not _PNG:
        return content
    if icc_profile:
        chunks = ((b"iCCP", b"icc\0\0" + zlib.compress(icc_profile)), *chunks)
    return b"".join((content[:33], *(_chunk(*chunk) for chunk in chunks), content[33:]))


def reason_of(error: Exception) -> str:
    """An error of a decoder or encoder in one line."""
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = shown(" ".join(str(error).split()))
    if text and isinstance(error, OSError | SyntaxError | ValueError | EOFError | RuntimeError):
        return text
    return f"it is damaged ({type(error).__name__}{': ' * bool(text)}{text})"


def pillow() -> Any:
    """The package PIL, with the formats that are read."""
    message = "images need Pillow: pip install 'ttsr-fast[cli]'"
    PIL = optional("PIL", message)
    for name in ("Image", "ImageOps", *(f"{kind}ImagePlugin" for kind in _PLUGINS)):
        optional(f"PIL.{name}", message)
    _keep_quiet("PIL")
    _keep_libtiff_quiet(PIL.Image.core.__file__)
    return PIL


def codecs() -> tuple[Any, Any]:
    """The packages imagecodecs and tifffile."""
    message = "16-bit colour needs imagecodecs and tifffile: pip install 'ttsr-fast[cli]'"
    names = ("imagecodecs", "tifffile")
    imagecodecs, tifffile = (optional(name, message) for name in names)
    for name in names:
        _keep_quiet(name)
    return imagecodecs, tifffile


def _keep_quiet(name: str) -> None:
    """Leave a package's messages to installed handlers: an error says the same once."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


@cache
def _keep_libtiff_quiet(extension: str) -> None:
    """Stop its prints of errors; Pillow raises exceptions for them."""
    with suppress(OSError, AttributeError):  # where libtiff is linked statically
        library = ctypes.CDLL(extension)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            set_handler = getattr(library, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum
