"""The oracle itself, against numbers worked out by hand and against loops over single pixels."""

import math

import pytest
import torch
from torch import Tensor

from tests import cases, checks
from tests.checks import assert_no_worse, assert_same_choice
from ttsr_fast import Match, reference

SIZES = {
    "square": ((2, 2, 4, 4), (2, 2, 4, 4)),
    "unequal": ((2, 3, 4, 5), (1, 3, 3, 6)),
    "row_column": ((1, 1, 1, 7), (1, 1, 7, 1)),
}


def pixel(x: Tensor, c: int, y: int, column: int) -> float:  # [C, H, W]
    """One feature; zero outside the map."""
    inside = 0 <= y < x.shape[1] and 0 <= column < x.shape[2]
    return x[c, y, column].item() if inside else 0.0


def patch(x: Tensor, y: int, column: int, size: int, padding: int) -> list[float]:
    """The numbers of the patch whose first pixel, in the padded map, is (y, column)."""
    span = range(-padding, size - padding)
    channels = range(x.shape[0])
    return [pixel(x, c, y + a, column + b) for c in channels for a in span for b in span]


def positions(x: Tensor, size: int, padding: int) -> list[tuple[int, int]]:
    rows, columns = (n + 2 * padding - size + 1 for n in x.shape[1:])
    return [(y, column) for y in range(rows) for column in range(columns)]


def divided(numbers: list[float], norm_wanted: bool, eps: float) -> list[float]:
    norm = max(math.sqrt(sum(v * v for v in numbers)), eps) if norm_wanted else 1.0
    return [v / norm for v in numbers]


def search_by_loops(
    query: Tensor,  # [C, H, W]
    key: Tensor,  # [C, HK, WK]
    size: int,
    padding: int,
    normalize: str,
    eps: float,
) -> list[tuple[float, int]]:
    """For every query patch the score of the best key patch and its position."""
    keys = [
        divided(patch(key, *at, size, padding), normalize != "none", eps)
        for at in positions(key, size, padding)
    ]
    results = []
    for at in positions(query, size, padding):
        numbers = divided(patch(query, *at, size, padding), normalize == "both", eps)
        scores = [sum(a * b for a, b in zip(numbers, other, strict=True)) for other in keys]
        results.append((max(scores), scores.index(max(scores))))
    return results


def transfer_by_loops(
    value: Tensor,  # [C, HV, WV]
    index: Tensor,  # [H, W]
    weight: Tensor,  # [H, W]
    stride: int,
    size: int,
    padding: int,
) -> Tensor:  # [C, stride*H', stride*W']
    """The weighted patches added where they fall, not divided yet."""
    key_columns = value.shape[2] // stride + 2 * padding - size + 1
    grid = [n + size - 1 - 2 * padding for n in index.shape]
    out = torch.zeros(value.shape[0], *(n * stride for n in grid), dtype=value.dtype)
    span = range(-padding * stride, (size - padding) * stride)
    for y, x in ((y, x) for y in range(index.shape[0]) for x in range(index.shape[1])):
        key_y, key_x = divmod(int(index[y, x]), key_columns)
        for c, a, b in ((c, a, b) for c in range(value.shape[0]) for a in span for b in span):
            to_y, to_x = y * stride + a, x * stride + b
            if 0 <= to_y < out.shape[1] and 0 <= to_x < out.shape[2]:
                taken = pixel(value, c, key_y * stride + a, key_x * stride + b)
                out[c, to_y, to_x] += float(weight[y, x]) * taken
    return out


def patches_met(
    index: Tensor,  # [H, W]
    size: tuple[int, int],
    stride: int,
    kernel_size: int,
    padding: int,
) -> Tensor:  # size
    """How many patches meet at every output pixel."""
    count = torch.zeros(size, dtype=torch.float64)
    side = kernel_size * stride
    for y, x in ((y, x) for y in range(index.shape[0]) for x in range(index.shape[1])):
        top, left = (y - padding) * stride, (x - padding) * stride
        count[max(top, 0) : top + side, max(left, 0) : left + side] += 1
    return count


def test_search_by_hand():
    query = torch.tensor([[[[1.0, 0.0, 2.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[2.0, 0.0, 0.0, 1.0]]]], dtype=torch.float64)
    score, index = reference.search(query, key)
    # Patches in row order of the middle row, the others are zero:
    #   query (0,1,0) (1,0,2) (0,2,0)   key (0,2,0) (2,0,0) (0,0,1) (0,1,0)
    assert index.tolist() == [[[0, 2, 0]]]
    expected = torch.tensor([[[1.0, 2 / math.sqrt(5), 1.0]]], dtype=torch.float64)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-15)

    score, index = reference.search(query, key, normalize="none")
    assert (score.tolist(), index.tolist()) == ([[[2.0, 2.0, 4.0]]], [[[0, 1, 0]]])
    score, index = reference.search(query, key, normalize="key")
    assert (score.tolist(), index.tolist()) == ([[[1.0, 2.0, 2.0]]], [[[0, 2, 0]]])


def test_gather_fold_by_hand():
    value = torch.tensor([[[[9.0, 18.0, 36.0]]]], dtype=torch.float64)
    out = reference.gather_fold(value, torch.tensor([[[2, 0, 1]]]))
    # Patches (18,36,0) (0,9,18) (9,18,36), each one step further right; sums 36+0, 0+9+9, 18+18.
    assert out.tolist() == [[[[4.0, 2.0, 4.0]]]]
    out = reference.gather_fold(value, torch.tensor([[[2, 0, 1]]]), divisor="overlap")
    assert out.tolist() == [[[[18.0, 6.0, 18.0]]]]
    out = reference.gather_fold(
        value, torch.tensor([[[2, 0, 1]]]), torch.tensor([[[1.0, 0.5, 2.0]]]), divisor="none"
    )
    assert out.tolist() == [[[[36.0, 22.5, 45.0]]]]


@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize(
    ("name", "kernel_size", "padding"),
    [
        *(("square", k, p) for k, p in [(1, 0), (3, 0), (3, 1), (5, 1)]),
        *(("unequal", k, p) for k, p in [(1, 0), (3, 0), (3, 1), (5, 1)]),
        *(("row_column", k, p) for k, p in [(1, 0), (3, 1), (5, 2)]),
    ],
)
def test_search_equals_loops(name, kernel_size, padding, normalize):
    sizes = SIZES[name]
    query, key = (torch.randn(size, dtype=torch.float64) for size in sizes)
    options = {"padding": padding, "normalize": normalize, "eps": 1e-12}
    score, index = reference.search(query, key, kernel_size=kernel_size, **options)
    for n in range(len(query)):
        expected = search_by_loops(query[n], key[n % len(key)], kernel_size, **options)
        assert index[n].flatten().tolist() == [best for _, best in expected]
        expected_score = torch.tensor([best for best, _ in expected], dtype=torch.float64)
        torch.testing.assert_close(score[n].flatten(), expected_score, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("kernel_size", "padding"), [(1, 0), (3, 0), (3, 1), (5, 2)])
@pytest.mark.parametrize(
    ("size", "stride"),
    [((1, 2, 5, 4), 1), ((2, 1, 10, 12), 2), ((1, 1, 13, 15), 2), ((1, 1, 23, 21), 4)],
    ids=["level_3", "level_2", "odd_reference_level_2", "odd_reference_level_1"],
)
def test_gather_fold_equals_loops(size, stride, kernel_size, padding):
    value = torch.randn(size, dtype=torch.float64)
    index = cases.random_index(size, (2, 4, 5), stride, kernel_size, padding)
    weight = torch.rand(index.shape, dtype=torch.float64)
    options = {"stride": stride, "kernel_size": kernel_size, "padding": padding}
    total = torch.stack(
        [
            transfer_by_loops(value[n % len(value)], index[n], weight[n], *options.values())
            for n in range(2)
        ]
    )
    count = patches_met(index[0], total.shape[2:], *options.values())
    divisors = {"area": kernel_size**2, "overlap": count, "none": 1}
    for divisor, by in divisors.items():
        out = reference.gather_fold(value, index, weight, divisor=divisor, **options)
        torch.testing.assert_close(out, total / by, rtol=0, atol=1e-13)


def test_odd_reference_is_read_beyond_the_key_grid():
    value = torch.zeros(1, 1, 7, 7)
    value[..., 6, 6] = 9.0  # row and column 6 lie beyond the 3 x 3 key grid of stride 2
    out = reference.gather_fold(value, torch.full((1, 1, 1), 8), stride=2)
    assert out.tolist() == [[[[0.0, 0.0], [0.0, 0.0]]]]
    out = reference.gather_fold(value, torch.full((1, 2, 2), 8), stride=2)
    assert out.nonzero().tolist() == [[0, 0, 2, 2]] and out[0, 0, 2, 2] == 1.0


def test_zero_patch_scores_zero():
    query, key = torch.randn(1, 2, 6, 6), torch.randn(1, 2, 5, 5)
    query[..., :3, :3] = 0  # the patches at (0..1, 0..1) are zero
    key[..., :3] = 0
    score, index = reference.search(query, key)
    assert score[0, :2, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert index[0, :2, :2].tolist() == [[0, 0], [0, 0]]
    score, _ = reference.search(query, torch.zeros_like(key))
    assert not score.any()


def test_norm_below_eps_and_eps_added():
    query = torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64)
    score, _ = reference.search(query, query * 3, eps=0.5)
    assert score.item() == pytest.approx(0.2 / 0.5 * 1.0)
    score, _ = reference.search(query, query * 3, eps=0.5, add_eps=True)
    assert score.item() == pytest.approx(0.2 / (0.2 + 0.5) * 0.6 / (0.6 + 0.5))


def test_ties_go_to_the_lowest_index():
    score, index = reference.search(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 40, 40))
    assert index[0, 1, 1] == 41, "the first key patch that is not cut by the border"
    assert score[0, 1, 1].item() == pytest.approx(1.0)


def test_mask_excludes_keys():
    query, key = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 5, 5)
    _, best = reference.search(query, key)
    mask = torch.ones(1, 25, dtype=torch.bool)
    mask[0, best[0, 1, 1]] = False
    score, index = reference.search(query, key, mask.view(1, 5, 5))
    assert mask[0, index].all()
    allowed = mask[0].nonzero().flatten()
    results = search_by_loops(query[0], key[0], 3, 1, "both", 1e-12)
    assert index[0, 1, 1] != best[0, 1, 1] and score[0, 1, 1] < results[5][0]
    assert set(index.flatten().tolist()) <= set(allowed.tolist())


def test_checks_refuse_wrong_answers():
    query, key = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 4, 7)
    score, index = reference.search(query, key)
    mask = torch.ones(1, 4, 7, dtype=torch.bool)
    assert_same_choice(Match(score, index), query, key, mask)
    mask.view(-1)[index[0, 2, 3]] = False
    wrong = {
        "score is off": Match(score + 3e-6, index),
        "a better key was missed": Match(*reference.search(query, key, mask)),
    }
    for message, match in wrong.items():
        with pytest.raises(AssertionError, match=message):
            assert_same_choice(match, query, key)
    with pytest.raises(AssertionError, match="masked key"):
        assert_same_choice(Match(score, index), query, key, mask)

    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    baseline = exact.float() + torch.tensor([0.0, 1e-4])
    assert_no_worse(exact.float() - 1.9e-4, exact, baseline)
    with pytest.raises(AssertionError, match="is allowed"):
        assert_no_worse(exact.float() - 2.1e-4, exact, baseline)


@pytest.mark.parametrize("divisor", cases.DIVISORS)
@pytest.mark.parametrize("batch", [1, 2])
def test_transposes_of_the_backend_are_the_gradients(batch, divisor):
    size = (batch, 2, 11, 9)
    value = torch.randn(size, dtype=torch.float64, requires_grad=True)
    index = cases.random_index(size, (2, 3, 4), 2)
    weight = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    out = reference.gather_fold(value, index, weight, stride=2, divisor=divisor)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (value, weight), grad)
    ops, options = torch.ops.ttsr_fast, ([2], 3, 1, divisor, "reference")
    (actual,) = ops.gather_fold_adjoint([grad], index, weight, list(size), *options)
    torch.testing.assert_close(actual, expected[0], rtol=0, atol=1e-12)
    actual = ops.gather_dot([value], [grad], index, *options)
    torch.testing.assert_close(actual, expected[1], rtol=0, atol=1e-12)
    assert torch.equal(
        checks.adjoint(grad, index, weight, list(size), stride=2, divisor=divisor), expected[0]
    )
    assert torch.equal(checks.dot(value, grad, index, stride=2, divisor=divisor), expected[1])


def test_search_transfer_is_the_two_operations():
    query, key = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 5, 3)
    value = [torch.randn(2, 3, 5 * s + s // 2, 3 * s) for s in (1, 2, 4)]
    score, *textures = reference.search_transfer(query, key, value[2], value[1], value[0])
    expected_score, index = reference.search(query, key)
    assert torch.equal(score[:, 0], expected_score)
    for texture, v, stride in zip(textures, value, (1, 2, 4), strict=True):
        assert torch.equal(texture, reference.gather_fold(v, index, stride=stride))
        assert texture.shape == (2, 3, 3 * stride, 4 * stride)
