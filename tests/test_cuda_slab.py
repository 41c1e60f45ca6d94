"""The slab search of the CUDA library on the CPU, emulated thread by thread (see `emulated`)."""

import pytest
import torch

from tests import cases
from tests.checks import assert_same_choice
from tests.test_kernels import maps, run
from ttsr_fast import Match, reference
from ttsr_fast.kernels import operands, slab_search
from ttsr_fast.kernels import search as kernels

each = pytest.mark.parametrize
pytestmark = [
    pytest.mark.usefixtures("cuda"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
]


@pytest.fixture
def cuda(emulator, monkeypatch):
    """Loop and kernel of the CUDA library, with a CPU version of PyTorch's widening product."""
    monkeypatch.setattr(slab_search, "has_cuda_kernel", lambda x: True)
    monkeypatch.setattr(slab_search, "box_max", None)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("bmm.dtype_out", widening_product, "CPU")
        yield


def widening_product(a, b, dtype, *, out):
    return out.copy_(torch.bmm(a.to(dtype), b.to(dtype)))


@each("keys", [4, 8])
@each("precision", ["fp32", "fp16x3", "bf16"])
@each("name", ["one_pixel", "row_column", "primes", "batch_of_one_key"])
def test_shapes(monkeypatch, name, precision, keys):
    monkeypatch.setattr(slab_search, "KEYS", keys)
    query, key = (torch.randn(size) for size in cases.SEARCH_SHAPES[name])
    match = run("slab", query, key, precision=precision)
    assert_same_choice(match, query, key, precision=precision)


@each("rows", [1, 3, 100])
@each("together", [1, 2])
def test_strips_blocks_and_runs(monkeypatch, together, rows):
    """Overlapping blocks, several warps for one row offset, several images in one product."""
    monkeypatch.setattr(slab_search, "ROWS", rows)
    monkeypatch.setattr(slab_search, "QUERY_WIDTH", 6)
    monkeypatch.setattr(slab_search, "KEY_WIDTH", 10)
    height = {1: 600, 2: 7}[together]  # more lines than a block has, or all in one
    monkeypatch.setattr(slab_search, "RING_BYTES", 60 * 4 * 4096)
    query, key = maps((2, 2, height, 5), (2, 2, 7, 19))
    blocks = slab_search.Blocks(
        *slab_search.layouts(query.shape[2:], key.shape[2:]), images=len(query)
    )
    assert blocks.together == together and blocks.key_rows == 3 and blocks.key.strips == 2
    assert_same_choice(run("slab", query, key), query, key)


@each("garbage", [float("inf"), 3.4e38, float("nan")])
@each(("query", "key"), [((2, 3, 5, 7), (2, 3, 6, 8)), ((1, 3, 5, 70), (1, 3, 6, 70))])
def test_unwritten_memory_has_no_effect(monkeypatch, query, key, garbage):
    """The ring is uninitialised, and the kernel reads columns that no product wrote."""
    query, key = maps(query, key)
    ring = slab_search.Blocks.ring
    monkeypatch.setattr(
        slab_search.Blocks, "ring", lambda self, like: ring(self, like).fill_(garbage)
    )
    n, _, h, w = query.shape
    guarded = torch.full((n * h * w + 128,), 7)
    best = guarded[64:-64].view(n, h, w)
    empty_like = torch.empty_like
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "empty_like", lambda x: best if x.dtype == torch.int64 else empty_like(x)
        )
        score, index = torch.empty(n, h, w), torch.zeros(n, h, w, dtype=torch.int64)
        options = (3, 1, "both", 1e-12, False, "fp32")
        kernels.search(query, key, None, score, index, *options, algorithm="slab")
    assert guarded[:64].eq(7).all() and guarded[-64:].eq(7).all()
    assert_same_choice(Match(score, index), query, key)


@each("order", [0, 1, 7])
def test_ties_in_any_order_of_threads(emulator, order):
    query, key = cases.integers(1, 2, 4, 5), cases.integers(1, 2, 6, 70)
    score, index = reference.search(query, key, normalize="none")
    emulator.emulator_set_order(order)
    try:
        match = run("slab", query, key, normalize="none")
    finally:
        emulator.emulator_set_order(0)
    assert torch.equal(match.score, score) and torch.equal(match.index, index)


@each("bad", [float("nan"), float("inf")])
def test_masked_and_not_finite(bad):
    query, key = maps((2, 3, 5, 7), (2, 3, 6, 8))
    query[0, 1, 2, 4] = key[1, 2, 2, 3] = bad
    mask = torch.rand(2, 6, 8) < 0.5
    mask[1, 1:4, 2:5] = False
    mask[0] = False
    match = run("slab", query, key, mask)
    assert match.score[0].isnan().all(), "no key is allowed"
    assert_same_choice(
        type(match)(match.score[1:], match.index[1:]),
        *(query[1:], key[1:].nan_to_num(0, 0), mask[1:]),
    )


def arguments():
    """Arguments of the operator, for two images."""
    query, key = maps((2, 3, 5, 7), (1, 3, 6, 8))
    how = operands.operands(torch.float32, "fp32")
    q, k = (
        kernels.allocate(x, layout, how)
        for x, layout in zip((query, key), slab_search.layouts((5, 7), (6, 8)), strict=True)
    )
    blocks = slab_search.Blocks(q.layout, k.layout, 2)
    scale = torch.full((1, 1, 6, 64), float("nan"))
    best = torch.zeros(2, 5, 7, dtype=torch.int64)
    ring = blocks.ring(q.square)
    return list(slab_search.cuda_arguments(q, k, scale, best, ring, how, blocks))


WRONG = {
    "type of the query": (0, lambda x: x.half(), "same type"),
    "rows of the query": (0, lambda x: x[:20], "query must be contiguous, with"),
    "columns of the key": (1, lambda x: x[:, :32].contiguous(), "same type and at least"),
    "dimensions of the key": (1, lambda x: x[0], "key must be contiguous"),
    "type of the scale": (2, lambda x: x.double(), "scale must be float32"),
    "slots of the scale": (2, lambda x: x[..., :8].contiguous(), "scale must be float32"),
    "odd slots": (2, lambda x: x[..., :63].contiguous(), "scale must be float32"),
    "rows of the scale": (2, lambda x: x[:, :, 1:].contiguous(), "scale must be float32"),
    "type of the best": (3, lambda x: x.int(), "best must be int64"),
    "dimensions of the best": (3, lambda x: x[0], "best must be int64"),
    "layout of the best": (3, lambda x: x.mT, "best must be int64"),
    "size of the ring": (4, lambda x: x[:40], "the ring must be float32"),
    "width of the ring": (4, lambda x: x.view(-1, 2048), "the ring must be float32"),
    "images of the key": (5, lambda n: 3, "one key or one for each image"),
    "depth": (6, lambda n: 65, "at least `depth` columns"),
    "no depth": (6, lambda n: 0, "at least `depth` columns"),
    "images together": (7, lambda n: 3, "too many images together"),
    "no images together": (7, lambda n: 0, "too many images together"),
    "stride of an image": (8, lambda n: n * 2**40, "too many images together"),
    "odd stride of an image": (8, lambda n: n + 1, "a multiple of 4"),
    "numbers of a layout": (9, lambda x: x[:5], "must have 6 numbers, got 5"),
    "rows of a block": (9, lambda x: [*x[:5], 6], "invalid layout of query"),
    "line of queries": (9, lambda x: [*x[:4], 9, x[5]], "a multiple of 4"),
    "narrow line": (10, lambda x: [*x[:4], 9, x[5]], "invalid layout of key"),
    "no strips": (10, lambda x: [*x[:2], 0, *x[3:]], "invalid layout of key"),
    "huge strips": (10, lambda x: [*x[:2], 2**62, *x[3:]], "invalid layout of key"),
    "keys of a thread": (11, lambda n: 16, "4 or 8 keys"),
    "rows of a walk": (12, lambda n: 0, "a warp at least one row"),
}


@each("operator", ["cuda_slab_search", "cuda_slab_argmax"])
@each("name", WRONG)
def test_arguments_are_checked(operator, name):
    place, change, message = WRONG[name]
    given = arguments()
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.ttsr_fast, operator)(*given)
