"""`search` against the oracle: choices, scores, gradients, on every backend."""

import pytest
import torch

from tests import cases
from tests.checks import assert_same_choice
from ttsr_fast import reference, search
from ttsr_fast.operators import pytorch


def features(shapes, name="signed", dtype=torch.float32):
    return [cases.FEATURES[name](*size, dtype=torch.float64).to(dtype) for size in shapes]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shapes", cases.SEARCH_SHAPES.values(), ids=cases.SEARCH_SHAPES)
def test_shapes_and_dtypes(backend, shapes, dtype):
    query, key = features(shapes, dtype=dtype)
    assert_same_choice(search(query, key, backend=backend), query, key)


@pytest.mark.parametrize("name", ["after_relu", "negative", "small", "large"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_features(backend, normalize, name):
    query, key = features(((2, 64, 9, 11), (2, 64, 12, 7)), name)
    match = search(query, key, normalize=normalize, backend=backend)
    assert_same_choice(match, query, key, normalize=normalize)


def test_more_query_patches_than_are_kept_at_a_time(backend):
    query, key = features(((1, 1, 265, 2000), (1, 1, 2, 3)))
    assert_same_choice(search(query, key, backend=backend), query, key)


def test_all_scores_negative(backend):
    query, key = torch.rand(1, 3, 6, 7) + 0.1, -torch.rand(1, 3, 5, 9) - 0.1
    match = search(query, key, backend=backend)
    assert (match.score < 0).all()
    assert_same_choice(match, query, key)


@pytest.mark.parametrize("masked", [False, True], ids=["all_keys", "masked"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize(("kernel_size", "padding"), cases.PATCHES)
def test_options(backend, kernel_size, padding, normalize, masked):
    query, key = features(((2, 3, 9, 11), (2, 3, 10, 17)))
    options = {"kernel_size": kernel_size, "padding": padding, "normalize": normalize}
    grid = [n + 2 * padding - kernel_size + 1 for n in key.shape[2:]]
    mask = torch.rand(2, *grid) < 0.3 if masked else None
    match = search(query, key, key_mask=mask, backend=backend, **options)
    assert_same_choice(match, query, key, mask, **options)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(backend, layout, dtype):
    query, key = (
        cases.LAYOUTS[layout](x) for x in features(((2, 6, 9, 7), (2, 6, 5, 10)), dtype=dtype)
    )
    assert_same_choice(search(query, key, backend=backend), query, key)


@pytest.mark.parametrize("masks", [1, 3])
def test_one_key_for_a_batch(backend, masks):
    query, key = features(((3, 4, 5, 6), (3, 4, 7, 5)))
    mask = torch.rand(masks, 7, 5) < 0.5
    together = search(query, key[:1], key_mask=mask[:1], backend=backend)
    expanded = search(query, key[:1].expand_as(key), key_mask=mask, backend=backend)
    assert_same_choice(together, query, key[:1], mask[:1])
    assert_same_choice(expanded, query, key[:1].expand_as(key), mask)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("key_batch", [1, 7])
@pytest.mark.parametrize("size", [6, 24])
def test_images_of_a_batch_do_not_depend_on_one_another(
    backend, size, key_batch, threads, set_threads
):
    """Whether a thread takes whole images, or all threads each image."""
    set_threads(threads)
    query, key = features(((7, 4, size, size), (key_batch, 4, size, size + 1)))
    query[3, 0, 2, 2] = float("nan")
    for mask in (None, torch.rand(key_batch, size, size + 1) < 0.5):
        together = search(query, key, key_mask=mask, backend=backend)
        for n in range(7):
            own = slice(n, n + 1) if key_batch > 1 else slice(None)
            of_mask = None if mask is None else mask[own]
            alone = search(query[n : n + 1], key[own], key_mask=of_mask, backend=backend)
            assert torch.equal(together.index[n], alone.index[0])
            torch.testing.assert_close(
                together.score[n], alone.score[0], rtol=0, atol=1e-6, equal_nan=True
            )


def test_single_allowed_key(backend):
    query, key = features(((1, 3, 5, 6), (1, 3, 9, 40)))
    for only in (0, 39, 40, 359):
        mask = torch.zeros(1, 9, 40, dtype=torch.bool)
        mask.view(-1)[only] = True
        match = search(query, key, key_mask=mask, backend=backend)
        assert match.index.eq(only).all()
        assert_same_choice(match, query, key, mask)


@pytest.mark.parametrize("slab_bytes", [1, 3000, 20000])
def test_torch_backend_in_blocks(monkeypatch, slab_bytes):
    monkeypatch.setattr(pytorch, "SLAB_BYTES", slab_bytes)
    query, key = cases.integers(1, 2, 9, 7), cases.integers(1, 2, 8, 23)
    match = search(query, key, normalize="none", backend="torch")
    assert torch.equal(match.index, reference.search(query, key, normalize="none")[1])
    assert_same_choice(match, query, key, normalize="none")


@pytest.mark.parametrize("precision", ["fp32", "fp16x3", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize("name", ["signed", "after_relu"])
def test_precision(backend, precision, normalize, name):
    query, key = features(((1, 32, 13, 14), (1, 32, 17, 12)), name)
    match = search(query, key, precision=precision, normalize=normalize, backend=backend)
    assert_same_choice(match, query, key, precision=precision, normalize=normalize)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", cases.HALF_DTYPES, ids=str)
def test_precision_of_16_bit_inputs(backend, dtype, precision):
    query, key = features(((1, 32, 13, 14), (1, 32, 17, 12)), dtype=dtype)
    match = search(query, key, precision=precision, backend=backend)
    assert_same_choice(match, query, key, precision=precision)


def test_autocast_lowers_the_precision(backend):
    query, key = features(((1, 32, 12, 13), (1, 32, 11, 14)))
    expected = search(query, key, precision="bf16", backend=backend)
    with torch.autocast(query.device.type, torch.bfloat16):
        match = search(query, key, backend=backend)
        exact = search(query, key, precision="fp32", backend=backend)
        mixed = search(query.bfloat16(), key, backend=backend)
    assert match.score.dtype == torch.float32
    assert torch.equal(match.score, expected.score) and torch.equal(match.index, expected.index)
    assert_same_choice(match, query, key, precision="bf16")
    assert_same_choice(exact, query, key)
    assert_same_choice(mixed, query.bfloat16().float(), key, precision="bf16")


def test_float32_matmul_precision_is_not_followed(backend):
    query, key = features(((1, 64, 12, 13), (1, 64, 11, 14)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert_same_choice(search(query, key, backend=backend), query, key)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 9, 131), (2, 1, 33, 17), (1, 5, 3, 257)], ids=str)
def test_ties_of_integers(backend, shape, dtype):
    query = cases.integers(2, shape[1], 6, 19, dtype=dtype)
    key = cases.integers(*shape, dtype=dtype)
    score, index = reference.search(query.double(), key.double(), normalize="none")
    match = search(query, key, normalize="none", backend=backend)
    assert torch.equal(match.score.double(), score)
    assert torch.equal(match.index, index)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_first_of_identical_patches_wins(backend, normalize, dtype):
    """The same patch in the first and last row and column, across tiles, rows and threads."""
    places = [(7, 5), (7, 124), (7, 127), (7, 130), (7, 255), (20, 2), (36, 254)]
    patch = cases.integers(1, 4, 3, 3, dtype=dtype) * 8
    patch[..., 1, 1] = 31
    content = cases.integers(1, 4, 39, 259, dtype=dtype)
    query = cases.integers(1, 4, 5, 40, dtype=dtype)
    for x in (1, 18, 38):
        query[..., 1:4, x - 1 : x + 2] = patch
    for first in range(len(places)):
        key = content.clone()
        for y, x in places[first:]:
            key[..., y - 1 : y + 2, x - 1 : x + 2] = patch
        match = search(query, key, normalize=normalize, backend=backend)
        y, x = places[first]
        assert match.index[0, 2, [1, 18, 38]].tolist() == [y * 259 + x] * 3
    assert_same_choice(match, query, key, normalize=normalize)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 64, 256])
def test_black_padded_reference(backend, channels, dtype):
    """Identical pixels right and below of the content; the first patch inside them wins."""
    key = torch.randn(1, channels, 24, 135).to(dtype)
    black = torch.randn(channels, 1, 1).to(dtype)
    key[..., 12:, :] = black
    key[..., 100:] = black
    query = black.expand(1, channels, 5, 12)
    match = search(query, key, backend=backend)
    assert match.index[0, 1:-1, 1:-1].eq(1 * 135 + 101).all()
    assert_same_choice(match, query, key)


def test_zero_patches(backend):
    query, key = torch.rand(1, 3, 7, 8) + 0.1, -torch.rand(1, 3, 9, 11) - 0.1
    query[..., :4, :4] = 0
    match = search(query, key, backend=backend)
    assert match.score[0, :3, :3].eq(0).all() and match.index[0, :3, :3].eq(0).all()
    assert_same_choice(match, query, key)
    mask = torch.ones(1, 9, 11, dtype=torch.bool)
    mask[0, 0] = mask[0, 1, :4] = False
    match = search(query, key, key_mask=mask, backend=backend)
    assert match.index[0, :3, :3].eq(15).all(), "the first key that is not masked"
    key[..., 3:7, 5:9] = 0  # every other key scores below zero
    match = search(query, key, backend=backend)
    assert match.score[0, 5, 5].item() == 0 and match.index[0, 5, 5].item() == 4 * 11 + 6


@pytest.mark.parametrize("add_eps", [False, True])
def test_norm_below_eps(backend, add_eps):
    query, key = 0.1 * torch.randn(1, 3, 6, 7), torch.randn(1, 3, 5, 9) * torch.rand(1, 1, 5, 9)
    for normalize in cases.NORMALIZATIONS:
        options = {"eps": 2.0, "add_eps": add_eps, "normalize": normalize}
        match = search(query, key, backend=backend, **options)
        assert_same_choice(match, query, key, **options)


@pytest.mark.parametrize("masked", [False, True], ids=["all_keys", "masked"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
@pytest.mark.parametrize(("kernel_size", "padding"), cases.PATCHES)
def test_options_with_eps_added(backend, kernel_size, padding, normalize, masked):
    query, key = features(((2, 3, 9, 11), (1, 3, 10, 17)))
    key *= torch.rand(1, 1, 10, 17) ** 4
    options = {"kernel_size": kernel_size, "padding": padding, "normalize": normalize}
    options |= {"eps": 0.3, "add_eps": True}
    grid = [n + 2 * padding - kernel_size + 1 for n in key.shape[2:]]
    mask = torch.rand(1, *grid) < 0.3 if masked else None
    match = search(query, key, key_mask=mask, backend=backend, **options)
    assert_same_choice(match, query, key, mask, **options)


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_precision_with_eps_added(backend, dtype, precision):
    if dtype == torch.float64 and precision is not None:
        return
    query, key = features(((2, 16, 9, 11), (2, 16, 10, 17)), dtype=dtype)
    options = {"precision": precision, "eps": 3.0, "add_eps": True}
    assert_same_choice(search(query, key, backend=backend, **options), query, key, **options)


def test_added_eps_changes_the_choice(backend):
    """From a patch as long as eps with a cosine of 1 to a longer one with a cosine of 0.96."""
    query, key = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 6)
    key[..., :3], key[..., 5] = 1e-5 / 3, 0.5
    options = {"padding": 0, "eps": 1e-5, "backend": backend}
    assert search(query, key, **options).index.item() == 0
    match = search(query, key, add_eps=True, **options)
    assert match.index.item() == 3
    assert match.score.item() == pytest.approx(7.5 / (3 + 1e-5) / (6.75**0.5 + 1e-5), abs=5e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_non_finite_query(backend, bad, precision, normalize):
    query, key = torch.randn(2, 3, 6, 37), torch.randn(2, 3, 5, 9)
    options = {"precision": precision, "normalize": normalize, "backend": backend}
    mask = torch.ones(1, 5, 9, dtype=torch.bool)
    mask[0, 0] = False
    clean = search(query, key, key_mask=mask.expand(2, -1, -1), **options)
    query[1, 2, 3, 16] = bad
    match = search(query, key, key_mask=mask.expand(2, -1, -1), **options)
    touched = torch.zeros(2, 6, 37, dtype=torch.bool)
    touched[1, 2:5, 15:18] = True
    assert torch.equal(match.score.isnan(), touched)
    assert match.index[touched].eq(9).all(), "the first key that is not masked"
    torch.testing.assert_close(match.score[~touched], clean.score[~touched], rtol=0, atol=1e-5)
    assert torch.equal(match.index[~touched], clean.index[~touched])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("normalize", cases.NORMALIZATIONS)
def test_non_finite_key(backend, bad, precision, normalize):
    query, key = torch.randn(2, 3, 6, 37), torch.randn(2, 3, 9, 35)
    options = {"precision": precision, "normalize": normalize, "backend": backend}
    mask = torch.ones(2, 9, 35, dtype=torch.bool)
    mask[1, 4:7, 16:19] = False
    clean = search(query, key, key_mask=mask, **options)
    key[1, 2, 5, 17] = bad
    match = search(query, key, **options)
    assert match.score[1].isnan().all() and not match.score[0].isnan().any()
    assert match.index[1].eq(4 * 35 + 16).all(), "the first key patch that holds it"
    match = search(query, key, key_mask=mask, **options)
    torch.testing.assert_close(match.score, clean.score, rtol=0, atol=1e-5)
    assert torch.equal(match.index, clean.index), "a masked key has no influence"


def test_empty_batch(backend):
    query = torch.randn(0, 3, 5, 6, requires_grad=True)
    key = torch.randn(1, 3, 4, 7, requires_grad=True)
    score, index = search(query, key, backend=backend)
    score.sum().backward()
    assert score.shape == index.shape == (0, 5, 6) and query.grad.shape == query.shape
    assert torch.equal(key.grad, torch.zeros_like(key))


@pytest.mark.parametrize("same_key", [False, True], ids=["any_key", "same_key"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bit_equal_twice_and_on_any_threads(backend, dtype, same_key, set_threads):
    query, key = features(((1, 16, 61, 67), (1, 16, 19, 23)), dtype=dtype)
    mask = None
    if same_key:
        mask = torch.zeros(1, 19, 23, dtype=torch.bool)
        mask[0, 12, 20] = True
    grad_score = torch.randn(1, 61, 67)
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        q, k = (x.clone().requires_grad_() for x in (query, key))
        match = search(q, k, key_mask=mask, backend=backend)
        grads = torch.autograd.grad(match.score, (q, k), grad_score.to(match.score.dtype))
        results.append((*match, *grads))
    for other in results[1:]:
        for name, x, y in zip(("score", "index", "query", "key"), results[0], other, strict=True):
            assert torch.equal(x, y), name


def test_uninitialised_workspace(backend):
    """PyTorch fills every fresh tensor with NaN here, also those of compiled code."""
    query, key = features(((2, 5, 9, 23), (1, 5, 11, 19)))
    expected = search(query, key, backend=backend)
    torch.use_deterministic_algorithms(True)
    try:
        match = search(query, key, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(match.score, expected.score) and torch.equal(match.index, expected.index)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_torch_backend_on_cuda(dtype):
    query, key = features(((2, 64, 13, 17), (1, 64, 11, 19)), dtype=dtype)
    q, k = (x.cuda() for x in (query, key))
    assert_same_choice(search(q, k, backend="torch"), query, key)


@pytest.mark.parametrize(
    ("query_grid", "key_grid"),
    [((530, 520), (2, 3)), ((2, 3), (530, 520)), ((3, 100_000), (1, 3))],
)
def test_more_rows_than_are_packed_at_a_time(backend, query_grid, key_grid):
    """Bands of the C++ search hold at most 2**18 positions."""
    query, key = (torch.randint(-3, 4, (1, 2, *grid)).float() for grid in (query_grid, key_grid))
    mask = torch.rand(1, *key_grid) < 0.5
    mask[:, : key_grid[0] // 2] = False
    mask[:, -1, -1] = True
    for key_mask in (None, mask):
        match = search(query, key, key_mask=key_mask, normalize="none", backend=backend)
        score, index = reference.search(query, key, key_mask, normalize="none")
        assert torch.equal(match.index, index)
        assert torch.equal(match.score, score)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(
    ("others", "value"), [(-1.0, 0.0), (-1.0, -0.5), (0.0, 2e-38), (1.0, float("nan"))]
)
def test_ties_of_special_scores(backend, others, value, flush):
    """In two tiles, the first position in the second one."""
    query, key = torch.ones(1, 2, 8, 8), torch.full((1, 2, 30, 300), others)
    key[0, :, 1, 250] = key[0, :, 3, 5] = value
    torch.set_flush_denormal(flush)
    try:
        index = search(query, key, kernel_size=1, normalize="none", backend=backend).index
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(index, torch.full_like(index, 300 + 250))
