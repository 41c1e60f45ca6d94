"""Training items: equal to Pillow, and the same for any number of workers and reads."""

import importlib
import logging
import pickle
import re
import traceback

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from torch.utils.data import DataLoader

from tests.test_decode import save_two_directories, save_wide_tiles
from ttsr_fast.datasets import Pair
from ttsr_fast.images import Image
from ttsr_fast.training import data
from ttsr_fast.training.data import EpochSampler, ImageCache, PairDataset, UnusableImage

each = pytest.mark.parametrize
GROUPS = (("lr", "lrsr", "hr"), ("ref", "refsr", "key_mask"))


def noise(*shape, seed=5):
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8, endpoint=True)


@pytest.fixture
def write(tmp_path):
    """A function that writes an image and returns its path."""

    def save(name, pixels):
        Image(pixels).save(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def three_pairs(write):
    """HR images of 48x48, references of 48x48, 30x22 and 12x48."""
    return [
        Pair(
            str(n),
            write(f"{n}.png", noise(48, 48, 3, seed=n)),
            (write(f"{n}r.png", noise(*size, 3, seed=9 + n)),),
        )
        for n, size in enumerate([(48, 48), (30, 22), (12, 48)])
    ]


def resized(pixels, height, width):
    return np.asarray(pillow.fromarray(pixels).resize((width, height), pillow.BICUBIC))


def down_up(pixels):
    height, width = pixels.shape[:2]
    return resized(resized(pixels, height // 4, width // 4), height, width)


def tensor(pixels):
    return torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1)


def assert_same(item, other):
    assert item.keys() == other.keys()
    for name, x in item.items():
        assert x.dtype == other[name].dtype, name
        assert torch.equal(x, other[name]), name


# --- one item -------------------------------------------------------------------------------------


def test_an_item_equals_pillow(three_pairs):
    """The second reference is 30x22: degraded by itself, then padded with black."""
    dataset = PairDataset(three_pairs, size=48, augment=False)
    for n, (height, width) in enumerate([(48, 48), (30, 22), (12, 48)]):
        hr, ref = noise(48, 48, 3, seed=n), noise(height, width, 3, seed=9 + n)
        item = dataset[n]
        assert torch.equal(item.pop("lr"), tensor(resized(hr, 12, 12)))
        assert torch.equal(item.pop("lrsr"), tensor(down_up(hr)))
        assert torch.equal(item.pop("hr"), tensor(hr))
        for name, pixels in (("ref", ref), ("refsr", down_up(ref))):
            expected = torch.full((3, 48, 48), -1.0)
            expected[:, :height, :width] = tensor(pixels)
            assert torch.equal(item.pop(name), expected)
        mask = [[4 * y < height and 4 * x < width for x in range(12)] for y in range(12)]
        assert torch.equal(item.pop("key_mask"), torch.tensor(mask))
        assert not item


def test_references_that_are_not_padded_are_cut(three_pairs):
    dataset = PairDataset(three_pairs, size=48, augment=False, pad_references=False)
    item, ref = dataset[1], noise(30, 22, 3, seed=10)[:28, :20]
    assert torch.equal(item["ref"], tensor(ref))
    assert torch.equal(item["refsr"], tensor(down_up(ref)))
    assert torch.equal(item["key_mask"], torch.ones(7, 5, dtype=torch.bool))


def test_without_a_reference_the_lr_image_is_the_reference(write):
    hr = noise(48, 48, 3)
    pairs, low = [Pair("a", write("a.png", hr), ())], resized(hr, 12, 12)
    item = PairDataset(pairs, size=48, augment=False)[0]
    assert torch.equal(item["ref"][:, :12, :12], tensor(low))
    assert torch.equal(item["refsr"][:, :12, :12], tensor(down_up(low)))
    assert item["key_mask"].nonzero().tolist() == [[y, x] for y in range(3) for x in range(3)]


def test_crops_have_the_same_relative_position_in_image_and_reference(write):
    """In an image of its own coordinates; every position is sampled, the last one included."""

    def coordinates(height, width):
        y, x = np.mgrid[:height, :width]
        return np.dstack((y, x, 0 * x)).astype(np.uint8)

    pair = Pair("a", write("a.png", coordinates(15, 14)), (write("r.png", coordinates(30, 12)),))
    dataset, seen = PairDataset([pair], size=12, augment=False), set()
    for index in range(60):
        item = dataset[index]
        (top, left, _), (ref_top, ref_left, _) = (
            ((item[name][:, 0, 0] + 1) * 127.5).round().int().tolist() for name in ("hr", "ref")
        )
        ours, theirs = coordinates(15, 14)[top:, left:], coordinates(30, 12)[ref_top:, ref_left:]
        assert torch.equal(item["hr"], tensor(ours[:12, :12]))
        assert torch.equal(item["ref"], tensor(theirs[:12, :12]))
        assert int(ref_top / 19 * 4) <= top <= (ref_top + 1) / 19 * 4  # of 19 and of 4 positions
        assert ref_left == 0
        seen.add((top, left))
    assert seen == {(top, left) for top in range(4) for left in range(3)}


def test_one_of_several_references_is_sampled(write):
    refs = tuple(write(f"r{n}.png", np.full((12, 12, 3), n, np.uint8)) for n in range(3))
    dataset = PairDataset([Pair("a", write("a.png", noise(12, 12, 3)), refs)], size=12)
    values = [round((dataset[index]["ref"][0, 0, 0].item() + 1) * 127.5) for index in range(60)]
    assert all(10 <= values.count(n) <= 30 for n in range(3))


# --- flips and rotations --------------------------------------------------------------------------


def views(x):
    """The eight views of `[..., H, W]` under flips and quarter rotations."""
    return [torch.rot90(y, n, (-2, -1)) for y in (x, x.flip(-1)) for n in range(4)]


def test_groups_are_flipped_and_rotated_independently(three_pairs):
    """Each group as one, with eight equally frequent views, independent of the other group."""
    plain = PairDataset(three_pairs[1:2], size=48, augment=False)[0]
    dataset = PairDataset(three_pairs[1:2], size=48)
    table = torch.zeros(8, 8)
    for index in range(400):
        item, which = dataset[index], []
        for group in GROUPS:
            found = set(range(8))
            for name in group:
                same = {n for n, x in enumerate(views(plain[name])) if torch.equal(x, item[name])}
                found &= same
            assert len(found) == 1
            which += found
        table[which[0], which[1]] += 1
    for margin in (table.sum(0), table.sum(1)):  # 50 are expected, 6.6 is their deviation
        assert margin.min() >= 25 and margin.max() <= 75
    assert 25 <= table.trace() <= 75
    assert (table > 0).sum() > 54  # of 64, each empty with a probability of 0.002


# --- indices --------------------------------------------------------------------------------------


def test_an_item_depends_on_seed_and_index_alone(three_pairs):
    options = {"size": 12, "seed": 3}
    first, second = PairDataset(three_pairs, **options), PairDataset(three_pairs, **options)
    items = [first[index] for index in range(12)]
    for index in reversed(range(12)):
        assert_same(second[index], items[index])
    copy = pickle.loads(pickle.dumps(first))
    assert_same(copy[7], items[7])
    assert not torch.equal(first[7]["hr"], first[4]["hr"])  # another epoch
    assert not torch.equal(first[7]["hr"], PairDataset(three_pairs, size=12, seed=4)[7]["hr"])


@each(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_the_same_items(three_pairs, method, workers):
    dataset = PairDataset(three_pairs, size=12)
    sampler = EpochSampler(len(dataset), seed=1, epoch=2)
    alone = list(DataLoader(dataset, batch_size=2, sampler=sampler))
    shared = DataLoader(
        dataset, batch_size=2, sampler=sampler, num_workers=workers, multiprocessing_context=method
    )
    for batch, other in zip(alone, shared, strict=True):
        assert_same(batch, other)
    items = [dataset[index] for index in sampler]
    assert torch.equal(
        torch.cat([batch["hr"] for batch in alone]), torch.stack([item["hr"] for item in items])
    )


def test_indices_of_an_epoch():
    """Each once, in an order that depends on the epoch alone."""
    sampler = EpochSampler(7, seed=5)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert list(sampler) == epochs[-1] == list(EpochSampler(7, seed=5, epoch=epoch))
        assert sorted(epochs[-1]) == list(range(7 * epoch, 7 * epoch + 7))
    orders = [tuple(index % 7 for index in epoch) for epoch in epochs]
    assert len({*orders, tuple(EpochSampler(7, seed=6))}) == 4
    assert len(sampler) == 7
    seeds = np.random.SeedSequence(5, spawn_key=(2,))
    assert list(orders[2]) == np.random.default_rng(seeds).permutation(7).tolist()


def test_former_names_warn():
    with pytest.warns(FutureWarning, match="training.datasets is now ttsr_fast.training.data"):
        former = importlib.import_module("ttsr_fast.training.datasets")
    assert (former.PairDataset, former.Draws) == (PairDataset, EpochSampler)


# --- unusable images ------------------------------------------------------------------------------


@pytest.fixture
def damaged(three_pairs):
    """The second image is truncated, the third too small for the size of the tests."""
    three_pairs[1].hr.write_bytes(three_pairs[1].hr.read_bytes()[:200])
    Image(noise(48, 44, 3)).save(three_pairs[2].hr)
    return three_pairs


def test_an_unusable_image_is_named(damaged):
    dataset = PairDataset(damaged, size=48)
    dataset[0]
    with pytest.raises(ValueError, match="cannot read .*1.png: "):
        dataset[1]
    with pytest.raises(ValueError, match="2.png must have at least 48x48 pixels, got 44x48"):
        dataset[2]


def test_an_unusable_image_is_named_in_one_line_by_a_loader(damaged):
    """A loader constructs the error of its worker again, from a text with the traceback."""
    with pytest.raises(UnusableImage, match="cannot read") as raised:
        PairDataset(damaged[1:2], size=48)[0]
    error = raised.value
    text = "".join(traceback.format_exception(error))
    again = type(error)(f"Caught {type(error).__name__} in DataLoader worker process 0.\n{text}")
    assert len(text.splitlines()) > 9
    assert str(again) == str(error)
    assert re.fullmatch(r"cannot read \S*/1.png: [^\n]+", str(again))


@each("save", [save_two_directories, save_wide_tiles])
def test_all_errors_of_decoders_are_skipped(three_pairs, tmp_path, caplog, save):
    save(tmp_path / "bad.tif")
    pairs = [Pair("bad", tmp_path / "bad.tif", ()), three_pairs[0]]
    dataset = PairDataset(pairs, size=48, on_error="skip")
    assert_same(dataset[0], dataset[1])
    (message,) = caplog.messages
    assert message.startswith(f"left out: cannot read {tmp_path}/bad.tif: it is damaged (")


def test_an_unusable_image_is_skipped_on_request(damaged, caplog):
    dataset = PairDataset(damaged, size=48, on_error="skip")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(dataset[4], dataset[3])  # of epoch 1: the next but one, which is the first
            assert_same(dataset[5], dataset[3])
    messages = [record.getMessage() for record in caplog.records]
    assert [re.findall(r"left out: .*(\d).png", line) for line in messages] == [["1"], ["2"]]


def test_a_missing_reference_is_skipped(three_pairs):
    three_pairs[0].references[0].unlink()
    dataset = PairDataset(three_pairs, size=48, on_error="skip")
    assert_same(dataset[0], dataset[1])


def test_no_usable_item(damaged):
    with pytest.raises(ValueError, match="no item can be used; the last: cannot read .*1.png"):
        PairDataset(damaged[1:2], size=48, on_error="skip")[0]


@each(
    ("options", "message"),
    [
        ({"size": 50}, "size must be a multiple of 4, 12 or more, got 50"),
        ({"size": 8}, "size must be a multiple of 4, 12 or more, got 8"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_bad_arguments(three_pairs, options, message):
    with pytest.raises(ValueError, match=message):
        PairDataset(three_pairs, **options)


def test_bad_sizes_and_indices(three_pairs):
    with pytest.raises(ValueError, match="pairs must be at least one, got none"):
        PairDataset([])
    with pytest.raises(ValueError, match="size must be 48 or more where .* got 44"):
        PairDataset([Pair("a", three_pairs[0].hr, ())], size=44)
    with pytest.raises(IndexError, match="index must be 0 or more, got -1"):
        PairDataset(three_pairs)[-1]
    with pytest.raises(ValueError, match="length must be 1 or more, .* got 0, 0 and 0"):
        EpochSampler(0)


# --- the cache ------------------------------------------------------------------------------------


@each(("limit", "decoded"), [(0, 7), (300, 4), (1000, 3)])
def test_recently_used_images_are_kept(write, monkeypatch, limit, decoded):
    """Each is 108 bytes, so that 300 keep two of the three."""
    files = [write(f"{n}.png", noise(6, 6, 3, seed=n)) for n in range(3)]
    read, count = data.read_rgb, []
    monkeypatch.setattr(data, "read_rgb", lambda path: count.append(path) or read(path))
    cache = ImageCache(limit)
    for n in (0, 1, 0, 2, 0, 1, 0):
        np.testing.assert_array_equal(cache.read(files[n], 1), noise(6, 6, 3, seed=n))
    assert len(count) == decoded
