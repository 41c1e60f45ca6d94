"""TTSR on images: windows and several references against the model itself, and the oracle."""

import numpy as np
import pytest
import torch

from tests.test_upscale import LOW, REF, noise, smooth
from ttsr_fast import reference
from ttsr_fast.images import downscale, to_tensor, upscale_bicubic
from ttsr_fast.model import TTSR
from ttsr_fast.references import search_references
from ttsr_fast.upscaling import pipeline, upscale
from ttsr_fast.upscaling.ttsr import super_resolve

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTSR((1, 2, 1, 1), 8).double()


@each("tile", [1, 3, 5, 8, 50])
def test_windows_do_not_change_the_image(model, tile):
    whole, tiled = upscale(LOW, REF, model=model), upscale(LOW, REF, model=model, tile=tile)
    np.testing.assert_array_equal(tiled.image.pixels, whole.image.pixels)
    torch.testing.assert_close(tiled.score, whole.score, rtol=0, atol=1e-12)
    assert torch.equal(tiled.index, whole.index)


@pytest.fixture(scope="module")
def published():
    """As wide as published, and not as deep."""
    torch.manual_seed(2)
    return TTSR((1, 1, 1, 1))


def test_float32_windows_give_the_same_bits(published, monkeypatch):
    low, ref = smooth(40, 67, seed=6), smooth(150, 180, seed=7)
    made = []
    monkeypatch.setattr(
        pipeline, "super_resolve", lambda *a, **k: made.append(super_resolve(*a, **k)) or made[-1]
    )
    for tile in (None, 32, 48):
        upscale(low, ref, model=published, tile=tile)
    (whole, match), *tiled = made
    for image, found in tiled:
        assert torch.equal(image, whole)
        assert all(torch.equal(a, b) for a, b in zip(found, match, strict=True))


def test_small_windows_round_alike(published):
    low, ref = smooth(30, 41, seed=6), smooth(96, 80, seed=7)
    whole, tiled = (upscale(low, ref, model=published, tile=n).image.pixels for n in (None, 11))
    assert np.mean(whole != tiled) < 1e-3
    assert np.abs(whole.astype(int) - tiled).max() <= 1


REFS = [smooth(40, 52, seed=5), smooth(27, 61, seed=8), smooth(12, 12, seed=9)]


def by_hand(model, low, refs):
    """The model with the best of several references, by the oracle of both operations."""
    images = [ref[: ref.shape[0] // 4 * 4, : ref.shape[1] // 4 * 4] for ref in refs]
    with torch.no_grad():
        lr, lrsr = (to_tensor(x).double() for x in (low, upscale_bicubic(low)))
        query = model.LTE((lrsr + 1) / 2)[2]
        found, values = [], []
        for ref in images:
            sharp, blurred = (
                (to_tensor(x).double() + 1) / 2 for x in (ref, upscale_bicubic(downscale(ref)))
            )
            found.append(reference.search(query, model.LTE(blurred)[2]))
            values.append(model.LTE(sharp))
        scores, indices = (torch.stack([match[i] for match in found]) for i in (0, 1))
        score, number = scores.max(0)
        index = indices.gather(0, number[None])[0]
        textures = [
            sum(
                reference.gather_fold(
                    value[level],
                    index.where(number == n, 0),
                    (number == n).double(),
                    stride=stride,
                )
                for n, value in enumerate(values)
            )
            for level, stride in ((2, 1), (1, 2), (0, 4))
        ]
        sr = model.MainNet(lr, score.unsqueeze(1), *textures)
    pixels = ((sr[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    return pixels, score[0], index[0], number[0]


@each("tile", [None, 4])
def test_the_best_of_several_references(model, tile):
    result = upscale(LOW, REFS, model=model, tile=tile)
    pixels, score, index, number = by_hand(model, LOW, REFS)
    np.testing.assert_array_equal(result.image.pixels, pixels)
    torch.testing.assert_close(result.score.double(), score, rtol=0, atol=1e-12)
    assert torch.equal(result.reference, number)
    assert len(number.unique()) == 3
    for n, ref in enumerate(REFS):
        here, columns = number == n, ref.shape[1] // 4
        expected = 4 * (index // columns) * ref.shape[1] + 4 * (index % columns)
        assert torch.equal(result.index[here], expected[here])


def test_a_list_of_one_is_that_one(model):
    for options in ({"model": model}, {}):
        one, several = upscale(LOW, REF, **options), upscale(LOW, [REF], **options)
        np.testing.assert_array_equal(one.image.pixels, several.image.pixels)
        assert (several.reference == 0).all()


def test_detail_takes_the_best_reference():
    truth = smooth(80, 96)
    halves = [np.vstack((truth[:44], noise(20, 96, 3))), truth[36:]]
    result = upscale(downscale(truth), halves)
    assert (result.reference[2:8] == 0).all() and (result.reference[12:18] == 1).all()
    alone = [upscale(downscale(truth), half).image.pixels for half in halves]

    def error(pixels):
        return np.mean((pixels.astype(float) - truth) ** 2)

    assert error(result.image.pixels) < 0.5 * min(map(error, alone))


def test_progress_ends_every_stage(model):
    steps = []
    upscale(LOW, REFS, model=model, tile=4, progress=lambda *what: steps.append(what))
    last = {stage: (done, total) for stage, done, total in steps}
    assert list(last) == ["references", "features", "search", "MainNet"]
    assert all(done == total > 0 for done, total in last.values())
    upscale(LOW, REF, phases=2, progress=lambda *what: steps.append(what))
    assert steps[-4:] == [("search", n, 4) for n in (1, 2, 3, 4)]


def test_bands_of_keys_are_searched_as_a_whole():
    query, keys = torch.randn(1, 4, 9, 8), [torch.randn(1, 4, 11, 7)]
    whole, bands = (search_references(query, keys, band=n) for n in (None, 2))
    assert all(torch.equal(x, y) for x, y in zip(whole, bands, strict=True))


@each(
    ("refs", "message"),
    [
        ([], "ref must be at least one reference, got none"),
        ([REF, noise(11, 40, 3)], r"ref\[1\] must have at least one patch of 12x12 .* got 40x11"),
        ([REF, None], r"ref\[1\] must be a path, .* got NoneType"),
    ],
)
def test_bad_references_are_named(refs, message):
    with pytest.raises((TypeError, ValueError), match=message):
        upscale(LOW, refs)


@each(
    ("options", "message"),
    [
        ({"tile": 0}, "tile must be at least 1 pixel, got 0"),
        ({"max_memory": 0}, "max_memory must be a positive number of bytes, got 0"),
        ({"max_memory": 2**20}, "max_memory 1 MiB is too little for method 'ttsr' at these sizes"),
    ],
)
def test_bad_limits_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        upscale(LOW, REF, model=model, **options)
    if "max_memory" in options:
        with pytest.raises(ValueError, match="max_memory"):
            upscale(LOW, REF, **options)
    else:
        with pytest.raises(ValueError, match="tile is for method 'ttsr'"):
            upscale(LOW, REF, tile=8)


@each("tile", [None, 5])
def test_convolutions_in_bfloat16_leave_the_search_alone(tile):
    torch.manual_seed(2)
    model = TTSR((2, 2, 2, 2), 16)
    low, refs = smooth(30, 41, seed=6), [smooth(96, 80, seed=7), smooth(60, 90, seed=8)]
    exact = upscale(low, refs, model=model)
    mixed = upscale(low, refs, model=model, tile=tile, amp="bf16")
    assert torch.equal(mixed.index, exact.index)
    torch.testing.assert_close(mixed.score, exact.score, rtol=0, atol=1e-6)  # windows may round
    off = np.abs(mixed.image.pixels.astype(int) - exact.image.pixels)
    assert 0 < off.max() <= 4 and off.mean() < 0.5


def test_bad_types_of_convolutions_are_refused():
    model = TTSR((1, 1, 1, 1), 8)
    with pytest.raises(ValueError, match=r"amp must be None or one of \('bf16', 'fp16'\), got 'x'"):
        upscale(LOW, REF, model=model, amp="x")
    with pytest.raises(ValueError, match="amp is for method 'ttsr'"):
        upscale(LOW, REF, amp="bf16")
