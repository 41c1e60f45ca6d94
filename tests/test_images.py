"""Images: every mode and depth there and back, every kind of source, and what is refused."""

import errno
import struct
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as pillow

from tests.image_samples import noise, png, tiff
from ttsr_fast import images
from ttsr_fast.images import Image, as_image, check_output, read_image, why_not_in
from ttsr_fast.upscaling import upscale

each = pytest.mark.parametrize


def assert_same(image, array):
    """`image` is the `[H, W, C]` samples of `array`."""
    colours = 1 if array.shape[2] < 3 else 3
    np.testing.assert_array_equal(image.pixels, array[..., :colours], strict=True)
    if array.shape[2] == colours:
        assert image.alpha is None
    else:
        np.testing.assert_array_equal(image.alpha, array[..., colours], strict=True)


# --- there and back -------------------------------------------------------------------------------


@each(
    ("suffix", "dtype", "channels"),
    [
        *((".png", dtype, n) for dtype in (np.uint8, np.uint16) for n in (1, 2, 3, 4)),
        *((".tif", np.uint8, n) for n in (1, 2, 3, 4)),
        (".TIFF", np.uint16, 1),
        *((".webp", np.uint8, n) for n in (3, 4)),
        *((".bmp", np.uint8, n) for n in (1, 3)),
    ],
)
@each("size", [(5, 7), (1, 1)])
def test_lossless_files_return_every_sample(tmp_path, suffix, dtype, channels, size):
    array = noise(*size, channels, dtype=dtype)
    as_image(array).save(tmp_path / f"image{suffix}")
    assert_same(read_image(tmp_path / f"image{suffix}"), array)
    assert [file.name for file in tmp_path.iterdir()] == [f"image{suffix}"]


@each("suffix", [".jpg", ".jpeg"])
def test_jpeg_returns_every_sample_nearly(tmp_path, suffix):
    ramp = np.linspace(0, 255, 40)
    planes = np.broadcast_arrays(ramp, ramp[:, None], 128)
    array = np.stack(planes, axis=2).astype(np.uint8)
    as_image(array).save(tmp_path / f"image{suffix}")
    difference = read_image(tmp_path / f"image{suffix}").pixels.astype(int) - array
    assert np.abs(difference).max() <= 4


@each(("colour_type", "channels"), [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_16_bit_png_of_others_is_read_whole(tmp_path, colour_type, channels):
    array = noise(5, 7, channels, dtype=np.uint16)
    (tmp_path / "image.png").write_bytes(png(array, colour_type))
    assert_same(read_image(tmp_path / "image.png"), array)


@each("channels", [2, 3, 4])
def test_16_bit_png_of_ours_is_read_by_others(tmp_path, channels):
    array = noise(5, 7, channels, dtype=np.uint16)
    as_image(array).save(tmp_path / "image.png")
    with pillow.open(tmp_path / "image.png") as opened:
        upper = np.asarray(opened)  # which is all that Pillow keeps; grey it repeats
    expected = array[..., [0, 0, 0, 1]] if channels == 2 else array
    np.testing.assert_array_equal(upper, expected >> 8)


@each(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True, "byteorder": ">"},
        {"compression": "lzw", "predictor": True},
        {"tile": (16, 16)},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "zlib", "tile": (16, 16)},
    ],
    ids=str,
)
@each("channels", [3, 4])
def test_16_bit_tiff_is_read_whole(tmp_path, options, channels):
    array = noise(20, 30, channels, dtype=np.uint16)
    if channels == 4:
        options = {**options, "extrasamples": ["unassalpha"]}
    samples = np.moveaxis(array, 2, 0) if "planarconfig" in options else array
    tifffile.imwrite(tmp_path / "image.tif", samples, photometric="rgb", **options)
    assert_same(read_image(tmp_path / "image.tif"), array)


def test_samples_without_a_meaning_are_dropped(tmp_path):
    array = noise(20, 30, 4, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=["unspecified"])
    assert_same(read_image(tmp_path / "a.tif"), array[..., :3])


UPRIGHT = {  # EXIF orientation: how to turn the stored image
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


@each("orientation", UPRIGHT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    array, exif = noise(4, 6, 3), pillow.Exif()
    exif[274] = orientation
    pillow.fromarray(array).save(tmp_path / "image.png", exif=exif)
    assert_same(read_image(tmp_path / "image.png"), UPRIGHT[orientation](array))
    with pillow.open(tmp_path / "image.png") as opened:
        assert_same(as_image(opened), UPRIGHT[orientation](array))

    deep = noise(4, 6, 3, dtype=np.uint16)
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", extratags=tags)
    assert_same(read_image(tmp_path / "deep.tif"), UPRIGHT[orientation](deep))
    (tmp_path / "deep.png").write_bytes(png(deep, 2, (b"eXIf", exif.tobytes()[6:])))
    assert_same(read_image(tmp_path / "deep.png"), UPRIGHT[orientation](deep))


PALETTE = np.array([[255, 0, 0], [0, 128, 7], [9, 8, 200]], np.uint8)
INDICES = np.array([[0, 1, 2], [2, 2, 1]], np.uint8)


def test_palette_becomes_colour(tmp_path):
    opaque = (b"PLTE", PALETTE.tobytes())
    (tmp_path / "image.png").write_bytes(png(INDICES[..., None], 3, opaque))
    assert_same(read_image(tmp_path / "image.png"), PALETTE[INDICES])


def test_transparent_palette_becomes_colour_and_alpha(tmp_path):
    alpha = np.array([0, 77, 255], np.uint8)
    chunks = (b"PLTE", PALETTE.tobytes()), (b"tRNS", alpha.tobytes())
    (tmp_path / "image.png").write_bytes(png(INDICES[..., None], 3, *chunks))
    expected = np.dstack((PALETTE[INDICES], alpha[INDICES]))
    assert_same(read_image(tmp_path / "image.png"), expected)


@each("dtype", [np.uint8, np.uint16])
@each(("colour_type", "channels"), [(0, 1), (2, 3)])
def test_transparent_colour_becomes_alpha(tmp_path, colour_type, channels, dtype):
    array = noise(4, 5, channels, dtype=dtype)
    key = (b"tRNS", array[2, 3].astype(">u2").tobytes())
    (tmp_path / "image.png").write_bytes(png(array, colour_type, key))
    alpha = np.where((array == array[2, 3]).all(axis=2), 0, np.iinfo(dtype).max)
    expected = np.dstack((array, alpha.astype(dtype)))
    assert_same(read_image(tmp_path / "image.png"), expected)


def test_black_and_white_becomes_grey(tmp_path):
    array = noise(4, 9) > 100
    pillow.fromarray(array).save(tmp_path / "image.png")
    assert_same(read_image(tmp_path / "image.png"), array[..., None].astype(np.uint8) * 255)


@each("name", ["a.png", "deep.png", "a.tif", "a.jpg", "a.webp"])
def test_colour_profile_is_kept(tmp_path, name):
    pixels = noise(5, 6, 3, dtype=np.uint16 if name == "deep.png" else np.uint8)
    profile = bytes(range(200)) * 3
    Image(pixels, None, profile).save(tmp_path / name)
    assert read_image(tmp_path / name).icc_profile == profile
    with pillow.open(tmp_path / name) as opened:
        assert opened.info["icc_profile"] == profile


# --- what is an image ----------------------------------------------------------------------------


def test_every_kind_of_source(tmp_path):
    array = noise(6, 5, 4)
    pillow.fromarray(array).save(tmp_path / "image.png")
    image = read_image(tmp_path / "image.png")
    for source in (str(tmp_path / "image.png"), array, pillow.fromarray(array), image):
        assert_same(as_image(source), array)
    assert_same(as_image(array[..., 0]), array[..., :1])
    np.testing.assert_array_equal(image.to_array(), array)
    np.testing.assert_array_equal(as_image(array[..., 0]).to_array(), array[..., 0])


@each("shape", [(3, 4, 5), (1, 3, 4, 5), (1, 4, 5), (1, 1, 4, 5)])
def test_tensors_are_kept_to_16_bits(shape):
    x = torch.rand(shape, dtype=torch.float64) * 2 - 1
    image = as_image(x)
    assert image.pixels.dtype == np.uint16
    planes = x.reshape(-1, 4, 5).permute(1, 2, 0)
    expected = ((planes + 1) * 32767.5).round().numpy()
    np.testing.assert_array_equal(image.pixels, expected)
    assert (image.to_tensor() - x.float()).abs().max() < 2e-5


@each(
    ("source", "error", "message"),
    [
        (
            np.zeros((4, 4), np.float32),
            TypeError,
            "lr must be an array of uint8 or uint16, got flo",
        ),
        (np.zeros((4, 4, 5), np.uint8), ValueError, r"lr must be .* got \[4, 4, 5\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"lr must be a non-empty .* got \[0, 4, 3\]"),
        (np.zeros(4, np.uint8), ValueError, r"lr must be .* got \[4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), TypeError, "lr must be a floating.* torch.uint8"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"lr must be .* got \[2, 3, 4, 4\]"),
        (torch.zeros(3, 0, 4), ValueError, r"lr must be a non-empty .* got \[3, 0, 4\]"),
        (torch.full((3, 2, 2), torch.nan), ValueError, r"lr \[3, 2, 2\] holds NaN"),
        (torch.full((3, 2, 2), -torch.inf), ValueError, r"lr \[3, 2, 2\] holds infinity"),
        (pillow.new("CMYK", (4, 4)), ValueError, "lr: mode CMYK is not supported"),
        (pillow.new("RGB", (0, 4)), ValueError, "lr: it has no pixels"),
        (4, TypeError, "lr must be a path, .* got int"),
    ],
)
def test_other_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        as_image(source, "lr")


# --- missing packages ----------------------------------------------------------------------------


def test_pillow_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match="images need Pillow: pip install 'ttsr-fast"):
        images.downscale(noise(8, 8))


@each("name", ["a.png", "a.tif"])
@each("missing", ["imagecodecs", "tifffile"])
def test_what_16_bit_colour_needs_is_asked_for_when_it_is_missing(
    tmp_path, monkeypatch, name, missing
):
    array = noise(8, 8, 3, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(array, 2))
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb")
    monkeypatch.setitem(sys.modules, missing, None)
    for do in (
        lambda: read_image(tmp_path / name),
        lambda: check_output(tmp_path / "b.png", Image(array)),
    ):
        with pytest.raises(ImportError, match="needs imagecodecs and tifffile: pip install 'ttsr"):
            do()
    (tmp_path / "c.tif").write_bytes(tiff(array[..., :1], 16, 0, order=">"))
    with pytest.raises(ValueError, match="c.tif: it is damaged, or of a kind that needs imagecod"):
        read_image(tmp_path / "c.tif")
    as_image(array[..., 0]).save(tmp_path / "grey.png")
    assert_same(read_image(tmp_path / "grey.png"), array[..., :1])


# --- writing --------------------------------------------------------------------------------------

GREY, COLOUR = noise(4, 4, 1), noise(4, 4, 3)
DEEP = noise(4, 4, 3, dtype=np.uint16)


@each(
    ("name", "image", "error", "message"),
    [
        ("a.gif", Image(COLOUR), ValueError, "the suffix must be one of .png"),
        ("a", Image(COLOUR), ValueError, "the suffix must be one of .png"),
        ("a.jpg", Image(GREY, GREY[..., 0]), ValueError, "JPEG holds no transparency; use .png"),
        ("a.bmp", Image(COLOUR, GREY[..., 0]), ValueError, "BMP holds no transparency; use .png"),
        ("a.jpg", Image(DEEP[..., :1]), ValueError, "JPEG is not written in 16-bit grey; use"),
        ("a.tif", Image(DEEP), ValueError, "TIFF is not written in 16-bit RGB; use .png"),
        ("none/a.png", Image(COLOUR), FileNotFoundError, "there is no folder .*none$"),
        ("file/a.png", Image(COLOUR), FileNotFoundError, "there is no folder .*file$"),
        ("folder.png", Image(COLOUR), IsADirectoryError, "it is a folder"),
        ("/proc/a.png", Image(COLOUR), OSError, "no file can be made in /proc "),
    ],
)
def test_bad_outputs_are_refused_before_the_work(tmp_path, name, image, error, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for write in (
        lambda: check_output(tmp_path / name, image),
        lambda: image.save(tmp_path / name),
    ):
        with pytest.raises(error, match=f"cannot write {tmp_path / name}: {message}"):
            write()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_failure_leaves_the_existing_file_alone(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("encoder error -2")

    monkeypatch.setattr(pillow.Image, "save", fail)
    (tmp_path / "a.jpg").write_bytes(b"before")
    with pytest.raises(ValueError, match="^cannot write .*a.jpg: encoder error -2$"):
        Image(COLOUR).save(tmp_path / "a.jpg")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.jpg": b"before"}


def test_a_full_disk_leaves_the_existing_file_alone(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "")

    (tmp_path / "a.png").write_bytes(b"before")
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"cannot write .*/a.png: the disk is full; the one before"):
        Image(COLOUR).save(tmp_path / "a.png")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.png": b"before"}


@each(
    ("suffix", "size", "depth", "message"),
    [
        (".webp", (2, 4095), np.uint8, None),
        (".webp", (2, 4096), np.uint8, "WEBP holds 16383 pixels along a side, not 16384; use .png"),
        (".WEBP", (4096, 1), np.uint8, "WEBP holds 16383 pixels along a side, not 16384; use .png"),
        (".jpg", (16375, 1), np.uint8, None),
        (".jpg", (1, 16376), np.uint8, "JPEG holds 65500 pixels along a side, not 65504; use .png"),
        (".png", (1, 250000), np.uint16, None),
        (".png", (250001, 1), np.uint8, "PNG holds 1000000 pixels along a side, not 1000004"),
        (".tif", (9000, 9000), np.uint8, None),
        (".tif", (9500, 9500), np.uint8, "TIFF holds 4 GiB, not 4.03; use .png"),
        (".bmp", (9500, 9500), np.uint8, "BMP holds 4 GiB, not 4.03; use .png"),
    ],
)
def test_a_result_that_is_too_large_is_refused_before_the_work(
    tmp_path, suffix, size, depth, message
):
    channels = 1 if depth == np.uint16 else 3
    image = Image(np.broadcast_to(np.zeros(channels, depth), (*size, channels)))
    assert why_not_in(suffix, image) == message
    assert why_not_in(suffix, image, 1) is None
    if message is None:
        check_output(tmp_path / f"a{suffix}", image, 4)
    else:
        with pytest.raises(ValueError, match=f"^cannot write .*/a{suffix}: {message}$"):
            check_output(tmp_path / f"a{suffix}", image, 4)


@each(("name", "longest"), [("a.webp", 16383), ("a.jpg", 65500)])
def test_the_largest_side_can_be_written(tmp_path, name, longest):
    Image(np.zeros((1, longest, 3), np.uint8)).save(tmp_path / name)
    assert read_image(tmp_path / name).size == (1, longest)


# --- colour information ---------------------------------------------------------------------------

LINEAR = b"gAMA", struct.pack(">I", 100000)
HDR = b"cICP", bytes((9, 16, 0, 1))
SRGB = (b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455))
P3 = b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)


@each("depth", [np.uint8, np.uint16])
@each("chunks", [(LINEAR,), (LINEAR, P3), (HDR, (b"mDCV", bytes(24)), (b"cLLI", bytes(8))), SRGB])
def test_colour_chunks_of_a_png_are_kept(tmp_path, depth, chunks):
    pixels = noise(4, 5, 3, dtype=depth)
    (tmp_path / "a.png").write_bytes(png(pixels, 2, *chunks, (b"tEXt", b"a\0b"), chunks[0]))
    image = read_image(tmp_path / "a.png")
    assert image.colour_chunks == chunks
    upscale(image, noise(16, 16, 3)).image.save(tmp_path / "b.png")
    assert read_image(tmp_path / "b.png").colour_chunks == chunks
    with pillow.open(tmp_path / "b.png") as opened:
        opened.load()
        assert opened.info.get("gamma") == {LINEAR[1]: 1.0, SRGB[1][1]: 0.45455}.get(
            dict(chunks).get(b"gAMA")
        )


@each(
    ("name", "profile", "chunks", "message"),
    [
        ("a.bmp", b"icc", (), "BMP holds no colour profile, which is left out; .png keeps it"),
        ("a.jpg", None, (LINEAR,), "JPEG holds no gAMA, which says how colours are meant; .png"),
        ("a.tif", None, (LINEAR, P3), "TIFF holds no gAMA, cHRM, which says how"),
        ("a.webp", b"icc" * 50, (HDR,), "WEBP holds no cICP, which says how colours are meant"),
        ("a.jpg", b"icc", (LINEAR, P3), None),
        ("a.bmp", None, SRGB, None),
        ("a.bmp", None, ((b"gAMA", struct.pack(">I", 45454)),), None),  # 1 / 2.2
        ("a.png", b"icc", (HDR, LINEAR), None),
    ],
)
def test_colour_information_that_is_lost_is_said(tmp_path, caplog, name, profile, chunks, message):
    Image(COLOUR, None, profile, chunks).save(tmp_path / name)
    assert (tmp_path / name).is_file()
    if message is None:
        assert caplog.messages == []
    else:
        assert len(caplog.messages) == 1
        assert caplog.messages[0].startswith(f"{tmp_path / name}: {message}")
