"""A key in bands: the rows a band needs, and that no patch is lost, seen twice or cut."""

import itertools

import pytest
import torch

from tests import cases
from ttsr_fast import search
from ttsr_fast.operators.patch import Patch
from ttsr_fast.references import is_better, rows_needed, search_band

each = pytest.mark.parametrize


def search_in_bands(query, key, ends, **options):
    """The best of the bands between consecutive `ends`."""
    kernel_size, padding = options.get("kernel_size", 3), options.get("padding")
    score = index = None
    for first, last in itertools.pairwise(ends):
        top, bottom = rows_needed(first, last, key.shape[2], Patch.of(kernel_size, padding))
        found = search_band(query, key[:, :, top:bottom], first, last, key.shape[2], **options)
        if score is None:
            score, index = found
            continue
        better = is_better(found.score, score)
        score = torch.where(better, found.score, score)
        index = torch.where(better, found.index, index)
    return score, index


@each(
    ("first", "last", "padding", "rows"),
    [(0, 2, 1, (0, 3)), (2, 5, 1, (1, 6)), (5, 9, 1, (4, 9))],
)
def test_rows_of_a_padded_key(first, last, padding, rows):
    assert rows_needed(first, last, 9, Patch.of(3, padding)) == rows


@each(("first", "last", "rows"), [(0, 2, (0, 4)), (2, 5, (2, 7)), (5, 7, (5, 9))])
def test_rows_of_a_key_without_padding(first, last, rows):
    assert rows_needed(first, last, 9, Patch(3, 0)) == rows


@pytest.mark.compiled
@each(("kernel_size", "padding"), cases.PATCHES)
@each("share", [1, 2, 4])
def test_bands_are_bit_equal_to_the_whole(kernel_size, padding, share):
    query, key = torch.randn(2, 5, 9, 11), torch.randn(1, 5, 13, 8)
    options = {"kernel_size": kernel_size, "padding": padding}
    grid = 13 + 2 * padding - kernel_size + 1
    ends = sorted({0, grid // share, grid // 2, grid - 1, grid})
    whole = search(query, key, **options)
    score, index = search_in_bands(query, key, ends, **options)
    assert torch.equal(score, whole.score) and torch.equal(index, whole.index)


@each("ends", [[0, 7], [0, 1, 7], [0, 3, 4, 7], list(range(8))])
def test_ties_masks_and_nan(ends):
    query, key = cases.integers(2, 3, 6, 5).float(), cases.integers(2, 3, 7, 6).float()
    key[:, :, 4:] = key[:, :, :3]
    query[0, 1, 2, 2] = torch.nan
    mask = torch.rand(2, 7, 6) < 0.4
    mask[:, 2:4] = False  # a band without a key
    mask[:, 0, 0] = True
    whole = search(query, key, key_mask=mask)
    score, index = search_in_bands(query, key, ends, key_mask=mask)
    assert torch.equal(index[~whole.score.isnan()], whole.index[~whole.score.isnan()])
    torch.testing.assert_close(score, whole.score, rtol=0, atol=0, equal_nan=True)


def test_a_band_with_a_nan_spoils_the_whole():
    query, key = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 7, 6)
    key[0, 0, 5, 3] = torch.nan
    score, index = search_in_bands(query, key, [0, 2, 4, 7])
    assert score.isnan().all()
    assert torch.equal(index, search(query, key).index)
