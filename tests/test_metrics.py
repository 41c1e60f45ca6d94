"""PSNR and SSIM of each protocol against their formulas, written out."""

import math
import sys

import numpy as np
import pytest

from ttsr_fast.metrics import PROTOCOLS, psnr, ssim

each = pytest.mark.parametrize


@pytest.fixture
def images():
    """Two that are alike, with structure, and of unequal sides."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (6, 7, 3)).repeat(4, 0).repeat(4, 1) + rng.integers(-9, 9, (24, 28, 3))
    b = a + rng.integers(-20, 20, a.shape)
    return tuple(x.clip(0, 255).astype(np.uint8) for x in (a, b))


def planes(pixels, protocol):
    """The planes that a protocol compares, as lists of rows of Python floats."""
    height, width = pixels.shape[:2]

    def value(y, x, channel):
        r, g, b = (float(v) for v in pixels[y, x])
        if protocol == "ttsr":
            return 16 + (65.738 * r + 129.057 * g + 25.064 * b) / 256
        if protocol == "c2":
            return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
        return (r, g, b)[channel]

    border = 0 if protocol == "ttsr" else 4
    rows, columns = range(border, height - border), range(border, width - border)
    channels = range(3 if protocol == "mmagic" else 1)
    return [[[value(y, x, channel) for x in columns] for y in rows] for channel in channels]


def plain_psnr(a, b):
    errors = [
        (p - q) ** 2
        for plane, other in zip(a, b, strict=True)
        for row, line in zip(plane, other, strict=True)
        for p, q in zip(row, line, strict=True)
    ]
    return 10 * math.log10(255**2 / (math.fsum(errors) / len(errors)))


def plain_ssim(x, y):
    """Of one plane: every 11x11 window that lies inside, by loops."""
    weights = [math.exp(-((n - 5) ** 2) / (2 * 1.5**2)) for n in range(11)]
    norm = math.fsum(weights)
    window = [(i, j, u * v / norm**2) for i, u in enumerate(weights) for j, v in enumerate(weights)]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for top in range(len(x) - 10):
        for left in range(len(x[0]) - 10):
            inside = [(w, x[top + i][left + j], y[top + i][left + j]) for i, j, w in window]
            mx, my = (math.fsum(w * pair[n] for w, *pair in inside) for n in (0, 1))
            vx = math.fsum(w * (p - mx) ** 2 for w, p, _ in inside)
            vy = math.fsum(w * (q - my) ** 2 for w, _, q in inside)
            cov = math.fsum(w * (p - mx) * (q - my) for w, p, q in inside)
            luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
            found.append(luminance * (2 * cov + c2) / (vx + vy + c2))
    return math.fsum(found) / len(found)


@each("protocol", PROTOCOLS)
def test_psnr_is_its_formula(images, protocol):
    expected = plain_psnr(*(planes(x, protocol) for x in images))
    assert psnr(*images, protocol) == pytest.approx(expected, abs=1e-9)


@each("protocol", PROTOCOLS)
def test_ssim_is_its_formula(images, protocol):
    a, b = (planes(x, protocol) for x in images)
    expected = [plain_ssim(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.5 < expected[0] < 0.99
    assert ssim(*images, protocol) == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_a_known_error():
    """2 of 255 in green alone, everywhere."""
    a = np.full((20, 20, 3), 100, np.uint8)
    b = a + np.array([0, 2, 0], np.uint8)
    assert psnr(a, b, "ttsr") == pytest.approx(20 * math.log10(255 / (2 * 129.057 / 256)))
    assert psnr(a, b, "mmagic") == pytest.approx(10 * math.log10(255**2 / (4 / 3)))
    assert psnr(a, b, "c2") == pytest.approx(20 * math.log10(255 / (2 * 128.553 / 255)))


@each("protocol", PROTOCOLS)
def test_equal_images(images, protocol):
    a, _ = images
    assert psnr(a, a, protocol) == math.inf
    assert ssim(a, a, protocol) == 1.0


@each(("protocol", "border"), [("ttsr", 0), ("mmagic", 4), ("c2", 4)])
def test_the_border_left_out(protocol, border):
    a = np.full((21, 22, 3), 100, np.uint8)
    for edge in range(6):
        b = a.copy()
        b[edge] = b[-1 - edge] = 0
        b[:, edge] = b[:, -1 - edge] = 0
        assert (psnr(a, b, protocol) == math.inf) == (edge < border)


@each(
    ("a", "b", "protocol", "error", "message"),
    [
        ((20, 20, 3), (20, 20, 3), "ycbcr", ValueError, "protocol must be one of .*, got 'ycbcr'"),
        ((20, 20, 3), (20, 24, 3), "ttsr", ValueError, r"got \[20, 20, 3\] and \[20, 24, 3\]"),
        ((20, 20), (20, 20), "ttsr", ValueError, r"two \[H, W, 3\] of one size"),
        ((10, 20, 3), (10, 20, 3), "ttsr", ValueError, "at least 11x11 pixels .* got 20x10"),
        ((20, 18, 3), (20, 18, 3), "c2", ValueError, "at least 19x19 pixels .*'c2', got 18x20"),
    ],
)
def test_bad_images_are_refused(a, b, protocol, error, message):
    for measure in (psnr, ssim):
        with pytest.raises(error, match=message):
            measure(np.zeros(a, np.uint8), np.zeros(b, np.uint8), protocol)


def test_only_8_bits_are_compared(images):
    with pytest.raises(TypeError, match="arrays of uint8, got float64"):
        psnr(images[0], images[1].astype(float))


def test_scikit_image_is_asked_for(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        psnr(*images)
