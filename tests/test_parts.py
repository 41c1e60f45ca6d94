"""The search with features in two parts: its choice is exact, by proof or by a second search.

For the instruction set amx. `test_backends` runs these tests with its tile unit in C++, on any
processor with AVX-512.
"""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import cases
from tests.checks import assert_same_choice
from ttsr_fast import reference, search
from ttsr_fast.operators import library

each = pytest.mark.parametrize
# Features of which the search finds the best key in more than one way.
FEATURES = {
    **cases.FEATURES,
    "smooth": lambda *size: F.interpolate(torch.randn(*size[:2], 4, 5), size[2:], mode="bicubic"),
    "sparse": lambda *size: torch.randn(*size) * (torch.rand(size[0], 1, *size[2:]) > 0.7),
    "of many sizes": lambda *size: (
        torch.randn(*size) * 10 ** (12 * torch.rand(1, 1, *size[2:]) - 6)
    ),
    "near zero": lambda *size: 1e-37 * torch.randn(*size),
    "near the largest": lambda *size: 1e17 * torch.randn(*size),
}


@pytest.fixture(autouse=True)
def on_a_tile_unit():
    instruction_set = None
    if library.load_library() is None:
        with suppress(RuntimeError):  # a processor without the one that is named
            instruction_set = library.instruction_set()
    if instruction_set != "amx":
        pytest.skip("for the instruction set amx; test_backends runs this with its tiles in C++")


def found(query: Tensor, key: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, keys, and which of them were proved by the first search."""
    score = torch.empty(len(query), *query.shape[2:])
    index = torch.empty_like(score, dtype=torch.int64)
    certain = torch.full_like(score, 7, dtype=torch.uint8)
    options = (3, 1, True, True, 1e-12, False, False)
    maps = (query, key, mask)
    torch.ops.ttsr_fast.cpp_search(*maps, score, index, *options, certain=certain)
    assert ((certain == 0) | (certain == 1)).all()
    return score, index, certain.bool()


@each("name", FEATURES)
def test_choices_and_proofs(name):
    query, key = FEATURES[name](2, 24, 21, 40), FEATURES[name](2, 24, 30, 53)
    mask = torch.rand(2, 30, 53) > 0.3
    score, index, certain = found(query, key, mask)
    assert_same_choice(search(query, key, key_mask=mask), query, key, mask)
    exact, best = reference.search(query.double(), key.double(), mask)
    if name in cases.FEATURES:
        torch.testing.assert_close(score.double(), exact, atol=1e-6, rtol=0)
        assert certain.float().mean() > 0.99
        assert index[certain].equal(best[certain])


def test_nearly_equal_keys_are_searched_again_where_more_than_candidates():
    query, key = torch.randn(1, 16, 12, 33), torch.randn(1, 16, 14, 37)
    for copies, proved in ((3, True), (5, False)):
        copied = key.repeat(1, 1, copies, 1)
        copied[:, :, ::14] = copied[:, :, 13::14] = 0  # patches of one copy alone
        assert_same_choice(search(query, copied), query, copied)
        _, index, certain = found(query, copied)
        assert (certain.float().mean() > 0.9) == proved
        assert (index < 14 * 37).all(), "the first of equal keys"


def test_uncertain_queries_are_searched_together_and_apart():
    """Some in a row, some alone, in the corners, and all of an image; 9 of 16 rows have none."""
    key = torch.randn(2, 8, 8, 41)
    key = torch.cat([key] * 6, 2)
    query = torch.randn(2, 8, 16, 50)
    query[0, :, ::2, 7:12] = key[0, :, :8, 7:12]
    query[1] = F.pad(key[1, :, :16], [0, 9])
    mask = torch.ones(2, 48, 41, dtype=torch.bool)
    mask[0, 9:] = False  # one copy alone
    for y, x in ((0, 0), (0, 40), (47, 0)):
        mask[0, y, x] = True
    match = search(query, key, key_mask=mask)
    assert_same_choice(match, query, key, mask)
    certain = found(query, key, mask)[2].float().mean((1, 2))
    assert certain[0] > certain[1]


@each("dtype", cases.HALF_DTYPES, ids=str)
def test_16_bits_have_no_third_part(dtype):
    query, key = (torch.randn(1, 40, 13, n).to(dtype) for n in (34, 35))
    assert_same_choice(search(query, key, precision="fp32"), query, key)
    assert found(query, key)[2].all()


@each("layout", cases.LAYOUTS)
def test_scores_are_those_of_the_features_as_given(layout):
    query, key = (cases.LAYOUTS[layout](torch.randn(2, 6, 19, n)) for n in (34, 35))
    for precision in ("fp32", "bf16"):
        assert_same_choice(search(query, key, precision=precision), query, key, precision=precision)


def test_sums_that_overflow_are_left_to_float():
    query, key = 1e18 * torch.randn(1, 8, 9, 33), 1e19 * torch.randn(1, 8, 9, 34)
    assert not found(query, key)[2].any()
    expected = search(query.double(), key.double())
    assert search(query, key).index.eq(expected.index).float().mean() > 0.99


def test_what_is_multiplied():
    maps = (torch.empty(1, 8, 16, 16), torch.empty(1, 8, 48, 48))
    products = torch.ops.ttsr_fast.cpp_bfloat16_products
    assert [products(*maps, bfloat16) for bfloat16 in (False, True)] == [3, 1]
    assert products(*(x.double() for x in maps), False) == 0


def test_nan_and_infinity():
    query, key = torch.randn(1, 5, 12, 33), torch.randn(1, 5, 13, 40)
    query[0, 2, 3, 4], query[0, 1, 8, 30] = float("nan"), float("inf")
    mask = torch.ones(1, 13, 40, dtype=torch.bool)
    key[0, 0, 6, 7] = float("nan")
    mask[0, 5:8, 6:9] = False
    score, _, certain = found(query, key, mask)
    missing = score.isnan()
    assert missing[0, 2:5, 3:6].all() and missing[0, 7:10, 29:32].all() and missing.sum() == 18
    assert certain.all()
    score, index, _ = found(query, key)
    assert score.isnan().all() and index[~missing].eq(5 * 40 + 6).all()


def test_equal_patches_inside_and_at_the_border_tie():
    """Their products are small differences of large terms, which the order of the sum decides."""
    for _ in range(100):
        key = torch.randn(1, 16, 8, 8)
        key[:, :, 3] = 0
        key[:, :, 4:6] = key[:, :, :2]
        mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        mask[0, 0, 4] = mask[0, 4, 4] = True
        patch, query = key[:, :, 3:6, 3:6].double(), torch.randn(1, 16, 3, 3).double()
        query -= (query * patch).sum() / patch.square().sum() * patch
        assert search(query.float(), key, key_mask=mask).index[0, 1, 1] == 4


@each("size", [2.0**-33, 2.0**-60, 2.0**-66])
def test_proofs_hold_where_squares_of_low_parts_underflow(size):
    """The key that two parts prefer is 2.5e-6 worse, the errors of all features add up to more."""
    values = torch.tensor(
        [1.0019607543945312, 1.0019760131835938]
    )  # 2^-17 is left out, up and down
    query = size * values.repeat_interleave(8).view(1, 16, 1, 1)
    ratio = (values[0] / values[1]).double().item() * (1 - 2.5e-6)
    key = -torch.ones(1, 16, 1, 12)
    key[0, :8, 0, 11], key[0, 8:, 0, 11] = 1, 0
    key[0, :8, 0, 0], key[0, 8:, 0, 0] = 0, 1
    key[0, :2, 0, 0] = (4 * (ratio**-2 - 1)) ** 0.5 * torch.tensor([1.0, -1.0])
    match = search(query, key, kernel_size=1, eps=1e-36)
    assert_same_choice(match, query, key, kernel_size=1, eps=1e-36)


@each("side", [0, 1])
def test_features_that_bfloat16_rounds_to_infinity(side):
    maps = [torch.randn(1, 8, 12, n) for n in (33, 34)]
    maps[side][0, 0, 5, 5] = 3.4e38
    maps[1 - side] *= 1e-4
    match, expected = search(*maps), search(*(x.double() for x in maps))
    assert match.index.equal(expected.index)
    torch.testing.assert_close(match.score.double(), expected.score, atol=1e-6, rtol=0)
