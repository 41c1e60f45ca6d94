"""Pairs from photographs: position and resampling of references, unrelated references."""

import math

import numpy as np
import pytest
import torch

from ttsr_fast import images
from ttsr_fast.images import Image
from ttsr_fast.training.photographs import (
    Photographs,
    Warp,
    held_out,
    mapped,
    photographs_in,
    resampled,
)

each = pytest.mark.parametrize
STILL = Warp(0, 0, 0, 1, 0, 0)


def noise(*shape, seed=5):
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8, endpoint=True)


def coordinates(height, width):
    """An image of its own coordinates, down and across, from 40 on."""
    y, x = np.mgrid[:height, :width]
    return np.dstack((40 + y, 40 + x, 40 + 0 * x)).astype(np.uint8)


def pixels(x):
    return ((x.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.fixture
def write(tmp_path):
    """A function that writes images `0.png`, `1.png`, ... and returns their folder."""

    def save(*arrays):
        for n, array in enumerate(arrays):
            Image(array).save(tmp_path / f"{n}.png")
        return tmp_path

    return save


# --- the homography -------------------------------------------------------------------------------


@each(
    ("warp", "numbers", "expected"),
    [
        (Warp(), (0, 0, 0, 0, 0, 0), ((0, 0), (4, 2), (8, 8))),
        (Warp(shift=0.5), (1, -0.5, 0, 0, 0, 0), ((4, -2), (8, 0), (12, 6))),
        (Warp(rotation=90), (0, 0, 1, 0, 0, 0), ((8, 0), (6, 4), (0, 8))),
        (Warp(rotation=180), (0, 0, -0.5, 0, 0, 0), ((0, 8), (2, 4), (8, 0))),
        (Warp(scale=2), (0, 0, 0, 1, 0, 0), ((-4, -4), (4, 0), (12, 12))),
        (Warp(scale=4), (0, 0, 0, -0.5, 0, 0), ((2, 2), (4, 3), (6, 6))),
        # Relative to the centre (4, 4), (x, y) becomes (x, y) / (1 + 0.5 x / 8).
        (Warp(perspective=0.5), (0, 0, 0, 0, 1, 0), ((-4 / 3, -4 / 3), (4, 2), (7.2, 7.2))),
        (Warp(perspective=0.5), (0, 0, 0, 0, 0, -1), ((0.8, 0.8), (4, 2 + 2 / 9), (28 / 3,) * 2)),
        # Doubled about the centre and rotated by a quarter, then shifted.
        (
            Warp(shift=0.25, rotation=90, scale=2),
            (1, 0, 1, 1, 0, 0),
            ((14, -4), (10, 4), (-2, 12)),
        ),
    ],
)
def test_mapped_points(warp, numbers, expected):
    matrix = warp.homography(np.array(numbers, float), 8)
    points = np.array([(0, 0), (4, 2), (8, 8)], float)
    np.testing.assert_allclose(mapped(matrix, points), expected, atol=1e-12)


def keys(t):
    """Kernel of cubic convolution (Keys 1981, eq. 4) with a = -1."""
    t = np.abs(t)
    near, far = t**3 - 2 * t**2 + 1, -(t**3) + 5 * t**2 - 8 * t + 4
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def test_resampling_is_cubic_convolution_at_the_mapped_points():
    photo = noise(200, 230, 3)
    matrix = Warp(perspective=0.3).homography(np.array([0.7, -0.4, 0.9, -0.8, 1, -0.6]), 32)
    matrix = np.array([[1, 0, 110], [0, 1, 90], [0, 0, 1]]) @ matrix
    x, y = mapped(matrix, np.mgrid[:32, :32].reshape(2, -1).T[:, ::-1] + 0.5).T
    weights = [keys(c[:, None] - np.arange(n) - 0.5) for c, n in ((y, 200), (x, 230))]
    expected = np.einsum("py,px,yxc->pc", *weights, photo).reshape(32, 32, 3)
    view = resampled(photo, matrix, 32)
    np.testing.assert_array_equal(view, np.floor(expected.clip(0, 255)))


def test_resampling_reads_to_the_border():
    photo = noise(20, 24, 3)
    np.testing.assert_array_equal(resampled(photo[:20, :20], np.eye(3), 20), photo[:, :20])


def test_tones():
    tones = Warp(brightness=0.2, contrast=0.5).tones
    np.testing.assert_array_equal(tones(np.zeros(2)), np.arange(256))
    brighter = tones(np.array([0, 0.5]))
    assert brighter[[0, 100, 229, 255]].tolist() == [26, 126, 254, 255]  # 25.5 to even
    steeper = tones(np.array([1, 0]))
    assert steeper[[0, 100, 127, 128, 155, 255]].tolist() == [0, 86, 127, 128, 169, 255]


# --- items ----------------------------------------------------------------------------------------


def test_without_a_warp_the_reference_equals_the_image(write):
    photo = noise(60, 70, 3)
    dataset = Photographs(
        write(photo), size=24, warp=STILL, unrelated=0, candidates=1, augment=False
    )
    positions = set()
    for index in range(40):
        hr = pixels(dataset[index]["hr"])
        np.testing.assert_array_equal(pixels(dataset[index]["ref"]), hr)
        found = [
            (top, left)
            for top in range(37)
            for left in range(47)
            if (photo[top, left] == hr[0, 0]).all()
        ]
        assert any((photo[y : y + 24, x : x + 24] == hr).all() for y, x in found)
        positions |= set(found)
    assert len(positions) > 30
    low = images.downscale(hr)
    np.testing.assert_array_equal(pixels(dataset[index]["lr"]), low)
    np.testing.assert_array_equal(pixels(dataset[index]["lrsr"]), images.upscale_bicubic(low))
    np.testing.assert_array_equal(pixels(dataset[index]["refsr"]), images.upscale_bicubic(low))
    assert dataset[index]["key_mask"].all() and dataset[index]["key_mask"].shape == (6, 6)


def test_references_are_inside_the_photograph_and_near_their_image(write):
    """In a photograph of its own coordinates, where no pixel is darker than 40."""
    warp = Warp(shift=0.25, rotation=30, perspective=0.2, scale=1.3, brightness=0, contrast=0)
    options = {"warp": warp, "unrelated": 0, "augment": False}
    dataset = Photographs(write(coordinates(160, 170)), size=48, **options)
    shifts, scales = [], []
    for index in range(150):
        hr, ref = (pixels(dataset[index][name]).astype(float) for name in ("hr", "ref"))
        assert ref.min() >= 40 and ref[..., 2].max() == 40
        shifts.append(ref[23:25, 23:25, :2].mean((0, 1)) - hr[23:25, 23:25, :2].mean((0, 1)))
        across = ref[24, 28, :2] - ref[24, 19, :2]
        scales.append(math.hypot(*across) / 9)
    shifts = np.abs(np.array(shifts))
    assert shifts.max() <= 12.5 and (shifts.max(0) > 11).all() and (shifts.min(0) < 1).all()
    assert 0.7 < min(scales) < 0.82 and 1.2 < max(scales) < 1.45


def test_a_photograph_without_room_is_not_warped(write):
    dataset = Photographs(
        write(noise(24, 24, 3)), size=24, unrelated=0, warp=Warp(brightness=0, contrast=0)
    )
    item = dataset[0]  # image and reference are flipped and rotated independently
    assert sorted(item["ref"].flatten().tolist()) == sorted(item["hr"].flatten().tolist())


def test_only_references_change_in_brightness(write):
    photo = np.full((40, 40, 3), 100, np.uint8)
    dataset = Photographs(write(photo), size=12, unrelated=0, warp=Warp(brightness=0.1, contrast=0))
    items = [dataset[index] for index in range(60)]
    assert all((pixels(item["hr"]) == 100).all() for item in items)
    values = [int(pixels(item["ref"])[0, 0, 0]) for item in items]
    assert 74 <= min(values) < 78 and 122 < max(values) <= 126


@each("share", [0.0, 0.3, 1.0])
def test_a_share_of_references_is_unrelated(write, share):
    """Photographs of one colour each; all other photographs are equally likely."""
    colours = [np.full((40, 40, 3), 60 * n, np.uint8) for n in range(4)]
    dataset = Photographs(
        write(*colours), size=12, unrelated=share, crops_per_photo=100, warp=STILL, candidates=1
    )
    others = np.zeros(4, int)
    for index in range(len(dataset)):
        item = dataset[index]
        own, other = (int(pixels(item[name])[0, 0, 0]) for name in ("hr", "ref"))
        assert own == 60 * (index % 4)
        others[(other - own) // 60 % 4] += 1
    deviation = math.sqrt(400 * share * (1 - share))
    assert abs(others[1:].sum() - 400 * share) <= 3 * deviation
    assert share == 0 or others[1:].min() > 0.7 * 400 * share / 3


def test_default_share_of_unrelated_references(write):
    """With a single photograph, all references are views of it."""
    grey = np.full((40, 40, 3), 60, np.uint8)
    options = {"size": 12, "crops_per_photo": 50, "warp": STILL}
    alone = Photographs(write(grey), **options)
    assert {int(pixels(alone[n]["ref"])[0, 0, 0]) for n in range(50)} == {60}
    two = Photographs(write(grey, grey + 60), **options)
    values = [[int(pixels(two[n][name])[0, 0, 0]) for name in ("hr", "ref")] for n in range(100)]
    assert 0 < sum(own != other for own, other in values) < 25


def test_crops_with_detail_are_preferred(write):
    """In a photograph with three flat quarters."""
    photo = np.full((100, 200, 3), 128, np.uint8)
    photo[:, 150:] = noise(100, 50, 3)
    folder = write(photo)
    flat = []
    for candidates in (1, 6):
        dataset = Photographs(folder, size=12, unrelated=0, candidates=candidates)
        flat.append(sum(float(dataset[index]["hr"].std()) < 0.05 for index in range(60)))
    assert flat[0] > 30 and flat[1] < 20


def test_photographs_are_reduced_to_the_longest_side(write):
    photo = noise(48, 60, 3)
    dataset = Photographs(write(photo), size=24, longest=30, unrelated=0, augment=False)
    reduced, hr = images.resize(photo, (24, 30)), pixels(dataset[0]["hr"])
    assert sum((reduced[:, x : x + 24] == hr).all() for x in range(7)) == 1


def test_a_photograph_reduced_too_far(write):
    dataset = Photographs(write(noise(40, 80, 3)), size=24, longest=40, unrelated=0)
    with pytest.raises(ValueError, match="at least 24x24 pixels, got 40x20 with longest 40$"):
        dataset[0]


def test_items_cycle_through_the_photographs(write):
    colours = [np.full((20, 20, 3), 50 * n, np.uint8) for n in range(3)]
    dataset = Photographs(write(*colours), size=12, crops_per_photo=2)
    assert len(dataset) == 6
    seen = [int(pixels(dataset[index]["hr"])[0, 0, 0]) for index in range(12)]
    assert seen == [0, 50, 100] * 4


def test_the_same_index_is_the_same_item(write):
    folder = write(noise(60, 60, 3), noise(50, 70, 3, seed=6))
    first, second = (Photographs(folder, size=24, seed=2) for _ in range(2))
    items = [first[index] for index in range(8)]
    for index in reversed(range(8)):
        for name, x in second[index].items():
            assert torch.equal(x, items[index][name])
    assert not torch.equal(items[0]["hr"], first[len(first)]["hr"])
    assert not torch.equal(items[0]["hr"], Photographs(folder, size=24, seed=3)[0]["hr"])


# --- files ----------------------------------------------------------------------------------------


def test_files_are_kept_in_order_and_held_out(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.jpg").touch()
    files = photographs_in(tmp_path)
    assert [file.name for file in files] == [f"{n}.jpg" for n in range(12)]
    assert photographs_in([files[3], tmp_path]) == [files[3], *files]
    train, validation = held_out(tmp_path, every=5)
    assert validation == [files[4], files[9]]
    assert train == [file for file in files if file not in validation]
    for every in (1, 13):
        with pytest.raises(ValueError, match=rf"every must be in \[2, 12\], .* got {every}"):
            held_out(files, every)


def test_small_and_damaged_photographs(write):
    folder = write(noise(40, 40, 3), noise(20, 40, 3), noise(40, 40, 3))
    (folder / "2.png").write_bytes(b"no image")
    dataset = Photographs(folder, size=24, unrelated=0)
    with pytest.raises(ValueError, match="1.png must have at least 24x24 pixels, got 40x20"):
        dataset[1]
    with pytest.raises(ValueError, match="cannot read .*2.png: it is no PNG"):
        dataset[2]
    patient = Photographs(folder, size=24, unrelated=0, on_error="skip")
    for index in (1, 2):
        assert torch.equal(patient[index]["hr"], dataset[3]["hr"])


@each(
    ("options", "message"),
    [
        ({"size": 30}, "size must be a multiple of 4"),
        ({"crops_per_photo": 0}, "crops_per_photo and candidates must be 1 or more, got 0 and 4"),
        ({"candidates": 0}, "crops_per_photo and candidates must be 1 or more, got 16 and 0"),
        ({"unrelated": 1.5}, r"unrelated must be in \[0, 1\], got 1.5"),
        ({"unrelated": 0.1}, "unrelated must be 0 for one photograph alone, got 0.1"),
    ],
)
def test_bad_arguments(write, options, message):
    with pytest.raises(ValueError, match=message):
        Photographs(write(noise(40, 40, 3)), **options)


@each(
    ("options", "message"),
    [
        ({"scale": 0.5}, "scale must be 1 or more, got 0.5"),
        ({"perspective": 1}, "perspective must be less than 1, got 1"),
        ({"shift": -0.1}, "shift must be 0 or more, got -0.1"),
        ({"rotation": math.nan}, "rotation must be 0 or more, got nan"),
    ],
)
def test_bad_warps(options, message):
    with pytest.raises(ValueError, match=message):
        Warp(**options)


def test_no_photographs(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        Photographs(tmp_path)
    with pytest.raises(ValueError, match="source must be at least one photograph, got none"):
        Photographs([])
