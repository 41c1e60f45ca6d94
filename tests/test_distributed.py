"""Search and transfer over processes: bit-equal to one process, however the rows are shared out."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests import cases
from tests.checks import assert_same_choice
from tests.processes import assert_same, fold_rows, pair, search_rows
from ttsr_fast import gather_fold, search
from ttsr_fast.distributed import Shard, search_sharded, shard_rows, sharded
from ttsr_fast.references import search_references

pytestmark = pytest.mark.xdist_group("processes")  # which are started once
each = pytest.mark.parametrize


# --- the search ---


def search_alone(query, key):
    """In a group of one, and in that of another."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = search_sharded(query, key, key.shape[2], group=groups[dist.get_rank()])
    with pytest.raises(RuntimeError, match="not in the group"):
        search_sharded(query, key, key.shape[2], group=groups[dist.get_rank() - 1])
    return alone


@each(
    ("height", "kernel_size", "padding", "of_two", "of_three"),
    [
        (7, 3, 1, "0 3 0 4, 3 7 2 7", "0 2 0 3, 2 4 1 5, 4 7 3 7"),
        (7, 3, 0, "0 2 0 4, 2 5 2 7", "0 1 0 3, 1 3 1 5, 3 5 3 7"),
        (9, 7, 3, "0 4 0 7, 4 9 1 9", "0 3 0 6, 3 6 0 9, 6 9 3 9"),
        (2, 3, 1, "0 1 0 2, 1 2 0 2", "0 0 0 0, 0 1 0 2, 1 2 0 2"),
        (3, 3, 0, "0 0 0 0, 0 1 0 3", "0 0 0 0, 0 0 0 0, 0 1 0 3"),
    ],
)
def test_rows(processes, height, kernel_size, padding, of_two, of_three):
    texts = {2: of_two, 3: of_three}[processes.size].split(", ")
    expected = [Shard(*map(int, text.split())) for text in texts]
    options = {"kernel_size": kernel_size, "padding": padding}
    assert processes.run(call, shard_rows, height, options) == expected


def call(function, argument, options):
    return function(argument, **options)


@each(
    ("shard", "rows"),
    [(Shard(0, 3, 0, 4), (0, 16)), (Shard(3, 7, 2, 7), (8, 31)), (Shard(0, 0, 0, 0), (0, 0))],
)
def test_rows_beyond_the_key_belong_to_its_end(shard, rows):
    assert shard.of_value(31, 4) == rows


@each("shapes", cases.SEARCH_SHAPES.values(), ids=cases.SEARCH_SHAPES)
def test_search(three, shapes):
    assert_same(three, *(torch.randn(shape) for shape in shapes))


@each("dtype", [torch.float32, torch.float64], ids=str)
@each("shapes", ["primes", "batch_of_one_key", "channels_257", "two_tiles"])
def test_backends(processes, backend, shapes, dtype):
    query, key = (torch.randn(shape, dtype=dtype) for shape in cases.SEARCH_SHAPES[shapes])
    assert_same(processes, query, key, backend=backend)


@each("masked", [False, True], ids=["all_keys", "masked"])
@each(("kernel_size", "padding"), cases.PATCHES)
def test_patches(two, kernel_size, padding, masked):
    query, key = torch.randn(2, 3, 9, 11), torch.randn(2, 3, 10, 8)
    grid = [n + 2 * padding - kernel_size + 1 for n in key.shape[2:]]
    mask = torch.rand(2, *grid) < 0.3 if masked else None
    assert_same(two, query, key, key_mask=mask, kernel_size=kernel_size, padding=padding)


@each("normalize", cases.NORMALIZATIONS)
def test_normalizations(processes, backend, normalize):
    query, key = torch.randn(2, 3, 9, 11), torch.randn(2, 3, 10, 8)
    assert_same(processes, query, key, normalize=normalize, backend=backend)


def test_ties(processes, backend):
    query, key = cases.integers(2, 2, 6, 5), cases.integers(2, 2, 9, 6)
    key[:, :, 3:6] = key[:, :, :3]
    key[:, :, 6:] = key[:, :, :3]
    assert_same(processes, query, key, backend=backend, exact=True)
    assert_same(processes, query, torch.zeros_like(key), backend=backend, exact=True)


def test_both_zeros_are_equal(processes):
    """Scores of about -1e-30 and then, as their products underflow, -0, -0, 0, 0, 0."""
    query = torch.full((1, 1, 1, 2), -1e-30)
    key = torch.tensor([1.0, 1e-30, 1e-30, -1e-30, -1e-30, -1e-30]).view(1, 1, 6, 1)
    options = {"kernel_size": 1, "normalize": "none"}
    for score, index in processes.run(search_rows, query, key, options):
        assert score.tolist() == [[[0.0, 0.0]]]
        assert index.tolist() == [[[1, 1]]]


def test_a_share_that_is_masked_whole(processes, backend):
    query, key = torch.randn(2, 3, 4, 5), -torch.rand(2, 3, 9, 6)
    mask = torch.zeros(2, 9, 6, dtype=torch.bool)
    mask[0, 8, 5] = mask[1, 4, 2] = True
    mask[1, 0, 1] = True
    assert_same(processes, query, key, key_mask=mask, backend=backend)


@each("dtype", [torch.float32, torch.float64], ids=str)
@each("place", ["query", "first row", "last rows", "both", "masked"])
def test_not_a_number(processes, place, dtype):
    query, key = torch.randn(2, 3, 5, 6, dtype=dtype), torch.randn(2, 3, 9, 7, dtype=dtype)
    mask = torch.ones(2, 9, 7, dtype=torch.bool)
    mask[:, 0, :3] = False
    if place in ("query", "both"):
        query[0, 1, 2, 3] = torch.nan
    if place == "first row":
        key[1, 2, 0, 5] = torch.nan
    if place in ("last rows", "both"):
        key[0, 0, 8, 1] = key[0, 0, 6, 4] = torch.nan
    if place == "masked":
        key[0, 0, 8, 1] = torch.nan
        mask[0, 7:, :3] = False
    assert_same(processes, query, key, key_mask=mask)


@each("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(processes, backend, bad):
    query, key = torch.randn(2, 3, 5, 6), torch.randn(2, 3, 9, 7)
    key[0, 0, 8, 1] = key[0, 0, 6, 4] = query[1, 2, 0, 0] = bad
    assert_same(processes, query, key, backend=backend)


@each("dtype", cases.HALF_DTYPES, ids=str)
def test_features_of_16_bits(three, backend, dtype):
    query, key = torch.randn(2, 9, 6, 5).to(dtype), torch.randn(1, 9, 7, 8).to(dtype)
    assert_same(three, query, key, precision="fp32", backend=backend)


def test_choices_by_rounded_features(two):
    query, key = torch.randn(2, 64, 6, 5), torch.randn(1, 64, 9, 8)
    options = {"precision": "bf16"}
    whole = search(query, key, **options)
    for match in two.run(search_rows, query, key, options):
        assert_same_choice(match, query, key, precision="bf16")
        assert match.score.ge(whole.score - 1e-6).all()


@each("layout", cases.LAYOUTS)
def test_layouts(two, layout):
    query, key = (cases.LAYOUTS[layout](torch.randn(2, 6, 9, 7)) for _ in range(2))
    assert_same(two, query, key)


def test_a_bank_of_references(processes):
    """Stacked with a row of zeros between two, which is masked; see docs/reference-bank.md."""
    query, pictures = torch.randn(2, 3, 6, 7), torch.randn(4, 1, 3, 5, 8)
    key = F.pad(pictures, [0, 0, 0, 1]).movedim(0, 2).flatten(2, 3)[:, :, :-1]
    mask = torch.ones(1, 23, 8, dtype=torch.bool)
    mask[:, 5::6] = False
    alone = search_references(query, list(pictures))
    for score, index in processes.run(search_rows, query, key, {"key_mask": mask}):
        torch.testing.assert_close(score, alone.score)
        assert torch.equal(index // (6 * 8), alone.reference)
        assert torch.equal(index % (6 * 8), alone.index)


def test_an_empty_batch(processes):
    assert_same(processes, torch.randn(0, 3, 5, 4), torch.randn(1, 3, 7, 6))


def test_a_group_of_one(processes):
    query, key = pair()
    whole = search(query, key)
    for score, index in processes.run(search_alone, query, key):
        assert torch.equal(score, whole.score) and torch.equal(index, whole.index)


@each("dtype", [torch.float32, torch.float64], ids=str)
def test_integers_in_the_order_of_scores(dtype):
    limits = torch.finfo(dtype)
    numbers = [-torch.inf, limits.min, -1.0, -limits.tiny, 0.0, limits.tiny, 1.0, limits.max]
    score = torch.tensor([*numbers, torch.inf, torch.nan], dtype=dtype)
    ordered = sharded._ordered(score)
    assert ordered.diff().gt(0).all()
    assert torch.equal(sharded._ordered(-score[4:5]), ordered[4:5])
    assert torch.equal(sharded._ordered(-score[-1:]), ordered[-1:])
    back = sharded._scores(ordered, dtype)
    torch.testing.assert_close(back, score, rtol=0, atol=0, equal_nan=True)


# --- the transfer ---


def assert_folded(processes, value, index, **options):
    whole = gather_fold(value, index, **options)
    tolerance = 2 * torch.finfo(value.dtype).eps * processes.size
    for out in processes.run(fold_rows, value, index, options):
        assert out.dtype == value.dtype
        error = (out - whole).abs().max() / whole.abs().max()
        assert error <= tolerance, f"off by {error:.1e}"


@each("shapes", cases.TRANSFER_SHAPES.values(), ids=cases.TRANSFER_SHAPES)
def test_transfer(three, shapes):
    size, grid, stride = shapes
    value, index = torch.randn(size), cases.random_index(size, grid, stride)
    assert_folded(three, value, index, stride=stride)


@each("weighted", [False, True], ids=["unweighted", "weighted"])
@each(("kernel_size", "padding"), cases.PATCHES)
def test_transfer_of_patches(two, kernel_size, padding, weighted):
    size, stride = (2, 3, 19, 21), 2  # a row and a column beyond the key map
    index = cases.random_index(size, (2, 9, 8), stride, kernel_size, padding)
    options = {"kernel_size": kernel_size, "padding": padding, "stride": stride}
    options["weight"] = torch.randn(2, 9, 8) if weighted else None
    assert_folded(two, torch.randn(size), index, **options)


@each("dtype", [torch.float32, torch.float64], ids=str)
@each("divisor", cases.DIVISORS)
def test_transfer_backends(processes, backend, divisor, dtype):
    size = (2, 5, 31, 26)
    value, index = torch.randn(size, dtype=dtype), cases.random_index(size, (2, 8, 9), 4)
    assert_folded(processes, value, index, stride=4, divisor=divisor, backend=backend)


@each("process", [0, -1])
def test_transfer_from_one_process_is_bit_equal(processes, backend, process):
    value, stride = torch.randn(1, 3, 31, 26), 4
    shard = processes.run(shard_rows, 7)[process]
    index = torch.randint(shard.first * 6, shard.last * 6, (2, 8, 9))
    whole = gather_fold(value, index, stride=stride, backend=backend)
    for out in processes.run(fold_rows, value, index, {"stride": stride, "backend": backend}):
        assert torch.equal(out, whole)


def test_an_infinite_value_is_not_spread(processes):
    value, index = torch.randn(1, 2, 9, 6), torch.randint(54, (1, 8, 7))
    value[:, :, [0, 8]] = torch.inf
    whole = gather_fold(value, index)
    assert whole.isfinite().any() and not whole.isfinite().all()
    for out in processes.run(fold_rows, value, index):
        torch.testing.assert_close(out, whole, rtol=1e-6, atol=1e-6)


@each("dtype", cases.HALF_DTYPES, ids=str)
def test_transfer_of_16_bits_is_rounded_once(processes, dtype):
    """Whole numbers, whose sums are exact until then."""
    value, index = cases.integers(1, 5, 9, 6, dtype=dtype) * 333, torch.randint(54, (2, 8, 7))
    whole = gather_fold(value, index, divisor="none")
    for out in processes.run(fold_rows, value, index, {"divisor": "none"}):
        assert out.dtype == dtype and torch.equal(out, whole)
