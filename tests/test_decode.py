"""Image files of every kind: read as they are meant, or refused in one line that names them."""

import os
import shutil
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image as pillow

from tests.image_samples import chunk, noise, png, tiff
from tests.test_images import assert_same
from ttsr_fast.images import Image, as_image, decode, read_image, size_of

each = pytest.mark.parametrize
SHORT = 3  # type of tags


# --- TIFF -----------------------------------------------------------------------------------------


@each("compressed", [False, True])
@each("order", "<>")
@each("bits", [1, 2, 4, 8, 9, 10, 12, 14, 16])
@each(("photometric", "channels"), [(0, 1), (1, 1), (2, 3)])
def test_tiff_is_read_to_its_full_range(tmp_path, photometric, channels, bits, order, compressed):
    if bits < 8 and channels == 3:
        return  # refused, see below
    top = 2**bits - 1
    array = np.random.default_rng(1).integers(0, top, (6, 5, channels), endpoint=True)
    array[0, 0], array[-1, -1] = 0, top
    content = tiff(array, bits, photometric, order=order, compressed=compressed)
    (tmp_path / "a.tif").write_bytes(content)
    dtype = np.uint8 if bits <= 8 else np.uint16
    levels = (array / top * np.iinfo(dtype).max).round().astype(dtype)
    expected = np.iinfo(dtype).max - levels if photometric == 0 else levels
    assert_same(read_image(tmp_path / "a.tif"), expected)
    assert size_of(tmp_path / "a.tif") == (6, 5)
    if (bits, channels) == (16, 1) and not (photometric == 0 and order == ">"):
        with pillow.open(tmp_path / "a.tif") as opened:  # Pillow knows all but that one
            assert_same(as_image(opened), expected)


@each("bits", [8, 12, 16])
@each("photometric", [0, 1])
@each("separate", [False, True])
def test_extra_samples_of_grey_tiff(tmp_path, bits, photometric, separate):
    """Alpha is kept and not inverted, a sample without a meaning is dropped."""
    array = np.random.default_rng(1).integers(0, 2**bits, (6, 5, 2))
    top = 255 if bits == 8 else 65535
    levels = (array / (2**bits - 1) * top).round().astype(np.uint8 if bits == 8 else np.uint16)
    grey = top - levels[..., :1] if photometric == 0 else levels[..., :1]
    for kind, expected in ((2, np.dstack((grey, levels[..., 1]))), (0, grey)):
        content = tiff(array, bits, photometric, (338, SHORT, (kind,)))
        if separate:
            samples = np.moveaxis(array, 2, 0).astype(levels.dtype)
            if bits == 12:
                continue
            tifffile.imwrite(
                tmp_path / "a.tif",
                samples,
                photometric=("miniswhite", "minisblack")[photometric],
                planarconfig="separate",
                extrasamples=[kind],
                compression="zlib",
            )
        else:
            (tmp_path / "a.tif").write_bytes(content)
        assert_same(read_image(tmp_path / "a.tif"), expected)


@each("orientation", [1, 3, 6])
def test_tiff_that_pillow_does_not_know_is_turned_upright(tmp_path, orientation):
    array = np.random.default_rng(1).integers(0, 2**16, (4, 6, 1)).astype(np.uint16)
    content = tiff(65535 - array, 16, 0, (274, SHORT, (orientation,)), order=">")
    (tmp_path / "a.tif").write_bytes(content)
    expected = np.rot90(array, {1: 0, 3: 2, 6: -1}[orientation])
    assert_same(read_image(tmp_path / "a.tif"), expected)


def test_colour_profile_of_deep_tiff_is_kept(tmp_path):
    profile = bytes(range(100))
    tifffile.imwrite(tmp_path / "a.tif", noise(4, 5, 3, dtype=np.uint16), iccprofile=profile)
    assert read_image(tmp_path / "a.tif").icc_profile == profile


SIGNED = "signed and floating-point samples are not supported"


@each(
    ("bits", "photometric", "channels", "tags", "message"),
    [
        (8, 1, 1, [(339, SHORT, (2,))], SIGNED),
        (16, 1, 1, [(339, SHORT, (2,))], f"{SIGNED}|mode I is not supported"),
        (16, 2, 3, [(339, SHORT, (2, 2, 2))], SIGNED),
        (16, 1, 1, [(339, SHORT, (3,))], SIGNED),
        (16, 2, 4, [(338, SHORT, (1,))], "samples multiplied by their alpha"),
        (16, 1, 2, [(338, SHORT, (1,))], "samples multiplied by their alpha"),
        (12, 1, 2, [], "2 samples for a pixel are not supported"),
        (16, 5, 4, [], "mode CMYK is not supported"),
        (16, 8, 3, [], "photometric 8 of TIFF is not supported"),
        (4, 2, 3, [], "samples of 4 bits are not supported"),
    ],
)
def test_other_tiff_is_refused(tmp_path, bits, photometric, channels, tags, message):
    array = np.random.default_rng(1).integers(0, 2**bits, (6, 5, channels))
    (tmp_path / "a.tif").write_bytes(tiff(array, bits, photometric, *tags))
    with pytest.raises(ValueError, match=f"^cannot read .*a.tif: ({message})"):
        read_image(tmp_path / "a.tif")


def test_a_missing_strip_is_not_black(tmp_path):
    """tifffile fills what has no bytes with zeros."""
    tifffile.imwrite(tmp_path / "a.tif", noise(8, 5, 3, dtype=np.uint16), rowsperstrip=4)
    content = (tmp_path / "a.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "a.tif") as opened:
        tag = opened.pages[0].tags[279]
    for value in (0, 10**6):
        changed = bytearray(content)
        struct.pack_into(
            "<" + tag.dtype_name[0].replace("S", "H").replace("L", "I"),
            changed,
            tag.valueoffset,
            min(value, 65535),
        )
        (tmp_path / "a.tif").write_bytes(changed)
        with pytest.raises(ValueError, match=r"cannot read .*a.tif: it is truncated"):
            read_image(tmp_path / "a.tif")


@each(("bits", "channels"), [(8, 1), (8, 3), (16, 1), (16, 3)])
@each("compressed", [False, True])
def test_missing_rows_are_not_black(tmp_path, bits, channels, compressed):
    """Pillow leaves them so where nothing is compressed."""
    array = noise(30, 20, channels, dtype=np.uint8 if bits == 8 else np.uint16)
    content = bytearray(tiff(array, bits, 1 if channels == 1 else 2, compressed=compressed))
    start = struct.unpack_from("<I", content, 4)[0]
    for place in range(start + 2, len(content) - 12, 12):
        if struct.unpack_from("<H", content, place)[0] == 278:
            struct.pack_into("<I", content, place + 8, 10)  # rows of the only strip
    (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*a.tif: (it is truncated|decoder error)"):
        read_image(tmp_path / "a.tif")


def test_planes_of_an_opened_tiff_are_not_misread(tmp_path):
    planes, options = noise(2, 6, 5), {"planarconfig": "separate", "extrasamples": [2]}
    tifffile.imwrite(
        tmp_path / "a.tif", planes, photometric="minisblack", compression="zlib", **options
    )
    assert_same(read_image(tmp_path / "a.tif"), np.moveaxis(planes, 0, 2))
    with (
        pillow.open(tmp_path / "a.tif") as opened,
        pytest.raises(ValueError, match="^lr: Pillow does not read its planes; give the path$"),
    ):
        as_image(opened, "lr")


# --- PNG, palettes, other suffixes ----------------------------------------------------------------


@each("dtype", [np.uint8, np.uint16])
@each(("colour_type", "channels"), [(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)])
def test_missing_rows_of_png_are_not_black(tmp_path, colour_type, channels, dtype):
    """Pillow leaves them so where the compressed data end as they should."""
    if colour_type == 3 and dtype == np.uint16:
        return  # there is no such PNG
    palette = [(b"PLTE", bytes(range(256)) * 3)] if colour_type == 3 else []
    array = np.zeros((10, 9, channels), dtype)
    (tmp_path / "a.png").write_bytes(png(array, colour_type, *palette))
    assert read_image(tmp_path / "a.png").size == (10, 9)
    (tmp_path / "a.png").write_bytes(png(array, colour_type, *palette, size=(9, 11)))
    with pytest.raises(ValueError, match=r"a.png: (it is truncated|Not enough image data)"):
        read_image(tmp_path / "a.png")


@each("size", [(1, 1), (2, 3), (5, 5), (9, 17), (16, 16)])
def test_an_interlaced_png_is_read_whole_or_refused(tmp_path, size):
    array = noise(*size, 3)
    passes = [array[y::dy, x::dx] for x, y, dx, dy in decode._PASSES]
    rows = [b"\0" + row.tobytes() for part in passes if part.size for row in part]
    head = chunk(b"IHDR", struct.pack(">2I5B", *size[::-1], 8, 2, 0, 0, 1))
    for count in (len(rows), len(rows) - 1):
        pixels = chunk(b"IDAT", zlib.compress(b"".join(rows[:count])))
        (tmp_path / "a.png").write_bytes(GOOD[:8] + head + pixels + chunk(b"IEND", b""))
        if count == len(rows):
            assert_same(read_image(tmp_path / "a.png"), array)
        else:
            with pytest.raises(ValueError, match=r"a.png: .*truncated"):
                read_image(tmp_path / "a.png")


def test_significant_bits_of_png_change_nothing(tmp_path):
    """By its specification the samples span the whole range all the same."""
    array = noise(4, 5, 1, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(array, 0, (b"sBIT", b"\x0c")))
    assert_same(read_image(tmp_path / "a.png"), array)


@each("name", ["a.png", "a.tif", "a.jpg", "a.webp", "a.bmp"])
@each("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp", ""])
def test_the_content_decides_on_the_format(tmp_path, name, suffix):
    Image(noise(5, 6, 3)).save(tmp_path / name)
    expected = read_image(tmp_path / name).to_array()
    shutil.copy(tmp_path / name, tmp_path / f"other{suffix}")
    assert_same(read_image(tmp_path / f"other{suffix}"), expected)


def test_runs_of_single_pixels_are_no_damage(tmp_path, monkeypatch):
    """Pillow reads each of them from the file."""
    monkeypatch.setattr(decode, "_MOST_READS", 100)
    array = noise(40, 40, 1)
    rows = [b"".join(bytes((1, x)) for x in row) for row in array[::-1, :, 0]]
    pixels = b"\0\0".join(rows) + b"\0\1"
    palette = b"".join(bytes((x, x, x, 0)) for x in range(256))
    head = struct.pack("<IiiHHIIiiII", 40, 40, 40, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = struct.pack("<2sIHHI", b"BM", 54 + 1024 + len(pixels), 0, 0, 54 + 1024)
    (tmp_path / "a.bmp").write_bytes(start + head + palette + pixels)
    expected = np.broadcast_to(array, (40, 40, 3))
    assert_same(
        as_image(read_image(tmp_path / "a.bmp").to_tensor()), expected.astype(np.uint16) * 257
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"


@each("name", ["photo.png", "photo.eps"])
def test_no_program_is_started(tmp_path, monkeypatch, name):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(EPS)
    with pytest.raises(ValueError, match=f"^cannot read .*{name}: it is no PNG, .* damaged$"):
        read_image(tmp_path / name)
    assert not (tmp_path / "started").exists()


# --- bad files ------------------------------------------------------------------------------------


def save_frames(path):
    frames = [pillow.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_cut(path):
    planes = noise(3, 8, 8, dtype=np.uint16)
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    path.write_bytes(path.read_bytes()[:-9])


def save_wide_tiles(path):
    tifffile.imwrite(path, noise(32, 32, 3), photometric="rgb", tile=(16, 16))
    with tifffile.TiffFile(path) as opened:
        place = opened.pages[0].tags[322].offset
    content = bytearray(path.read_bytes())
    content[place : place + 12] = struct.pack("<HHII", 322, 4, 1, 0xFFFFFFF0)
    path.write_bytes(content)


def save_two_directories(path):
    """The second says nothing of a size."""
    content = bytearray(tiff(noise(4, 4, 3), 8, 2))
    start = struct.unpack_from("<I", content, 4)[0]
    count = struct.unpack_from("<H", content, start)[0]
    struct.pack_into("<I", content, start + 2 + 12 * count, len(content))
    path.write_bytes(content + struct.pack("<HHHIII", 1, 305, 2, 1, 0x41, 0))


GOOD = png(noise(30, 30, 3), 2)
DEEP = png(noise(30, 30, 3, dtype=np.uint16), 2)
DEFLATED = tiff(noise(30, 30, 3), 8, 2, compressed=True)
HUGE = struct.pack("<2sIHHI", b"BM", 99, 0, 0, 54) + struct.pack("<IiiHH", 40, 2**31 - 1, 1, 1, 24)
BAD_FILES = {  # message, and the content or what writes it
    "ink.tif": ("mode CMYK is not supported", pillow.new("CMYK", (4, 4)).save),
    "frames.png": ("it holds 2 frames", save_frames),
    "frames.tif": ("it holds 2 frames", save_frames),
    "frames.webp": ("it holds 2 frames", save_frames),
    "cut.tif": ("it is truncated|failed to read", save_cut),
    "strip.tif": ("decoder error -2", DEFLATED[:60] + b"\xff" * 99 + DEFLATED[159:]),
    "tiles.tif": ("it is damaged .OverflowError", save_wide_tiles),
    "two.tif": ("it is damaged|it holds 2 frames", save_two_directories),
    "deep.png": ("image file is truncated", DEEP[: len(DEEP) // 2]),
    "tail.png": ("truncated|too small", DEEP[:-30]),
    "damaged.png": ("data stream|CRC", DEEP[:1000] + b"\xff" * 99 + DEEP[1099:]),
    "text.png": ("it is no PNG, TIFF, JPEG, WebP or BMP, or damaged", b"not an image"),
    "empty.png": ("it is no PNG, TIFF, JPEG, WebP or BMP, or damaged", b""),
    "head.tif": ("it holds no frames", b"II*\0\x08\0\0\0"),
    "header.png": ("Truncated", GOOD[:20]),
    "cut.png": ("image file is truncated", GOOD[: len(GOOD) // 2]),
    "changed.png": ("data stream", GOOD[:1000] + b"\xff" * 99 + GOOD[1099:]),
    "zero.png": ("it is no PNG", png(noise(1, 1, 3), 2, size=(0, 5))),
    "bomb.png": ("178956970 pixels, .* crop it", png(noise(1, 1), 0, size=(20000, 9000))),
    "bomb.bmp": ("178956970 pixels, .* crop it", HUGE + bytes(24)),
    "late.png": (
        "it does not begin with its header",
        DEEP[:8] + chunk(b"tEXt", b"a\0b") + DEEP[8:],
    ),
    "chunks.png": ("its parts are too many", DEEP[:33] + chunk(b"teXt", b"") * 20000 + DEEP[33:]),
}


@each("name", BAD_FILES)
def test_bad_files_are_refused_in_one_line(tmp_path, name, monkeypatch, capfd):
    monkeypatch.setattr(decode, "_MOST_READS", 10000)
    message, content = BAD_FILES[name]
    path = tmp_path / name
    content(path) if callable(content) else path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=f"^cannot read {path}: .*({message})") as caught:
            read_image(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@each("error", [MemoryError(), KeyError(273), zlib.error("bad"), OverflowError("a\nb"), OSError()])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.setattr(pillow, "open", fail)
    with pytest.raises(ValueError, match=f"^cannot read {tmp_path}/a.png: it ") as caught:
        read_image(tmp_path / "a.png")
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_an_opened_image_that_is_damaged_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(GOOD[: len(GOOD) // 2])
    with (
        pillow.open(tmp_path / "a.png") as opened,
        pytest.raises(ValueError, match="^lr: image file is truncated"),
    ):
        as_image(opened, "lr")


def test_a_name_is_escaped(tmp_path):
    path = tmp_path / "a\n\x1b[2J\udcff\u202e.png"
    path.write_bytes(b"")
    shown = r"a\\n\\x1b\[2J\\xff\\u202e.png"
    with pytest.raises(ValueError, match=f"^cannot read {tmp_path}/{shown}: it is no PNG"):
        read_image(path)


# --- no regular file, or a giant one --------------------------------------------------------------


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    for path, error, reason in (
        (tmp_path / "none.png", FileNotFoundError, "no such file"),
        (tmp_path / "link.png", FileNotFoundError, "no such file"),
        (tmp_path, IsADirectoryError, "it is a folder"),
        (tmp_path / "pipe.png", OSError, "it is no regular file"),
        ("/dev/zero", OSError, "it is no regular file"),
    ):
        with pytest.raises(error, match=f"^cannot read {path}: {reason}$"):
            read_image(path)


@each("head", [b"", GOOD[:40], b"II*\0\x08\0\0\0", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"BM"])
@each("size", [2**40, 2**28], ids=["TiB", "MiB"])
def test_a_giant_file_is_refused_at_once(tmp_path, head, size):
    start = time.monotonic()
    with open(tmp_path / "a.png", "wb") as file:
        file.write(head)
        file.truncate(size)
    with pytest.raises(ValueError, match=r"cannot read .*/a.png: "):
        read_image(tmp_path / "a.png")
    assert time.monotonic() - start < 10


def test_errors_of_the_system_stay_what_they_are(tmp_path, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(GOOD)
    monkeypatch.setattr("io.FileIO", fail)
    with pytest.raises(PermissionError, match=f"^cannot read {tmp_path}/a.png: Permission denied$"):
        read_image(tmp_path / "a.png")
