"""From two images to one: quality, the formula, planted matches, kinds of images, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as pillow
from skimage.data import stereo_motorcycle

from tests.image_samples import noise
from ttsr_fast import reference
from ttsr_fast.images import Image, downscale, to_tensor, upscale_bicubic
from ttsr_fast.model import TTSR
from ttsr_fast.references import search_references
from ttsr_fast.upscaling import ttsr, upscale

each = pytest.mark.parametrize


@pytest.fixture(scope="module")
def stereo():
    """A region of the left view, the same reduced, and the region of the right view around it."""
    left, right, _ = stereo_motorcycle()
    truth = left[150:350, 250:550]
    return truth, downscale(truth), right[140:360, 190:530]


def psnr(a, b):
    """On the luma of TTSR's protocol, from 0 to 255."""
    luma = np.array([65.738, 129.057, 25.064]) / 256
    error = (a.astype(float) - b) @ luma
    return 10 * np.log10(255**2 / np.mean(error**2))


def smooth(height, width, seed=3):
    """Colours with structure at all scales, reaching from black to white."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cell in (2, 4, 8, 16):
        coarse = rng.random((height // cell + 2, width // cell + 2, 3))
        total += coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width] * cell**0.5
    total -= total.min()
    return (total / total.max() * 255).astype(np.uint8)


# --- quality --------------------------------------------------------------------------------------


def test_detail_gains_on_a_stereo_pair(stereo):
    truth, low, ref = stereo
    bicubic = psnr(upscale_bicubic(low), truth)
    gains = [psnr(upscale(low, ref, phases=n).image.pixels, truth) - bicubic for n in (1, 2, 4)]
    assert gains[0] > 0.8
    assert gains[1] > 2.8
    assert gains[2] > 3.6
    assert psnr(upscale(low, ref).image.pixels, truth) == gains[1] + bicubic


def test_detail_of_an_unrelated_reference_does_no_harm(stereo):
    truth, low, _ = stereo
    unrelated = noise(200, 300, 3)
    assert psnr(upscale(low, unrelated).image.pixels, truth) > psnr(upscale_bicubic(low), truth)


def test_result_reduces_to_the_input(stereo):
    _, low, ref = stereo
    again = downscale(upscale(low, ref).image.pixels)
    assert np.abs(again.astype(float) - low).mean() < 0.6
    assert np.abs(upscale_bicubic(low).astype(float)).mean() > 60


def test_runs_are_bit_equal(stereo):
    _, low, ref = stereo
    first, second = upscale(low, ref), upscale(low, ref)
    np.testing.assert_array_equal(first.image.pixels, second.image.pixels)
    assert torch.equal(first.score, second.score)
    assert torch.equal(first.index, second.index)


# --- the formula ----------------------------------------------------------------------------------


def pillow_resize(x, size):  # [1, 3, H, W] float
    planes = [pillow.fromarray(c.float().numpy()).resize(size[::-1], pillow.BICUBIC) for c in x[0]]
    return torch.from_numpy(np.stack(planes)).double()[None]


def features(x):
    local = F.avg_pool2d(F.pad(x, [3] * 4), 7, 1) * 49
    local /= F.avg_pool2d(F.pad(torch.ones_like(x), [3] * 4), 7, 1) * 49
    both = torch.cat([x - local, 0.15 * (x - x.mean((2, 3), keepdim=True))], 1)
    return torch.cat([F.avg_pool2d(both, 2)[:, :, a::2, b::2] for a in (0, 1) for b in (0, 1)], 1)


def detail(low, ref):
    """The documented formula at one phase, in float64 and with the oracle of both operations."""
    height, width = (size // 4 * 4 for size in ref.shape[:2])
    ref = ref[:height, :width]
    lr, lrsr, sharp, refsr = (
        to_tensor(x).double()
        for x in (low, upscale_bicubic(low), ref, upscale_bicubic(downscale(ref)))
    )
    score, index = reference.search(features(lrsr), features(refsr), eps=1e-3)
    texture = reference.gather_fold(sharp - refsr, index, stride=4, divisor="overlap")
    sr = lrsr + pillow_resize(score[None], lrsr.shape[2:]).clamp(0, 1) ** 4 * texture
    for _ in range(2):
        sr = sr.clamp(-1, 1)
        sr = sr + pillow_resize(lr - pillow_resize(sr, lr.shape[2:]), sr.shape[2:])
    pixels = ((sr + 1) * 127.5).round().clamp(0, 255)[0].permute(1, 2, 0).numpy()
    row, column = index[0] // (width // 4), index[0] % (width // 4)
    return pixels, score[0], (row, column)


@each(
    ("size", "ref_size"),
    [
        ((1, 1), (12, 12)),
        ((1, 9), (13, 34)),
        ((7, 2), (50, 15)),
        ((13, 11), (52, 44)),
        ((16, 21), (79, 90)),
    ],
)
def test_detail_is_its_formula_at_every_size(size, ref_size):
    low, ref = smooth(*size, seed=1), smooth(*ref_size, seed=2)
    result = upscale(low, ref, phases=1)
    pixels, score, (row, column) = detail(low, ref)
    torch.testing.assert_close(result.score.double(), score, atol=1e-4, rtol=0)
    sure = score > 0.01  # one pixel alone is flat, and its place a matter of rounding
    assert torch.equal(result.index[sure], (4 * row * ref_size[1] + 4 * column)[sure])
    assert result.image.pixels.shape == (4 * size[0], 4 * size[1], 3)
    assert np.abs(result.image.pixels - pixels).max() <= 1
    assert np.mean(result.image.pixels != pixels) < 0.01


# --- planted matches ------------------------------------------------------------------------------


@each(("shift", "phases"), [((0, 0), 1), ((2, 6), 2), ((4, 0), 1), ((1, 7), 4), ((0, 0), 4)])
def test_a_shifted_copy_is_found_to_the_pixel(shift, phases):
    truth = smooth(80, 96)
    ref = truth[shift[0] :, shift[1] :]
    result = upscale(downscale(truth), ref, phases=phases)
    rows, columns = torch.arange(20)[:, None] * 4, torch.arange(24) * 4
    expected = (rows - shift[0]) * ref.shape[1] + columns - shift[1]
    inside = (slice(5, 17), slice(5, 21))  # away from the borders that the shift has cut off
    assert torch.equal(result.index[inside], expected[inside])
    assert result.score[inside].min() > 0.999
    inside = (slice(20, 68), slice(20, 84))
    assert psnr(result.image.pixels[inside], truth[inside]) > 38


@each("level", [0, 100, 255])
def test_a_flat_image_stays_flat(level):
    result = upscale(np.full((6, 7, 3), level, np.uint8), noise(40, 52, 3))
    np.testing.assert_array_equal(result.image.pixels, np.full((24, 28, 3), level))
    assert result.score.abs().max() < 0.05


def test_backends_agree(stereo, backend):
    _, low, ref = stereo
    low, ref = low[:20, :24], ref[:90, :100]
    result, expected = upscale(low, ref, backend=backend), upscale(low, ref, backend="reference")
    assert np.abs(result.image.pixels.astype(int) - expected.image.pixels).max() <= 1
    torch.testing.assert_close(result.score, expected.score, atol=1e-5, rtol=0)


# --- kinds of images ----------------------------------------------------------------------------

LOW, REF = smooth(9, 12, seed=4), smooth(40, 52, seed=5)


def test_every_source_gives_the_same(tmp_path):
    expected = upscale(LOW, REF)
    Image(LOW).save(tmp_path / "low.png")
    Image(REF).save(tmp_path / "ref.png")
    for low, ref in (
        (tmp_path / "low.png", str(tmp_path / "ref.png")),
        (pillow.fromarray(LOW), Image(REF)),
    ):
        result = upscale(low, ref)
        np.testing.assert_array_equal(result.image.pixels, expected.image.pixels)
        assert torch.equal(result.index, expected.index)


@each("wide", ["low", "both"])
def test_16_bits_and_tensors_agree_with_8_bits(wide):
    expected = upscale(LOW, REF).image.pixels
    ref = REF.astype(np.uint16) * 257 if wide == "both" else REF
    deep = upscale(LOW.astype(np.uint16) * 257, ref).image.pixels
    assert deep.dtype == np.uint16
    assert np.abs(deep / 257 - expected).mean() < 0.6
    from_tensor = upscale(to_tensor(LOW), ref).image.pixels
    np.testing.assert_array_equal(from_tensor, deep)


@each("dtype", [np.uint8, np.uint16])
def test_alpha_is_enlarged_by_itself(dtype):
    low, alpha = LOW.astype(dtype), noise(9, 12, dtype=dtype)
    result = upscale(np.dstack((low, alpha)), np.dstack((REF, noise(40, 52)))).image
    np.testing.assert_array_equal(result.pixels, upscale(low, REF).image.pixels)
    kind = np.uint8 if dtype == np.uint8 else np.float32
    upscaled = np.asarray(pillow.fromarray(alpha.astype(kind)).resize((48, 36), pillow.BICUBIC))
    expected = upscaled.round().clip(0, np.iinfo(dtype).max).astype(dtype)
    np.testing.assert_array_equal(result.alpha, expected, strict=True)


@each("dtype", [np.uint8, np.uint16])
def test_grey_is_what_equal_colours_give(dtype):
    low, ref = LOW[..., :1].astype(dtype), REF[..., :1].astype(dtype)
    grey = upscale(low[..., 0], ref).image.pixels
    colour = upscale(low.repeat(3, axis=2), ref.repeat(3, axis=2)).image.pixels
    assert grey.shape == (36, 48, 1)
    assert grey.dtype == dtype
    difference = grey.astype(int) - colour
    assert np.abs(difference).max() <= 1  # where luma rounds a half the other way
    assert np.mean(difference != 0) < 0.01


def test_grey_and_colour_mix():
    luma = (REF @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    grey = upscale(LOW[..., 0], REF).image.pixels
    np.testing.assert_array_equal(grey, upscale(LOW[..., 0], luma).image.pixels)
    colour = upscale(LOW, luma).image.pixels
    expected = upscale(LOW, luma[..., None].repeat(3, axis=2)).image.pixels
    np.testing.assert_array_equal(colour, expected)


def test_colour_profile_is_that_of_the_input():
    result = upscale(Image(LOW, None, b"mine"), Image(REF, None, b"other"))
    assert result.image.icc_profile == b"mine"


# --- with a model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return TTSR((1, 1, 1, 1), 8)


@each("dtype", [torch.float32, torch.float64])
@each("ref_size", [(40, 52), (27, 33)])
def test_ttsr_is_the_model(model, dtype, ref_size):
    model = model.to(dtype)
    ref = smooth(*ref_size, seed=5)
    result = upscale(LOW, ref, model=model)
    cut = ref[: ref_size[0] // 4 * 4, : ref_size[1] // 4 * 4]
    inputs = (LOW, upscale_bicubic(LOW), cut, upscale_bicubic(downscale(cut)))
    with torch.no_grad():
        sr, score, *_ = model(*(to_tensor(x).to(dtype) for x in inputs))
        query, key = (model.LTE((to_tensor(x).to(dtype) + 1) / 2)[2] for x in inputs[1::2])
    expected = ((sr[0].permute(1, 2, 0) + 1) * 127.5).round().numpy()
    np.testing.assert_array_equal(result.image.pixels, expected)
    torch.testing.assert_close(result.score, score[0, 0], check_dtype=False)
    _, index = reference.search(query, key)
    row, column = index[0] // (cut.shape[1] // 4), index[0] % (cut.shape[1] // 4)
    assert torch.equal(result.index, 4 * row * ref_size[1] + 4 * column)


def test_ttsr_takes_the_models_backend_unless_told(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        ttsr,
        "search_references",
        lambda *a, band, **options: calls.append(options) or search_references(*a, **options),
    )
    monkeypatch.setattr(model.SearchTransfer, "backend", "torch")
    monkeypatch.setattr(model.SearchTransfer, "precision", "fp32")
    upscale(LOW, REF, model=model.float())
    upscale(LOW, REF, model=model, backend="reference", precision="bf16")
    assert calls == [
        {"backend": "torch", "precision": "fp32"},
        {"backend": "reference", "precision": "bf16"},
    ]


def test_ttsr_gives_grey_for_grey(model):
    result = upscale(LOW[..., 0], REF, model=model.float())
    luma = (REF @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    colour = upscale(LOW[..., :1].repeat(3, 2), luma, model=model).image.pixels
    expected = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(result.image.pixels[..., 0] - expected).max() <= 1


# --- errors ---------------------------------------------------------------------------------------


@each(
    ("options", "error", "message"),
    [
        ({"method": "magic"}, ValueError, "method must be None or one of .*'magic'"),
        ({"method": "ttsr"}, ValueError, "method 'ttsr' needs a model"),
        ({"model": "weights.pt"}, TypeError, "model must be a TTSR, got str"),
        ({"phases": 3}, ValueError, r"phases must be one of \(1, 2, 4\), got 3"),
        ({"backend": "abacus"}, ValueError, "backend must be None or one of .*'abacus'"),
        ({"precision": "fp4"}, ValueError, "precision must be one of .*'fp4'"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        upscale(LOW, REF, **options)


@each("options", [{"method": "detail"}, {"phases": 2}, {"device": "cpu"}], ids=str)
def test_options_of_detail_are_refused_with_a_model(model, options):
    with pytest.raises(ValueError, match="'detail'"):
        upscale(LOW, REF, model=model, **options)


@each("size", [(11, 40), (40, 11), (3, 3)])
def test_a_reference_without_a_patch_is_refused(size):
    message = f"ref must have at least one patch of 12x12 pixels, got {size[1]}x{size[0]}"
    with pytest.raises(ValueError, match=message):
        upscale(LOW, noise(*size, 3))


def test_bad_images_are_named():
    with pytest.raises(TypeError, match="lr must be a path, .* got NoneType"):
        upscale(None, REF)
    with pytest.raises(ValueError, match=r"ref must be a non-empty .* got \[0, 52, 3\]"):
        upscale(LOW, REF[:0])
