"""`certified`: never wrong, and of use."""

import pytest
import torch

from tests import cases
from ttsr_fast import Match, certified, reference, search

each = pytest.mark.parametrize


@pytest.mark.compiled
@each("precision", ["fp16", "bf16"])
@each("name", ["signed", "after_relu", "small", "large"])
def test_a_certified_choice_is_the_exact_one(precision, name):
    query, key = (cases.FEATURES[name](2, 24, *size) for size in ((21, 22), (19, 25)))
    match = search(query, key, precision=precision, backend="cpp")
    _, exact = reference.search(query.double(), key.double())
    certain = certified(query, key, match, precision=precision)
    assert certain.dtype == torch.bool and certain.shape == exact.shape
    assert match.index[certain].equal(exact[certain])
    assert certain.float().mean() > (0.8 if precision == "fp16" else 0.2)


def test_of_a_wrong_choice_none_is_certified():
    """The second best key of every query, by a margin that bfloat16 blurs."""
    query, key = torch.randn(1, 16, 9, 10), torch.randn(1, 16, 8, 11)
    first = search(query, key)
    mask = torch.ones(1, 8, 11, dtype=torch.bool)
    for position in first.index.unique():
        mask.view(-1)[position] = False
    second = search(query, key, key_mask=mask)
    assert not certified(query, key, second, precision="bf16").any()
    allowed = certified(query, key, second, precision="fp16", key_mask=mask)
    assert allowed.float().mean() > 0.5, "among the keys that are left it is the best"


def test_equal_keys_are_not_certain():
    query, key = torch.randn(1, 8, 6, 7), torch.randn(1, 8, 3, 9).repeat(1, 1, 3, 1)
    match = search(query, key, padding=0, precision="fp16")
    assert not certified(query, key, match, padding=0, precision="fp16").any()


def test_the_only_key_is_certain():
    query, key = torch.rand(1, 8, 6, 7) + 0.1, torch.rand(1, 8, 1, 1) + 0.1
    match = search(query, key, precision="bf16")
    assert certified(query, key, match, precision="bf16").all()


def test_features_of_16_bits_are_exact():
    """Nothing is rounded, so only near-ties are left in doubt."""
    query, key = (torch.randn(1, 32, 12, n).half() for n in (13, 14))
    certain = certified(query, key, search(query, key), precision="fp16")
    assert certain.all()


def test_zeros_and_nan():
    query, key = torch.randn(1, 4, 7, 8), torch.randn(1, 4, 6, 9)
    key[..., :4, :4] = 0
    query[..., :3, :3] = 0
    query[0, 0, 5, 6] = float("nan")
    match = search(query, key, precision="fp16")
    certain = certified(query, key, match, precision="fp16")
    assert not certain[0, :2, :2].any() and not certain[0, 4:7, 5:8].any()
    assert certain.float().mean() > 0.5


def test_one_key_for_a_batch_in_blocks(monkeypatch):
    query, key = torch.randn(3, 8, 9, 7), torch.randn(1, 8, 11, 10)
    match = search(query, key, precision="fp16")
    whole = certified(query, key, match, precision="fp16")
    monkeypatch.setattr("ttsr_fast.operators.pytorch.SLAB_BYTES", 5000)
    assert certified(query, key, match, precision="fp16").equal(whole)
    apart = [
        certified(query[n : n + 1], key, Match(*(x[n : n + 1] for x in match)), precision="fp16")
        for n in range(3)
    ]
    assert torch.cat(apart).equal(whole) and whole.any()


def test_bad_arguments():
    query, key = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 4, 5)
    match = search(query, key)
    with pytest.raises(ValueError, match="precision must be one of .*fp16.*, got 'fp32'"):
        certified(query, key, match, precision="fp32")
    with pytest.raises(ValueError, match=r"match must have the query grid \[1, 3, 4\], got"):
        certified(query, key, match, precision="fp16", padding=0)


def test_autocast_does_not_round_the_proof():
    query, key = torch.rand(1, 32, 24, 24), torch.rand(1, 32, 24, 24)
    match = search(query, key, precision="bf16")
    expected = certified(query, key, match, precision="fp16")
    with torch.autocast(query.device.type, torch.bfloat16):
        assert certified(query, key, match, precision="fp16").equal(expected)


def test_a_query_without_a_score_is_not_certain():
    query, key = torch.rand(1, 4, 5, 6), torch.rand(1, 4, 5, 6)
    score, index = search(query, key, precision="fp16")
    lost = Match(torch.full_like(score, float("nan")), index)
    assert certified(query, key, Match(score, index), precision="fp16").any()
    assert not certified(query, key, lost, precision="fp16").any()
