"""Triton search by algorithm: in the interpreter, or on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from tests import cases
from tests.checks import assert_same_choice
from ttsr_fast import Match, reference, search
from ttsr_fast.kernels import direct, rolled, slab, tile_configs
from ttsr_fast.kernels import search as kernels
from ttsr_fast.kernels.argmax import encode
from ttsr_fast.kernels.precision import precision_for
from ttsr_fast.kernels.tile_configs import TileConfig
from ttsr_fast.operators.patch import Patch, Score

# NumPy's warnings in the interpreter: a query without a key in a tile, and an overflowing square.
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply"),
]
each = pytest.mark.parametrize
every_algorithm = each("algorithm", kernels.ALGORITHMS)
PRECISIONS = ("fp32", "tf32", "fp16x3", "fp16", "bf16")
SHAPES = (
    "one_pixel",
    "one_key",
    "one_query",
    "rows",
    "row_column",
    "primes",
    "batch_of_one_key",
    "tile_129",
)
SMALL = TileConfig(16, 16, 4, 2)


@pytest.fixture(autouse=True)
def _all_in_triton(monkeypatch):
    """Triton alone; `test_gpu.py` and `test_cuda_slab.py` test the kernel of the CUDA library."""
    monkeypatch.setattr(slab, "has_cuda_kernel", lambda x: False)


def run(
    algorithm,
    query,
    key,
    mask=None,
    *,
    kernel_size=3,
    padding=1,
    normalize="both",
    eps=1e-12,
    add_eps=False,
    precision="fp32",
    tile=None,
):
    shrink = kernel_size - 1 - 2 * padding
    n, _, h, w = query.shape
    score = query.new_empty(n, h - shrink, w - shrink, dtype=torch.float32)
    index = torch.empty_like(score, dtype=torch.int64)
    options = (Patch(kernel_size, padding), Score(normalize, eps, add_eps))
    plan = kernels.Plan(precision, algorithm, tile)
    for launch in kernels.stages(query, key, mask, (score, index), *options, plan).values():
        launch()
    return Match(score, index)


def maps(query=(2, 20, 7, 11), key=(2, 20, 6, 13), name="signed"):
    return (cases.FEATURES[name](*size) for size in (query, key))


@every_algorithm
@each("name", SHAPES)
def test_shapes(algorithm, name):
    query, key = (torch.randn(size) for size in cases.SEARCH_SHAPES[name])
    assert_same_choice(run(algorithm, query, key), query, key)


@every_algorithm
@each("precision", PRECISIONS)
@each("name", ["signed", "after_relu"])
def test_precisions(algorithm, precision, name):
    query, key = maps(name=name)
    match = run(algorithm, query, key, precision=precision)
    assert_same_choice(match, query, key, precision=precision)


@every_algorithm
@each("dtype", cases.HALF_DTYPES, ids=str)
def test_16_bit_features_are_multiplied_as_they_are(algorithm, dtype):
    query, key = (x.to(dtype) for x in maps())
    assert_same_choice(run(algorithm, query, key, precision="fp32"), query, key)


@each("masked", [False, True], ids=["all_keys", "masked"])
@each(("kernel_size", "padding"), cases.PATCHES)
def test_patches(kernel_size, padding, masked):
    query, key = maps((1, 3, 8, 9), (1, 3, 9, 8))
    options = {"kernel_size": kernel_size, "padding": padding}
    grid = [n + 2 * padding - kernel_size + 1 for n in key.shape[2:]]
    mask = torch.rand(1, *grid) < 0.3 if masked else None
    match = run("direct", query, key, mask, normalize="key", **options)
    assert_same_choice(match, query, key, mask, normalize="key", **options)


@every_algorithm
@each("normalize", cases.NORMALIZATIONS)
@each(("padding", "masks"), [(0, 0), (0, 2), (1, 1)])
def test_options(algorithm, normalize, padding, masks):
    query, key = maps((2, 3, 7, 8), (1, 3, 6, 9))
    options = {"padding": padding, "normalize": normalize}
    grid = (masks, 6 - 2 + 2 * padding, 9 - 2 + 2 * padding)
    mask = torch.rand(grid) < 0.4 if masks else None
    match = run(algorithm, query, key, mask, precision="fp16x3", **options)
    key, mask = (x if x is None else x.expand(2, *x.shape[1:]) for x in (key, mask))
    assert_same_choice(match, query, key, mask, precision="fp16x3", **options)


@each("algorithm", ["rolled", "direct"])
@each("precision", ["fp32", "fp16x3"])
def test_tails_of_tiles(algorithm, precision):
    query, key = maps((1, 70, 3, 17), (1, 70, 4, 19))
    match = run(algorithm, query, key, precision=precision, tile=SMALL)
    assert_same_choice(match, query, key, precision=precision)


def small_blocks(monkeypatch, leading=64, rows=28):
    """Several strips and blocks in small maps."""
    monkeypatch.setattr(slab, "QUERY_WIDTH", 6)
    monkeypatch.setattr(slab, "KEY_WIDTH", 5)
    monkeypatch.setattr(slab, "LEADING", leading)
    monkeypatch.setattr(slab, "RING_BYTES", rows * 4 * leading)


@each("programs", [1, 1000])
def test_direct_with_splits(monkeypatch, programs):
    monkeypatch.setattr(direct, "PROGRAMS", programs)
    query, key = maps((1, 4, 3, 11), (1, 4, 9, 13))
    assert_same_choice(run("direct", query, key, tile=SMALL), query, key)


@each("descriptors", [False, True])
@each("lazy", [False, True])
@each("algorithm", ["rolled", "direct"])
def test_target_features(monkeypatch, algorithm, lazy, descriptors):
    monkeypatch.setattr(tile_configs, "has_descriptors", lambda: descriptors)
    monkeypatch.setattr(tile_configs, "lazy", lambda: lazy)
    if descriptors and tile_configs.target() == "sm_80":
        return
    query, key = maps((1, 4, 5, 9), (1, 4, 4, 11))
    assert_same_choice(run(algorithm, query, key, tile=SMALL), query, key)


@every_algorithm
@each("precision", ["fp32", "fp16x3", "bf16"])
def test_ties_of_integers(monkeypatch, algorithm, precision):
    """Across tiles, diagonals, splits and blocks, with exact sums."""
    small_blocks(monkeypatch)
    query, key = cases.integers(1, 2, 4, 5), cases.integers(1, 2, 6, 21)
    score, index = reference.search(query, key, normalize="none")
    match = run(algorithm, query, key, normalize="none", precision=precision, tile=SMALL)
    assert torch.equal(match.score, score) and torch.equal(match.index, index)


@every_algorithm
@each("precision", ["fp32", "fp16x3"])
def test_first_of_identical_patches_wins(monkeypatch, algorithm, precision):
    small_blocks(monkeypatch)
    patch = torch.randn(1, 5, 3, 3)
    query, key = maps((1, 5, 3, 5), (1, 5, 8, 21))
    places = [(6, 17), (6, 2), (1, 15)]  # descending
    query[..., 1:4] = patch
    for y, x in places:
        key[..., y - 1 : y + 2, x - 1 : x + 2] = patch
        match = run(algorithm, query, key, precision=precision, tile=SMALL)
        assert match.index[0, 1, 2].item() == y * 21 + x
    assert_same_choice(match, query, key, precision=precision)


@every_algorithm
@each("precision", ["fp32", "fp16x3", "fp16"])
@each("factor", [1e-9, 1e9])
def test_magnitudes(algorithm, precision, factor):
    """Images of very different magnitude in one batch."""
    query, key = maps((2, 20, 4, 5), (2, 20, 5, 6), name="after_relu")
    query[1] *= factor
    key[0] *= factor
    match = run(algorithm, query, key, precision=precision)
    assert_same_choice(match, query, key, precision=precision)


@each("precision", ["fp16x3", "fp16"])
def test_huge_feature_has_no_effect_on_the_scale(precision):
    """Its own patches count as non-finite."""
    query, key = maps((1, 4, 5, 9), (1, 4, 5, 6))
    clean = run("direct", query, key, precision=precision)
    query[0, 1, 2, 0] = 1e20
    match = run("direct", query, key, precision=precision)
    assert torch.equal(match.index[..., 3:], clean.index[..., 3:])
    assert match.score[0, 1:4, :2].isnan().all() and not match.score[..., 3:].isnan().any()


def test_zeros_of_both_signs_are_equal():
    scores, indices = torch.tensor([0.0, -0.0]), torch.tensor([7, 3], dtype=torch.int32)
    words = torch.empty(2, dtype=torch.int64)
    _encode[(1,)](scores, indices, words, BLOCK=2)
    assert words[1] > words[0], "the lower index wins"


@triton.jit
def _encode(p_score, p_index, p_word, BLOCK: tl.constexpr):
    o_i = tl.arange(0, BLOCK)
    tl.store(p_word + o_i, encode(tl.load(p_score + o_i), tl.load(p_index + o_i)))


@every_algorithm
@each("precision", ["fp32", "fp16x3", "fp16"])
@each("add_eps", [False, True])
def test_eps_and_zeros(algorithm, add_eps, precision):
    query, key = torch.randn(1, 3, 5, 6), torch.randn(1, 3, 6, 7) * torch.rand(1, 1, 6, 7)
    query[..., :4, :4] = 0
    options = {"eps": 2.0, "add_eps": add_eps, "precision": precision}
    match = run(algorithm, query, key, **options)
    assert_same_choice(match, query, key, **options)
    assert match.score[0, :3, :3].eq(0).all() and match.index[0, :3, :3].eq(0).all()
    zeros = torch.zeros_like(key)
    match = run(algorithm, query, zeros, add_eps=add_eps, precision=precision)
    assert match.score.eq(0).all() and match.index.eq(0).all()


@every_algorithm
@each(
    ("precision", "bad"),
    [("fp32", float("nan")), ("fp32", float("-inf")), ("fp16x3", float("inf"))],
)
def test_not_finite(algorithm, precision, bad):
    query, key = maps((2, 3, 5, 7), (2, 3, 6, 8))
    mask = torch.ones(2, 6, 8, dtype=torch.bool)
    mask[:, 0] = mask[1, 1:4, 2:5] = False
    clean = run(algorithm, query, key, mask, precision=precision)
    query[0, 1, 2, 4] = bad
    key[1, 2, 2, 3] = bad
    match = run(algorithm, query, key, mask, precision=precision)
    touched = torch.zeros(2, 5, 7, dtype=torch.bool)
    touched[0, 1:4, 3:6] = True
    assert torch.equal(match.score.isnan(), touched)
    assert match.index[touched].eq(8).all(), "the first allowed key"
    assert torch.equal(match.index[~touched], clean.index[~touched]), (
        "a masked key has no influence"
    )
    torch.testing.assert_close(match.score[~touched], clean.score[~touched], rtol=0, atol=1e-6)
    match = run(algorithm, query, key, precision=precision)
    assert match.score[1].isnan().all()
    assert match.index[1].eq(1 * 8 + 2).all(), "the first key patch with the feature"


@every_algorithm
def test_all_keys_masked(algorithm):
    """The kernels accept it: a check would synchronise."""
    query, key = maps((2, 3, 4, 5), (2, 3, 3, 4))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1] = False
    match = run(algorithm, query, key, mask)
    assert not match.score[0].isnan().any() and match.score[1].isnan().all()
    assert match.index[1].eq(0).all()


@each("layout", cases.LAYOUTS)
def test_layouts(layout):
    query, key = (cases.LAYOUTS[layout](x) for x in maps((2, 6, 5, 4), (2, 6, 4, 6)))
    assert_same_choice(run("direct", query, key), query, key)
    match = run("direct", query, key, precision="fp16x3")
    assert_same_choice(match, query, key, precision="fp16x3")


@each(
    ("precision", "dtype", "algorithm", "launches"),
    [
        ("fp16", torch.float16, "direct", 3),
        ("bf16", torch.float32, "direct", 3),
        ("fp16", torch.float32, "direct", 4),  # the largest feature sets the scale
        ("fp16", torch.float16, "rolled", 4),
        ("fp32", torch.float32, "slab", 13),  # two images in a product
    ],
)
def test_launches_at_training_size(monkeypatch, precision, dtype, algorithm, launches):
    query, key = (torch.randn(9, 1, 40, 40).to(dtype) for _ in range(2))
    started = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append(grid)

    for launcher, name in (
        (kernels.pack, "amax_kernel"),
        (kernels.pack, "pack_kernel"),
        (kernels.key_scale, "key_scale_kernel"),
        (kernels.direct_search, "direct_search_kernel"),
        (rolled.rolled_search, "rolled_search_kernel"),
        (slab.search_block, "slab_search_kernel"),
        (kernels.rescore, "rescore_kernel"),
    ):
        monkeypatch.setitem(launcher.__globals__, name, Kernel())
    monkeypatch.setattr(slab, "multiply", lambda *arguments: started.append("product"))
    run(algorithm, query, key, precision=precision)
    assert len(started) == launches


@every_algorithm
def test_stages_can_be_repeated(algorithm):
    query, key = maps((1, 4, 5, 7), (1, 4, 6, 5))
    score, index = torch.empty(1, 5, 7), torch.empty(1, 5, 7, dtype=torch.int64)
    options = (Patch(3, 1), Score("both", 1e-12, False), kernels.Plan("fp16x3", algorithm))
    stages = kernels.stages(query, key, None, (score, index), *options)
    assert [*stages][-2:] == [algorithm, "rescore"]
    for stage in stages.values():
        stage()
        stage()
    assert_same_choice(Match(score, index), query, key, precision="fp16x3")


def test_as_a_backend():
    query, key = (x.requires_grad_() for x in maps((1, 8, 5, 6), (1, 8, 6, 5)))
    options = {"key_mask": torch.rand(1, 6, 5) < 0.7}
    results = []
    for backend in ("triton", "reference"):
        match = search(query, key, backend=backend, **options)
        grads = torch.autograd.grad((match.score * match.score.detach()).sum(), (query, key))
        results.append((*match, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_compiles_without_a_break():
    query, key = maps((1, 4, 4, 5), (1, 4, 5, 4))
    compiled = torch.compile(
        lambda q, k: search(q, k, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for ours, expected in zip(compiled(query, key), search(query, key), strict=True):
        torch.testing.assert_close(ours, expected)


def test_pytorch_settings_are_left_alone():
    """A setting of its own, and a setting inherited from another."""
    query, key = maps((1, 4, 5, 6), (1, 4, 5, 6))
    setting, general = torch.backends.cuda.matmul, torch.backends
    before = setting.fp32_precision, general.fp32_precision
    try:
        setting.fp32_precision = "tf32"
        assert_same_choice(run("slab", query, key), query, key)
        assert_same_choice(search(query, key, backend="torch"), query, key)
        assert setting.fp32_precision == "tf32"
        setting.fp32_precision, general.fp32_precision = "none", "tf32"
        assert_same_choice(run("slab", query, key), query, key)
        general.fp32_precision = "ieee"
        assert setting.fp32_precision == "ieee"
    finally:
        setting.fp32_precision, general.fp32_precision = before


def test_settings_during_products():
    setting = torch.backends.cuda.matmul
    precisions = {name: precision_for(torch.float32, name) for name in PRECISIONS}
    before = setting.fp32_precision, setting.allow_fp16_accumulation
    try:
        setting.fp32_precision, setting.allow_fp16_accumulation = "tf32", True
        with slab.matmul_precision(precisions["fp32"]):
            assert setting.fp32_precision == "ieee" and setting.allow_fp16_accumulation
        with slab.matmul_precision(precisions["fp16x3"]):
            assert not setting.allow_fp16_accumulation
        with slab.matmul_precision(precisions["bf16"]):
            assert setting.fp32_precision == "tf32" and setting.allow_fp16_accumulation
        assert setting.fp32_precision == "tf32" and setting.allow_fp16_accumulation
    finally:
        setting.fp32_precision, setting.allow_fp16_accumulation = before


def test_rolled_reads_by_descriptor_if_available():
    rows = next(maps()).permute(0, 2, 3, 1).reshape(-1, 20)
    packed = type("Packed", (), {"rows": rows})
    assert rolled._rows(packed, 16, 4, False) is rows
    assert rolled._rows(packed, 16, 4, True).block_shape == [16, 4]
