"""Decoding of image files of any content: an array, or one error that names the file."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ttsr_fast.files import check_readable, refusal, shown
from ttsr_fast.images.formats import SRGB, Chunks, codecs, pillow, reason_of

# Tags of TIFF and EXIF.
_BITS, _PHOTOMETRIC, _ORIENTATION, _PER_PIXEL, _PLANES = 258, 262, 274, 277, 284
_EXTRA, _SAMPLES, _PROFILE = 338, 339, 34675
_WIDTH, _HEIGHT, _STRIPS, _ROWS = 256, 257, 273, 278
_TILE_WIDTH, _TILE_HEIGHT, _TILES = 322, 323, 324
_TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_READ = ["PNG", "TIFF", "JPEG", "WEBP", "BMP"]  # for others Pillow may start a program
_TIFF_COMPRESSIONS = (1, 5, 8, 32773, 32946, 34925, 50000)  # lossless, for samples of 16 bits
# The interlaced passes of PNG: first column and row, steps across and down.
_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
_PASSES += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
_MOST_READS = 2**22  # of a file, beside its pixels; sound files need less than a tenth


class Decoded(NamedTuple):
    """The content of an image file.

    Attributes:
        array: `[H, W, 1 to 4]`, uint8 or uint16: grey, grey + alpha, RGB, RGBA.
        icc_profile: the colour profile, None without.
        colour_chunks: kind and content of the other chunks of a PNG that define its colours.
    """

    array: np.ndarray
    icc_profile: bytes | None
    colour_chunks: Chunks = ()


class _File(io.BufferedReader):
    """A file with a limited number of reads: parsers skip damage byte by byte."""

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.reads_left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ValueError("it is damaged: its parts are too many or too small")
        return super().read(size)


def decode(path: Path) -> Decoded:
    """Decode a file by its content, upright by its EXIF orientation.

    Raises:
        OSError: no such file, a folder or no regular file, or one that cannot be opened.
        ValueError: no image, a damaged one, or one of a kind that is not supported. Names the file.
        ImportError: Pillow is missing, or for 16-bit colour imagecodecs or tifffile.
    """
    pil = pillow()
    check_readable(path)
    try:
        with _File(io.FileIO(path)) as file:
            return _decode(file)
    except ImportError:
        raise
    except pil.Image.DecompressionBombError:
        reason = (
            f"it has more than {2 * pil.Image.MAX_IMAGE_PIXELS} pixels, Pillow's limit; "
            "crop it, or in Python raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
        raise ValueError(f"cannot read {shown(path)}: {reason}") from None
    except pil.UnidentifiedImageError:
        reason = "it is no PNG, TIFF, JPEG, WebP or BMP, or damaged"
        raise ValueError(f"cannot read {shown(path)}: {reason}") from None
    except Exception as error:  # decoders raise errors of any type
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(f"cannot read {shown(path)}: {refusal(error)}") from error
        raise ValueError(f"cannot read {shown(path)}: {reason_of(error)}") from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width from the header, upright by its EXIF orientation.

    Raises: as `decode`, for a header that Pillow cannot read.
    """
    check_readable(path)
    try:
        with _File(io.FileIO(path)) as file, pillow().Image.open(file, formats=_READ) as opened:
            at_hand = opened.format != "PNG" or "exif" in opened.info  # or Pillow would decode it
            rotated = at_hand and opened.getexif().get(_ORIENTATION, 1) > 4
            return (opened.width, opened.height) if rotated else (opened.height, opened.width)
    except Exception:  # decoding reads more formats, and raises the proper error
        height, width = decode(path).array.shape[:2]
        return height, width


def to_array(image: Any) -> np.ndarray:
    """`[H, W, 1 to 4]` of a Pillow image, upright by its EXIF orientation.

    Raises:
        ValueError: no pixels, or a mode or kind of samples that is not supported.
    """
    tags = image.tag_v2 if getattr(image, "format", None) == "TIFF" else {}
    if np.any(np.not_equal(tags.get(_SAMPLES, 1), 1)):
        raise ValueError("signed and floating-point samples are not supported; convert them")
    if tags:
        _check_parts(tags)
        if _misread(image):
            raise ValueError("Pillow does not read its planes; give the path")
    image = pillow().ImageOps.exif_transpose(image)
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
    if array.dtype == np.uint16 and tags:  # Pillow applies these two to 8 bits only
        array = _full_range(array, int(np.max(tags.get(_BITS, 16))))
        array = 65535 - array if tags.get(_PHOTOMETRIC) == 0 else array
    return array[..., None] if array.ndim == 2 else array


def _decode(file: _File) -> Decoded:
    pil = pillow()
    limit, content = pil.Image.MAX_IMAGE_PIXELS, os.fstat(file.fileno()).st_size
    if limit is not None and content > 2 * limit * 8 + 2**26:
        raise ValueError(f"it has {content} bytes, more than {2 * limit} pixels need")
    head = file.read(32)
    if head.startswith(_TIFF_HEADS):
        return _decode_tiff(file)
    with pil.Image.open(file, formats=_READ) as opened:
        _check_frames(getattr(opened, "n_frames", 1) if opened.format != "MPO" else 1)
        file.reads_left += 4 * opened.width * opened.height  # BMP has runs of single pixels
        profile = opened.info.get("icc_profile")
        if opened.format != "PNG":
            return Decoded(to_array(opened), profile)
        if head[12:16] != b"IHDR":
            raise ValueError("it does not begin with its header")
        mixed = opened.mode in ("LA", "RGB", "RGBA") or "transparency" in opened.info
        if head[24] <= 8 or not mixed:  # Pillow keeps every bit
            opened.load()
            _check_rows(opened, file, head)
            return Decoded(to_array(opened), profile, _colour_chunks(file))
        imagecodecs, _ = codecs()
        orientation = opened.getexif().get(_ORIENTATION)
        opened.load()  # detects damage
    file.seek(0)
    array = _upright(imagecodecs.png_decode(file.read()), orientation)
    return Decoded(array, profile, _colour_chunks(file))


def _decode_tiff(file: _File) -> Decoded:
    pil = pillow()
    try:
        with pil.Image.open(file, formats=["TIFF"]) as opened:
            _check_frames(opened.n_frames)
            deep = np.max(opened.tag_v2.get(_BITS, 1)) > 8
            if not ((deep and opened.mode in ("RGB", "RGBA")) or _misread(opened)):
                return Decoded(to_array(opened), opened.info.get("icc_profile"))
    except pil.UnidentifiedImageError as error:  # one that Pillow does not know, or damaged
        try:
            codecs()
        except ImportError:
            raise ValueError(
                "it is damaged, or of a kind that needs imagecodecs and tifffile: "
                "pip install 'ttsr-fast[cli]'"
            ) from error
    return _decode_deep_tiff(file)


def _misread(opened: Any) -> bool:
    """True for planes that Pillow takes for contiguous samples: a TIFF neither RGB nor RGBA."""
    tags = opened.tag_v2
    planes = tags.get(_PLANES) == 2 and tags.get(_PER_PIXEL, 1) > 1
    return planes and opened.mode not in ("RGB", "RGBA")


def _check_parts(tags: Any) -> None:
    """Raise ValueError if strips or tiles of a TIFF are missing, which Pillow leaves black."""
    width, height, planes = tags[_WIDTH], tags[_HEIGHT], 1
    if tags.get(_PLANES) == 2:
        planes = tags.get(_PER_PIXEL, 1)
    if _TILES in tags:
        across, down, found = tags[_TILE_WIDTH], tags[_TILE_HEIGHT], tags[_TILES]
    else:
        across, down, found = width, tags.get(_ROWS, height), tags[_STRIPS]
    expected = -(-width // max(across, 1)) * -(-height // max(down, 1)) * planes
    if np.size(found) < expected:
        raise ValueError("it is truncated")


def _decode_deep_tiff(file: BinaryIO) -> Decoded:
    """Grey or RGB with 8 to 16 bits, all of which are kept."""
    _, tifffile = codecs()
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        _check_frames(len(tiff.pages))
        page = tiff.pages[0]
        extra = _check_page(page, os.fstat(file.fileno()).st_size)
        array, profile = page.asarray(), page.tags.valueof(_PROFILE)
        size, samples = (page.imagelength, page.imagewidth), page.samplesperpixel
        orientation = page.tags.valueof(_ORIENTATION)
    if page.planarconfig == 2:
        array = np.moveaxis(array.reshape(samples, *size), 0, 2)
    array = _full_range(array.reshape(*size, samples), page.bitspersample)
    colours = samples - len(extra)
    if page.photometric == 0:
        array[..., 0] = np.iinfo(array.dtype).max - array[..., 0]
    planes = [*range(colours), *([colours + extra.index(2)] if 2 in extra else [])]
    return Decoded(_upright(array[..., planes], orientation), profile)


def _check_page(page: Any, size: int) -> tuple[int, ...]:
    """Raise unless tifffile reads every sample of this page; return the kinds of extra samples.

    It fills missing samples with zeros, and allocates memory by the tags alone.
    """
    limit = pillow().Image.MAX_IMAGE_PIXELS
    pixels = max(page.imagewidth * page.imagelength, page.tilewidth * page.tilelength)
    if limit is not None and pixels > 2 * limit:
        raise pillow().Image.DecompressionBombError
    if page.imagewidth == 0 or page.imagelength == 0:
        raise ValueError(f"it has no pixels ({page.imagewidth}x{page.imagelength})")
    if page.photometric not in (0, 1, 2) or page.imagedepth != 1:
        raise ValueError(f"photometric {int(page.photometric)} of TIFF is not supported")
    if page.sampleformat != 1:
        raise ValueError("signed and floating-point samples are not supported; convert them")
    if page.bitspersample not in range(8, 17):
        raise ValueError(f"samples of {page.bitspersample} bits are not supported")
    if page.compression not in _TIFF_COMPRESSIONS:
        raise ValueError(f"compression {int(page.compression)} is not supported for such a TIFF")
    colours = 3 if page.photometric == 2 else 1
    extra = tuple(map(int, page.tags.valueof(_EXTRA, ())))
    if not extra and page.samplesperpixel == 4 and colours == 3:
        extra = (2,)  # as in other programs
    if page.samplesperpixel != colours + len(extra) or len(extra) > 4:
        raise ValueError(f"{page.samplesperpixel} samples for a pixel are not supported")
    if 1 in extra:
        raise ValueError("samples multiplied by their alpha are not supported")
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(parts) < np.prod(page.chunked) or not all(
        start > 0 < count and start + count <= size for start, count in parts
    ):
        raise ValueError("it is truncated")
    return extra


def _full_range(array: np.ndarray, bits: int) -> np.ndarray:
    """Samples of 9 to 15 bits stretched to 16."""
    if bits in (8, 16):
        return array
    top = 2**bits - 1
    return ((array.astype(np.uint32) * 65535 + top // 2) // top).astype(np.uint16)


def _check_frames(count: int) -> None:
    if count != 1:
        raise ValueError(f"it holds {count or 'no'} frames, one is expected")


def _upright(array: np.ndarray, orientation: int | None) -> np.ndarray:
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(array[::rows, ::columns])


def _check_rows(opened: Any, file: BinaryIO, head: bytes) -> None:
    """Raise ValueError if a loaded PNG lacks rows, which Pillow leaves black."""
    width, height, bits, kind, _, _, interlaced = struct.unpack(">2I5B", head[16:29])
    last = opened.crop((0, height - 1, width, height))
    if not interlaced and last.getbbox(alpha_only=False) is not None:
        return
    expected, samples = 0, {2: 3, 4: 2, 6: 4}.get(kind, 1)
    for left, top, across, down in _PASSES if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((left - width) // across), -((top - height) // down)
        expected += rows * (1 + -(-columns * bits * samples // 8)) if columns > 0 else 0
    found, inflate = 0, zlib.decompressobj()
    for name, length in _chunks_of(file):
        content = file.read(length) if name == b"IDAT" else b""
        while content and found < expected:
            found += len(inflate.decompress(content, 2**20))
            content = inflate.unconsumed_tail
    if found < expected:
        raise ValueError("it is truncated")


def _colour_chunks(file: BinaryIO) -> Chunks:
    """Colour chunks of a decoded PNG; the first of each kind before its pixels."""
    found: dict[bytes, bytes] = {}
    for kind, length in _chunks_of(file):
        if kind == b"IDAT":
            break
        if kind in SRGB:
            content, expected = file.read(length), SRGB[kind]
            if expected is None or len(expected) == len(content):
                found.setdefault(kind, content)
    return tuple(found.items())


def _chunks_of(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Kind and length of every chunk of a PNG; the file is at the start of its content."""
    at = 8
    while True:
        file.seek(at)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        length, kind = struct.unpack(">I4s", head)
        yield kind, length
        at += length + 12
