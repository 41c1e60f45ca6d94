"""Random pixels, and image files that encoders do not write, or write in one way only."""

import struct
import zlib

import numpy as np


def noise(*shape, dtype=np.uint8, seed=3):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, shape, dtype, endpoint=True)


def png(array, colour_type, *chunks, size=None):
    """A PNG of `[H, W, C]` samples, unfiltered, with `chunks` before its pixels."""

    width, height = size or (array.shape[1], array.shape[0])
    header = struct.pack(">2I5B", width, height, 8 * array.itemsize, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in array)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def chunk(kind, data):
    """A chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def tiff(array, bits, photometric, *tags, order="<", compressed=False):
    """A TIFF of `[H, W, C]` samples in one strip, with further `tags` (number, type, values)."""
    height, width, channels = array.shape
    strip = b"".join(_packed(row.ravel(), bits, order) for row in array)
    strip = zlib.compress(strip) if compressed else strip
    short, long = 3, 4
    tags = [
        (256, short, (width,)),
        (257, short, (height,)),
        (258, short, (bits,) * channels),
        (259, short, (8 if compressed else 1,)),
        (262, short, (photometric,)),
        (273, long, (8,)),  # the strip comes first
        (277, short, (channels,)),
        (278, short, (height,)),
        (279, long, (len(strip),)),
        *tags,
    ]
    strip += b"\0" * (len(strip) % 2)
    directory, values = struct.pack(order + "H", len(tags)), b""
    behind = 8 + len(strip) + 2 + 12 * len(tags) + 4
    for number, kind, content in sorted(tags):
        packed = struct.pack(f"{order}{len(content)}{'BBBHI'[kind]}", *content)
        directory += struct.pack(order + "HHI", number, kind, len(content))
        if len(packed) > 4:
            directory += struct.pack(order + "I", behind + len(values))
            values += packed + b"\0" * (len(packed) % 2)
        else:
            directory += packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "I", 8 + len(strip))
    return head + strip + directory + bytes(4) + values


def _packed(samples, bits, order):
    """A row of samples; of other than 8 and 16 bits, the highest first, filled up to a byte."""
    if bits == 16:
        return samples.astype(f"{order}u2").tobytes()
    stream = (samples[:, None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(stream.astype(np.uint8).ravel()).tobytes()
