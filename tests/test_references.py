"""Several references: one maximum over all of them, and patches from where it lies."""

import pytest
import torch

from tests import cases
from ttsr_fast import gather_fold, reference, search
from ttsr_fast.references import gather_fold_references, search_references

each = pytest.mark.parametrize
SIZES = [(7, 9), (12, 4), (1, 1), (5, 20)]


def make_keys(batch=1, channels=5, dtype=torch.float32):
    return [torch.randn(batch, channels, h, w).to(dtype) for h, w in SIZES]


def best_of_oracles(query, keys, masks=None):
    """Score, index and number of the first best, by the oracle of each reference."""
    masks = masks or [None] * len(keys)
    found = [
        reference.search(query.double(), key.double(), mask)
        for key, mask in zip(keys, masks, strict=True)
    ]
    scores, indices = (torch.stack([match[i] for match in found]) for i in (0, 1))
    best, number = scores.max(0)
    return best, indices.gather(0, number[None])[0], number


@each("band", [None, 1, 3, 100])
@each("batch", [1, 2])
def test_one_maximum_over_all(backend, band, batch):
    query, keys = torch.randn(2, 5, 8, 10), make_keys(batch)
    match = search_references(query, keys, band=band, backend=backend)
    score, index, number = best_of_oracles(query, keys)
    torch.testing.assert_close(match.score.double(), score, atol=1e-6, rtol=0)
    assert torch.equal(match.index, index) and torch.equal(match.reference, number)
    assert len(number.unique()) == len(keys)


def test_equal_scores_go_to_the_first_reference_and_its_lowest_index():
    key = cases.integers(1, 3, 4, 5).float()
    keys = [key.clone(), torch.cat((key, key), 3), key.clone()]
    keys[0][:, :, 2] = 0
    match = search_references(key, keys)
    alone = [search(key, k) for k in keys]
    first = torch.stack([m.score for m in alone]).max(0).indices
    assert torch.equal(match.reference, first) and match.reference.max() == 1
    chosen = torch.stack([m.index for m in alone]).gather(0, first[None])[0]
    assert torch.equal(match.index, chosen)


def test_masks_and_a_reference_that_is_barred():
    query, keys = torch.randn(1, 5, 8, 10), make_keys()
    masks = [torch.zeros(1, 7, 9, dtype=torch.bool), torch.rand(1, 12, 4) < 0.3, None, None]
    masks[1][0, 0, 0] = True
    match = search_references(query, keys, key_masks=masks, band=2)
    score, index, number = best_of_oracles(query, keys, masks)
    torch.testing.assert_close(match.score.double(), score, atol=1e-6, rtol=0)
    assert torch.equal(match.index, index) and torch.equal(match.reference, number)
    assert not (match.reference == 0).any()
    with pytest.raises(ValueError, match="key_masks must leave at least one key position True"):
        search_references(query, keys[:1], key_masks=masks[:1])


def test_nan_in_any_reference_spoils_all_and_in_a_query_its_patches():
    query, keys = torch.randn(1, 5, 8, 10), make_keys()
    query[0, 0, 4, 4] = torch.nan
    score = search_references(query, keys).score
    assert torch.equal(score.isnan(), search(query, keys[0]).score.isnan())
    keys[2][0, 1] = torch.nan
    assert search_references(query, keys).score.isnan().all()


@each("dtype", cases.DTYPES, ids=str)
@each("stride", [1, 2, 4])
def test_patches_come_from_where_the_match_is(backend, stride, dtype):
    values = [torch.randn(1, 3, stride * h + 1, stride * w).to(dtype) for h, w in SIZES]
    number = torch.randint(4, (2, 6, 7))
    sizes = torch.tensor([h * w for h, w in SIZES])
    if stride == 1:  # its spare row is one of positions
        sizes = torch.tensor([(h + 1) * w for h, w in SIZES])
    index = (torch.rand(number.shape, dtype=torch.float64) * sizes[number]).long()
    weight = torch.rand(number.shape)
    out = gather_fold_references(
        values, index, number, weight=weight, stride=stride, backend=backend
    )
    expected = sum(
        reference.gather_fold(
            value.double(),
            index * (number == n),
            weight.double() * (number == n),
            stride=stride,
        )
        for n, value in enumerate(values)
    )
    assert out.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 2e-2)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_one_reference_is_the_plain_operation():
    query, key = torch.randn(1, 5, 8, 10), torch.randn(1, 5, 7, 9)
    match, plain = search_references(query, [key], band=2), search(query, key)
    assert torch.equal(match.score, plain.score) and torch.equal(match.index, plain.index)
    out = gather_fold_references([key], match.index, match.reference)
    assert torch.equal(out, gather_fold(key, plain.index))


def test_gradients():
    query = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    keys = [torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for size in SIZES[:3]]
    assert torch.autograd.gradcheck(
        lambda q, *k: search_references(q, k, band=2).score, (query, *keys)
    )
    match = search_references(query, keys)
    assert torch.autograd.gradcheck(
        lambda *v: gather_fold_references(v, match.index, match.reference), tuple(keys)
    )


@each(
    ("change", "message"),
    [
        ({"keys": []}, "keys must hold at least one reference"),
        ({"band": 0}, "band must be at least 1 row, got 0"),
        ({"key_masks": [None]}, "key_masks must hold one for each of 2 keys, got 1"),
        ({"keys": [torch.zeros(1, 5, 3, 3), torch.zeros(1, 4, 3, 3)]}, r"keys\[1\]: key must have"),
        ({"keys": [torch.zeros(1, 5, 3, 3), torch.zeros(5, 3, 3)]}, r"keys\[1\]: key must be \[N"),
        ({"keys": [torch.zeros(1, 5, 3, 3), "x.png"]}, r"keys\[1\]: key must be a float64"),
        (
            {"key_masks": [None, torch.ones(1, 2, 3) > 0]},
            r"keys\[1\]: its mask must be \[1 or",
        ),
    ],
)
def test_bad_input_names_the_reference(change, message):
    arguments = {"keys": [torch.zeros(1, 5, 3, 3)] * 2} | change
    with pytest.raises((ValueError, TypeError), match=message):
        search_references(torch.zeros(1, 5, 4, 4), **arguments)


def test_bad_numbers_of_references():
    index, values = torch.zeros(1, 2, 2, dtype=torch.int64), [torch.zeros(1, 3, 4, 4)] * 2
    for number in (-1, 2):
        with pytest.raises(ValueError, match=r"reference must lie in \[0, 2\), got"):
            gather_fold_references(values, index, index + number)
    with pytest.raises(ValueError, match=r"reference must have the shape \[1, 2, 2\] of index"):
        gather_fold_references(values, index, index[:, 0])
    with pytest.raises(ValueError, match="values must hold at least one"):
        gather_fold_references([], index, index)
