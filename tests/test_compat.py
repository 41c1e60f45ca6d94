"""The drop-ins of `ttsr_fast.compat` against their neighbours' formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import cases
from tests.checks import assert_no_worse
from ttsr_fast import SearchTransfer
from ttsr_fast.compat import SearchTransformer, feature_match_index, masa

each = pytest.mark.parametrize
CHOSEN = 1e-6  # how far below the maximum a choice may lie, for patches of norm 1


def unit_pixels(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the callers of `feature_match_index` pass: pixels of norm 1, some of norm 0."""
    x = F.normalize(torch.randn(size, dtype=torch.float64), dim=0)
    x[:, torch.rand(size[1:]) < 0.2] = 0
    x[:, :4, :3] = 0
    return x.to(dtype)


def similarities(
    feat_input: Tensor,  # [C, H, W]
    feat_ref: Tensor,  # [C, HK, WK]
    patch_size: int,
    input_stride: int,
    ref_stride: int,
    is_norm: bool,
    norm_input: bool,
) -> Tensor:  # [Nk, Ho, Wo]
    """Of all pairs of patches, as C2-Matching defines them."""
    _, h, w = feat_input.shape
    grid = ((h - patch_size) // input_stride + 1, (w - patch_size) // input_stride + 1)
    q = F.unfold(feat_input[None], patch_size, stride=input_stride)[0]
    k = F.unfold(feat_ref[None], patch_size, stride=ref_stride)[0]
    if is_norm:
        k = k / (k.norm(dim=0) + 1e-5)
    if norm_input:
        q = q / (q.norm(dim=0) + 1e-5)
    return (k.T @ q).unflatten(1, grid)


def first_maximum(similarity: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """By a running maximum over batches of reference patches, the first of equals."""
    best = torch.full_like(similarity[0], float("-inf"))
    index = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, len(similarity), batch):
        value, where = similarity[start : start + batch].max(dim=0)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, where + start, index)
    return index, best


MATCHES = {
    "one_size": ((16, 11, 13), (16, 11, 13), {}),
    "other_size": ((5, 9, 14), (5, 13, 8), {}),
    "one_patch": ((3, 3, 3), (3, 7, 4), {}),
    "one_channel": ((1, 6, 17), (1, 12, 5), {}),
    "size_1": ((6, 7, 8), (6, 5, 9), {"patch_size": 1}),
    "size_5": ((4, 9, 8), (4, 8, 10), {"patch_size": 5}),
    "size_2": ((4, 9, 8), (4, 7, 10), {"patch_size": 2}),
    "size_8": ((2, 9, 13), (2, 11, 8), {"patch_size": 8}),
    "strides": ((6, 12, 15), (6, 14, 11), {"input_stride": 2, "ref_stride": 3}),
    "input_stride": ((6, 12, 15), (6, 9, 8), {"input_stride": 4, "patch_size": 4}),
    "ref_stride": ((6, 8, 7), (6, 14, 17), {"ref_stride": 2}),
}


@each(("is_norm", "norm_input"), [(True, True), (True, False), (False, True), (False, False)])
@each("dtype", cases.DTYPES, ids=str)
@each(("input_size", "ref_size", "options"), MATCHES.values(), ids=MATCHES)
def test_feature_match_index(backend, input_size, ref_size, options, dtype, is_norm, norm_input):
    x, y = unit_pixels(*input_size, dtype=dtype), unit_pixels(*ref_size, dtype=dtype)
    options = {"is_norm": is_norm, "norm_input": norm_input, **options}
    index, value = feature_match_index(x, y, backend=backend, **options)

    named = {"patch_size": 3, "input_stride": 1, "ref_stride": 1, **options}
    similarity = similarities(x.double(), y.double(), **named)
    _, best = first_maximum(similarity, batch=7)
    chosen = similarity.gather(0, index[None])[0]
    assert index.shape == value.shape == best.shape and index.dtype == torch.int64
    scale = named["patch_size"] ** (2 - is_norm - norm_input)
    assert (best - chosen).le(CHOSEN * scale).all()
    assert value.dtype == dtype
    own = similarities(x, y, **named).gather(0, index[None])[0]
    assert_no_worse(value, chosen, own)


@each("flags", [{"is_norm": False}, {"is_norm": True}, {"is_norm": True, "norm_input": True}])
@each("strides", [(1, 1), (2, 1), (2, 3)])
def test_first_of_equal_patches(backend, flags, strides):
    """Whole numbers, a reference that repeats itself, and batches that end within a repetition."""
    x = cases.integers(3, 9, 11)
    period = cases.integers(3, 6, 6)
    period[:, 0, 0] = x[:, 2, 2] = 0
    y = period.repeat(1, 3, 4)
    y[:, :2] = 0  # equal patches of zeros
    options = {"input_stride": strides[0], "ref_stride": strides[1], **flags}
    index, value = feature_match_index(x, y, backend=backend, **options)
    named = {"patch_size": 3, "norm_input": False, **options}
    expected = first_maximum(similarities(x, y, **named), batch=5)
    if not flags["is_norm"]:
        assert torch.equal(index, expected[0]) and torch.equal(value, expected[1])
    columns = (y.shape[2] - 3) // strides[1] + 1
    top, left = index // columns * strides[1], index % columns * strides[1]
    # Six rows or columns above or to the left lies the same patch, unless that is another one.
    assert (left < 6).all() and (top < 6 + 2).all()
    torch.testing.assert_close(value, expected[1], rtol=1e-5, atol=1e-5)


def test_choice_depends_on_what_is_added(backend):
    """Pixels whose norms are of the order of 1e-5."""
    x, y = 1e-5 * torch.randn(4, 9, 9), 1e-5 * torch.randn(4, 9, 9) * torch.rand(9, 9)
    index, value = feature_match_index(x, y, norm_input=True, backend=backend)
    options = (3, 1, 1, True, True)
    expected = first_maximum(similarities(x.double(), y.double(), *options), batch=20)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close(value, expected[1].float(), rtol=1e-5, atol=1e-7)
    by_cosine = F.normalize(F.unfold(y[None], 3)[0], dim=0).T @ F.unfold(x[None], 3)[0]
    assert not torch.equal(index.flatten(), by_cosine.argmax(0))


@each("layout", ["transposed", "surrounded", "strided", "channels_last", "expanded_rows"])
def test_feature_match_index_of_views(backend, layout):
    x, y = (cases.LAYOUTS[layout](torch.randn(1, 6, *s))[0] for s in ((7, 9), (8, 6)))
    for options in ({}, {"ref_stride": 2}):
        plain = feature_match_index(x.contiguous(), y.contiguous(), backend=backend, **options)
        views = feature_match_index(x, y, backend=backend, **options)
        assert torch.equal(views[0], plain[0])
        torch.testing.assert_close(views[1], plain[1])


@pytest.mark.double
@each(("is_norm", "norm_input"), [(True, True), (True, False), (False, True), (False, False)])
@each("strides", [(1, 1), (2, 2)])
def test_gradient_of_the_similarity(backend, strides, is_norm, norm_input):
    x, y = (unit_pixels(4, *s, dtype=torch.float64).requires_grad_() for s in ((8, 9), (9, 7)))
    options = (3, *strides, is_norm, norm_input)
    index, value = feature_match_index(x, y, *options, backend=backend)
    grad = torch.randn_like(value)
    expected = similarities(x, y, *options).gather(0, index[None])[0]
    pairs = zip(*(torch.autograd.grad(v, (x, y), grad) for v in (value, expected)), strict=True)
    for ours, theirs in pairs:
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_index_becomes_flow(backend):
    """A reference moved by two rows and three columns, as `index_to_flow` reads the result."""
    y = torch.randn(8, 12, 14)
    x = y.roll((-2, -3), (1, 2))
    index, value = feature_match_index(x, y, norm_input=True, backend=backend)
    rows, columns = torch.meshgrid(torch.arange(10), torch.arange(12), indexing="ij")
    flow_y, flow_x = index // 12 - rows, index % 12 - columns
    assert flow_y[:8, :9].eq(2).all() and flow_x[:8, :9].eq(3).all()
    torch.testing.assert_close(value[:8, :9], torch.ones(8, 9))


BAD_MATCHES = {
    "rank": ({"feat_input": torch.zeros(5, 6)}, ValueError, r"feat_input .*\[C, H, W\]"),
    "none": ({"feat_ref": None}, TypeError, "feat_ref must be a floating.* got NoneType"),
    "integers": ({"feat_ref": torch.zeros(3, 5, 6).int()}, TypeError, "feat_ref .*torch.int32"),
    "empty": ({"feat_input": torch.zeros(0, 5, 6)}, ValueError, r"feat_input .*\[0, 5, 6\]"),
    "small": ({"feat_ref": torch.zeros(3, 2, 6)}, ValueError, r"feat_ref .*3x3, got \[3, 2, 6\]"),
    "channels": (
        {"feat_ref": torch.zeros(2, 5, 6)},
        ValueError,
        "feat_ref .*channels of feat_input",
    ),
    "dtype": ({"feat_ref": torch.zeros(3, 5, 6).half()}, TypeError, "key .*dtype torch.float32"),
    "size": ({"patch_size": 0}, ValueError, "patch_size must be a positive integer, got 0"),
    "float": ({"patch_size": 3.0}, ValueError, r"patch_size .*got 3\.0"),
    "input_stride": ({"input_stride": 0}, ValueError, "input_stride .*got 0"),
    "ref_stride": ({"ref_stride": -1}, ValueError, "ref_stride .*got -1"),
    "precision": ({"precision": "fp8"}, ValueError, "precision .*'fp8'"),
}


@each(("change", "error", "message"), BAD_MATCHES.values(), ids=BAD_MATCHES)
def test_what_feature_match_index_refuses(change, error, message):
    arguments = {"feat_input": torch.zeros(3, 5, 6), "feat_ref": torch.zeros(3, 5, 6), **change}
    with pytest.raises(error, match=message):
        feature_match_index(**arguments)


def transformed(img_lq: Tensor, ref_lq: Tensor, refs: tuple[Tensor, ...]):
    """Soft attention and textures by unfolding, multiplying, gathering and folding."""
    q, k = (F.normalize(F.unfold(x, 3, padding=1), dim=1) for x in (img_lq, ref_lq))
    score, index = (k.mT @ q).max(dim=1)
    textures = []
    for level, ref in enumerate(refs):
        s = 2**level
        patch = {"kernel_size": 3 * s, "padding": s, "stride": s}
        patches = F.unfold(ref, **patch)
        chosen = patches.gather(2, index[:, None].expand(-1, patches.shape[1], -1))
        grid = [n * s for n in img_lq.shape[2:]]
        textures.append(F.fold(chosen, grid, **patch) / 9)
    return score.view(len(score), 1, *img_lq.shape[2:]), textures


def pyramid(levels, n=2, grid=(6, 5), key_grid=(5, 7), rest=0, dtype=torch.float64):
    """img_lq, ref_lq and refs from the smallest to the largest."""
    img_lq, ref_lq = (torch.randn(n, 8, *g, dtype=dtype).relu() for g in (grid, key_grid))
    sizes = [[2**i * side + min(rest, 2**i - 1) for side in key_grid] for i in range(levels)]
    refs = tuple(torch.randn(n, 16 >> i, *s, dtype=dtype) for i, s in enumerate(sizes))
    return [x.requires_grad_() for x in (img_lq, ref_lq, *refs)]


@pytest.mark.double
@each(("levels", "rest"), [(1, 0), (2, 1), (3, 0), (3, 3), (4, 2)])
def test_search_transformer(backend, levels, rest):
    img_lq, ref_lq, *refs = inputs = pyramid(levels, rest=rest)
    attention, textures = SearchTransformer(backend=backend)(img_lq, ref_lq, tuple(refs))
    expected = transformed(img_lq, ref_lq, tuple(refs))
    assert isinstance(textures, list) and len(textures) == levels
    ours, theirs = (attention, *textures), (expected[0], *expected[1])
    grads = [torch.randn_like(x) for x in theirs]
    results = ((*out, *torch.autograd.grad(out, inputs, grads)) for out in (ours, theirs))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)


@each("dtype", cases.HALF_DTYPES, ids=str)
def test_search_transformer_of_16_bits(backend, dtype):
    img_lq, ref_lq, *refs = (x.detach() for x in pyramid(3, dtype=dtype))
    module = SearchTransformer(backend=backend)
    attention, textures = module(img_lq, ref_lq, refs)
    ours = SearchTransfer(backend=backend)(img_lq, ref_lq, *refs[::-1])
    for x, y in zip((attention, *textures), ours, strict=True):
        assert x.dtype == dtype and torch.equal(x, y)
    assert not list(module.parameters()) and not module.state_dict()
    assert repr(module) == f"SearchTransformer(precision=None, backend={backend!r})"


@each(
    ("refs", "error", "message"),
    [
        (torch.zeros(2, 8, 5, 7), TypeError, "refs must be a tuple or list of tensors, got Tensor"),
        ((), TypeError, "refs .*got an empty one"),
        ((torch.zeros(2, 8, 5, 7), torch.zeros(2, 8, 5, 7)), ValueError, r"refs\[1\] .*2 times"),
        ((torch.zeros(2, 8, 5, 7), None), TypeError, r"refs\[1\] must be .*got NoneType"),
    ],
)
def test_what_search_transformer_refuses(refs, error, message):
    img_lq, ref_lq, *_ = pyramid(1, dtype=torch.float32)
    with pytest.raises(error, match=message):
        SearchTransformer()(img_lq, ref_lq, refs)


def cosines(lr: Tensor, reflr: Tensor) -> Tensor:  # [N, H-2, W-2, Nk]
    """Of all pairs of 3x3 patches inside the maps, as MASA's fine search defines them."""
    q, k = (F.normalize(F.unfold(x, 3), dim=1) for x in (lr, reflr))
    return (q.mT @ k).unflatten(1, [n - 2 for n in lr.shape[2:]])


BLOCKS = {
    "blocks": ((6, 8, 10, 10), (6, 8, 15, 15)),
    "unequal": ((2, 5, 7, 12), (2, 5, 9, 6)),
    "one_patch": ((1, 3, 3, 3), (1, 3, 3, 8)),
}


@each("dtype", cases.DTYPES, ids=str)
@each(("lr_size", "ref_size"), BLOCKS.values(), ids=BLOCKS)
def test_masa_search(backend, lr_size, ref_size, dtype):
    lr, reflr = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (lr_size, ref_size))
    lr[..., :4, :3] = reflr[..., :3, :3] = 0
    corr, index = masa.search_org(lr, reflr, 3, 1, 1, backend=backend)
    all_pairs = cosines(lr.double(), reflr.double())
    best, _ = torch.topk(all_pairs, 1, dim=3)
    chosen = all_pairs.gather(3, index)
    assert corr.shape == best.shape and corr.dtype == dtype and index.dtype == torch.int64
    assert (best - chosen).le(CHOSEN).all()
    wide = torch.promote_types(dtype, torch.float32)  # float16 has no 1e-12 for a patch of zeros
    own = cosines(lr.to(wide), reflr.to(wide)).gather(3, index).to(dtype)
    assert_no_worse(corr, chosen, own)
    assert index[:, 0, 0].eq(0).all(), "the first of all, which are equal for a patch of zeros"


@pytest.mark.double
def test_gradient_of_masa_search(backend):
    lr, reflr = (torch.randn(2, 3, *s, dtype=torch.float64) for s in ((5, 6), (6, 5)))
    lr.requires_grad_(), reflr.requires_grad_()
    corr, index = masa.search_org(lr, reflr, backend=backend)
    expected = cosines(lr, reflr).gather(3, index)
    grad = torch.randn_like(corr)
    pairs = zip(*(torch.autograd.grad(c, (lr, reflr), grad) for c in (corr, expected)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def transferred(fea: Tensor, index: Tensor, soft_att: Tensor, ks: int, pd: int, stride: int):
    """Patches unfolded, gathered, folded, divided by their number and weighted, as MASA does."""
    patches = F.unfold(fea, ks, stride=stride)
    chosen = patches.gather(2, index.flatten(1)[:, None].expand(-1, patches.shape[1], -1))
    grid = [n * stride for n in index.shape[1:]]
    total, count = (
        F.fold(x, grid, ks, padding=pd, stride=stride) for x in (chosen, torch.ones_like(chosen))
    )
    return total / count * F.interpolate(soft_att, size=grid, mode="bilinear")


@pytest.mark.double
@each("kernel_size", [3, 1, 5])
@each(("stride", "rest"), [(1, 0), (2, 1), (3, 2), (4, 0)])
def test_masa_transfer(backend, stride, rest, kernel_size):
    value_size = (3, 2, 7 * stride + rest, 9 * stride)
    fea = torch.randn(value_size, dtype=torch.float64, requires_grad=True)
    index = cases.random_index(value_size, (3, 4, 5), stride, kernel_size, 0)
    soft_att = torch.rand(3, 1, 4, 5, dtype=torch.float64, requires_grad=True)
    arguments = (
        fea,
        index,
        soft_att,
        kernel_size * stride,
        (kernel_size - 1) * stride // 2,
        stride,
    )
    out, expected = masa.transfer(*arguments, backend=backend), transferred(*arguments)
    grad = torch.randn_like(expected)
    results = ((x, *torch.autograd.grad(x, (fea, soft_att), grad)) for x in (out, expected))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@each("layout", ["contiguous", "channels_last", "strided"])
@each("dtype", cases.DTYPES[1:], ids=str)
def test_masa_as_it_calls_them(backend, dtype, layout):
    """Search in blocks, then three levels with the index and the similarity of its results."""
    lr, reflr = torch.randn(4, 8, 10, 10).to(dtype), torch.randn(4, 8, 13, 15).to(dtype)
    corr, index = masa.search_org(lr, reflr, ks=3, pd=1, stride=1, backend=backend)
    index, soft_att = index[:, :, :, 0], corr[:, :, :, 0:1].permute(0, 3, 1, 2)
    for s in (1, 2, 4):
        fea = cases.LAYOUTS[layout](torch.randn(4, 4, 13 * s, 15 * s).to(dtype))
        options = {"ks": 3 * s, "pd": s, "stride": s}
        out = masa.transfer(fea, index, soft_att, backend=backend, **options)
        own = transferred(fea, index, soft_att, **options)
        assert_no_worse(out, transferred(fea.double(), index, soft_att.double(), **options), own)


def test_masa_methods():
    """As the docstring says to install them, with MASA's own calls."""

    class MASA(torch.nn.Module):
        search_org = staticmethod(masa.search_org)
        transfer = staticmethod(masa.transfer)

        def forward(self, lr, reflr, fea):
            corr, index = self.search_org(lr, reflr, ks=3, pd=1, stride=1)
            soft_att = corr[:, :, :, 0:1].permute(0, 3, 1, 2)
            return self.transfer(fea, index[:, :, :, 0], soft_att, ks=6, pd=2, stride=2)

    lr, reflr, fea = torch.randn(2, 3, 6, 7), torch.randn(2, 3, 8, 6), torch.randn(2, 4, 16, 12)
    score, index = cosines(lr, reflr).max(3)
    expected = transferred(fea, index, score[:, None], 6, 2, 2)
    torch.testing.assert_close(MASA()(lr, reflr, fea), expected)


@each(
    ("change", "error", "message"),
    [
        ({"ks": 5}, ValueError, "ks must be 1, 3, 5 or 7 times stride .*got ks 5, pd 2"),
        ({"pd": 1}, ValueError, "got ks 6, pd 1 and stride 2"),
        ({"ks": 4, "pd": 1}, ValueError, "got ks 4"),
        ({"stride": 0}, ValueError, "stride 0"),
        ({"ks": 0, "pd": 0, "stride": 0}, ValueError, "got ks 0, pd 0 and stride 0"),
        ({"pd": None}, ValueError, "pd None"),
        ({"soft_att": None}, TypeError, "soft_att must be a floating.* got NoneType"),
        ({"soft_att": torch.ones(1, 1, 3, 4).int()}, TypeError, "soft_att .*got torch.int32"),
        ({"soft_att": torch.ones(1, 3, 4)}, ValueError, r"soft_att .*got \[1, 3, 4\]"),
        ({"soft_att": torch.ones(1, 2, 3, 4)}, ValueError, r"\[N, 1, H, W\], got \[1, 2, 3, 4\]"),
        ({"index": torch.full((1, 3, 4), 12)}, ValueError, "index must lie in"),
    ],
)
def test_what_masa_transfer_refuses(change, error, message):
    arguments = {
        "fea": torch.zeros(1, 2, 10, 12),
        "index": torch.zeros(1, 3, 4, dtype=torch.int64),
        "soft_att": torch.ones(1, 1, 3, 4),
        **{"ks": 6, "pd": 2, "stride": 2},
    }
    with pytest.raises(error, match=message):
        masa.transfer(**{**arguments, **change})


def test_what_masa_search_refuses():
    lr = torch.zeros(1, 3, 5, 5)
    with pytest.raises(ValueError, match="ks must be 3 and stride 1, got 5 and 1"):
        masa.search_org(lr, lr, ks=5)
    with pytest.raises(ValueError, match="ks must be 3 and stride 1, got 3 and 2"):
        masa.search_org(lr, lr, stride=2)
