"""The whole model: wiring, names, LTE_copy, dtypes and errors."""

import copy

import pytest
import torch

from ttsr_fast import reference
from ttsr_fast.model import TTSR

SMALL = ((1, 1, 1, 1), 8)


def images(size, ref_size, *, n=1, ref_n=None, dtype=torch.float64):
    shapes = [(n, *size), (n, *(4 * x for x in size))] + [(ref_n or n, *ref_size)] * 2
    return [torch.rand(m, 3, h, w, dtype=dtype) * 2 - 1 for m, h, w in shapes]


def official_shapes(n, blocks):
    """Names and shapes of the official checkpoint, layer by layer."""
    convs = {  # out channels, in channels, kernel size
        "LTE.sub_mean": (3, 3, 1),
        "LTE.slice1.0": (64, 3, 3),
        "LTE.slice2.2": (64, 64, 3),
        "LTE.slice2.5": (128, 64, 3),
        "LTE.slice3.7": (128, 128, 3),
        "LTE.slice3.10": (256, 128, 3),
        "MainNet.SFE.conv_head": (n, 3, 3),
        "MainNet.SFE.conv_tail": (n, n, 3),
        "MainNet.conv11_head": (n, n + 256, 3),
        "MainNet.conv22_head": (n, n + 128, 3),
        "MainNet.conv33_head": (n, n + 64, 3),
        "MainNet.conv12": (4 * n, n, 3),
        "MainNet.conv23": (4 * n, n, 3),
        "MainNet.merge_tail.conv13": (n, n, 1),
        "MainNet.merge_tail.conv23": (n, n, 1),
        "MainNet.merge_tail.conv_merge": (n, 3 * n, 3),
        "MainNet.merge_tail.conv_tail1": (n // 2, n, 3),
        "MainNet.merge_tail.conv_tail2": (3, n // 2, 1),
    }
    for branch in ("11", "21", "22", "31", "32", "33"):
        convs[f"MainNet.conv{branch}_tail"] = (n, n, 3)
    convs |= {f"MainNet.ex12.{name}": (n, n, k) for name, k in (("conv12", 1), ("conv21", 3))}
    convs |= {f"MainNet.ex12.conv_merge{k}": (n, 2 * n, 3) for k in (1, 2)}
    convs |= {f"MainNet.ex123.{name}": (n, n, 1) for name in ("conv12", "conv13", "conv23")}
    for name in ("conv21", "conv31_1", "conv31_2", "conv32"):
        convs[f"MainNet.ex123.{name}"] = (n, n, 3)
    convs |= {f"MainNet.ex123.conv_merge{k}": (n, 3 * n, 3) for k in (1, 2, 3)}
    stages = [["SFE.RBs"], ["RB11"], ["RB21", "RB22"], ["RB31", "RB32", "RB33"]]
    for count, trunks in zip(blocks, stages, strict=True):
        for trunk in trunks:
            for i in range(count):
                convs |= {f"MainNet.{trunk}.{i}.conv{k}": (n, n, 3) for k in (1, 2)}
    shapes = {f"{name}.weight": [*s[:2], s[2], s[2]] for name, s in convs.items()}
    return shapes | {f"{name}.bias": [s[0]] for name, s in convs.items()}


def test_state_dict_is_the_official_checkpoint():
    model = TTSR()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    assert shapes == official_shapes(64, (16, 16, 8, 4))
    assert len(shapes) == 316
    assert sum(name.startswith("MainNet.") for name in shapes) == 304
    assert sum(p.numel() for p in model.parameters()) == 6_729_615
    assert sum(p.numel() for p in model.LTE.parameters()) == 555_340


@pytest.mark.parametrize(
    ("size", "ref_size"),
    [((5, 6), (20, 24)), ((5, 6), (27, 34)), ((3, 7), (9, 61)), ((1, 1), (4, 4))],
)
def test_wiring(size, ref_size):
    """Which image feeds which part, and the five results, with the oracle in the middle."""
    model = TTSR(*SMALL).double()
    lr, lrsr, ref, refsr = images(size, ref_size, n=2)
    with torch.no_grad():
        results = model(lr, lrsr, ref, refsr)
        query, key = model.LTE((lrsr + 1) / 2)[2], model.LTE((refsr + 1) / 2)[2]
        textures = reference.search_transfer(query, key, *model.LTE((ref + 1) / 2))
        expected = model.MainNet(lr, *textures), *textures
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-11)


def test_one_reference_serves_a_batch():
    model = TTSR(*SMALL).double()
    lr, lrsr, ref, refsr = images((4, 5), (18, 21), n=3, ref_n=1)
    with torch.no_grad():
        together = model(lr, lrsr, ref, refsr)
        repeated = model(lr, lrsr, ref.expand(3, -1, -1, -1), refsr.expand(3, -1, -1, -1))
    for x, y in zip(together, repeated, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_masked_positions_are_never_matched():
    """Half of each reference is a padding, which is a copy of what is searched for."""
    model = TTSR(*SMALL).double()
    lr, lrsr, ref, refsr = images((4, 5), (16, 40), n=2)
    refsr[..., 20:] = lrsr
    key_mask = torch.ones(2, 4, 10, dtype=torch.bool)
    key_mask[..., 5:] = False
    with torch.no_grad():
        results = model(lr, lrsr, ref, refsr, key_mask=key_mask)
        query, key = model.LTE((lrsr + 1) / 2)[2], model.LTE((refsr + 1) / 2)[2]
        values = model.LTE((ref + 1) / 2)
        expected = reference.search_transfer(query, key, *values, key_mask=key_mask)
        unmasked = model(lr, lrsr, ref, refsr)[1]
    for result, wanted in zip(results[1:], expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[0], model.MainNet(lr, *expected), rtol=1e-9, atol=1e-11)
    assert (unmasked > results[1]).any()


def test_without_hard_attention_there_is_no_reference():
    model = TTSR(*SMALL, hard_attention=False, csfi=False).double()
    lr, lrsr, ref, refsr = images((4, 5), (16, 20), n=2)
    (sr,) = model(lr)
    assert torch.equal(sr, model.MainNet(lr, None, None, None, None))
    assert torch.equal(model(lr, lrsr, ref, refsr, key_mask=torch.ones(1))[0], sr)
    assert not [name for name in model.state_dict() if not name.startswith("MainNet.")]
    sr.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match="sr must be None for a model without hard attention"):
        model(sr=ref)


def test_without_soft_attention_s_multiplies_nothing():
    soft, hard = TTSR(*SMALL), TTSR(*SMALL, soft_attention=False)
    hard.load_state_dict(soft.state_dict())
    lr, *others = images((4, 4), (16, 16), dtype=torch.float32)
    with torch.no_grad():
        sr, S, *textures = hard(lr, *others)
        assert torch.equal(sr, hard.MainNet(lr, S * torch.nan, *textures))
        torch.testing.assert_close(sr, soft.MainNet(lr, torch.ones_like(S), *textures))
        assert not torch.allclose(sr, soft(lr, *others)[0])


def test_gradients_reach_the_weights_and_not_the_references():
    model = TTSR(*SMALL).double()
    inputs = [x.requires_grad_() for x in images((4, 4), (16, 16))]
    model(*inputs)[0].sum().backward()
    assert inputs[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in inputs[1:])
    for name, parameter in model.named_parameters():
        if name.startswith("LTE.sub_mean"):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_copy_passes_gradients_to_the_image_only():
    model = TTSR(*SMALL).double()
    sr = images((4, 4), (17, 22))[2].requires_grad_()
    levels = model(sr=sr)
    expected = model.LTE((sr + 1) / 2)
    assert all(torch.equal(x, y) for x, y in zip(levels, expected, strict=True))

    (gradient,) = torch.autograd.grad(sum(x.sum() for x in expected), sr)
    sum(x.sum() for x in levels).backward()
    torch.testing.assert_close(sr.grad, gradient)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for name, p in model.LTE.named_parameters() if "slice" in name)


def test_copy_follows_the_optimizer():
    model = TTSR(*SMALL)
    sr = images((4, 4), (16, 16), dtype=torch.float32)[2]
    before = model(sr=sr)[2]
    optimizer = torch.optim.SGD(model.LTE.parameters(), lr=0.1)
    model.LTE((sr + 1) / 2)[2].mean().backward()
    optimizer.step()
    after = model(sr=sr)[2]
    assert not torch.equal(after, before)
    assert torch.equal(after, model.LTE((sr + 1) / 2)[2])


def test_deepcopy_is_independent():
    model = TTSR(*SMALL)
    twin = copy.deepcopy(model)
    inputs = images((3, 3), (12, 12), dtype=torch.float32)
    with torch.no_grad():
        before, texture = model(*inputs)[0], model(sr=inputs[2])[2]
        assert torch.equal(twin(*inputs)[0], before)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(twin(*inputs)[0], before)
        assert torch.equal(twin(sr=inputs[2])[2], texture)
    assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_model(dtype):
    model = TTSR(*SMALL)
    inputs = images((6, 6), (24, 24), n=2, dtype=torch.float32)
    inputs[3] = inputs[1]  # the match is then every patch itself, whatever the rounding
    with torch.no_grad():
        exact = model(*inputs)
        low = model.to(dtype)(*(x.to(dtype) for x in inputs))
    for x, y in zip(low, exact, strict=True):
        assert x.dtype == dtype
        assert (x.float() - y).abs().max() < 0.03 * y.abs().max()


def test_autocast():
    model = TTSR(*SMALL)
    inputs = images((6, 6), (24, 24), dtype=torch.float32)
    inputs[3] = inputs[1]
    exact = model(*inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        low = model(*inputs)
    low[0].float().sum().backward()
    for x, y in zip(low, exact, strict=True):
        assert (x - y).abs().max() < 0.03 * y.abs().max()
    assert all(p.grad.isfinite().all() for p in model.MainNet.parameters())


def test_precision_and_backend_are_passed_on():
    model = TTSR(*SMALL, precision="fp16", backend="reference")
    assert model.SearchTransfer.precision == "fp16"
    assert model.SearchTransfer.backend == "reference"
    with pytest.raises(ValueError, match="precision"):
        model.double()(*images((3, 3), (12, 12)))
    with pytest.raises(ValueError, match="backend"):
        TTSR(*SMALL, backend="abacus").double()(*images((3, 3), (12, 12)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lr": (1, 1, 4, 4)}, r"lr must be \[N, 3, H, W\], got \[1, 1, 4, 4\]"),
        ({"ref": (3, 16, 16)}, r"ref must be \[N, 3, H, W\], got \[3, 16, 16\]"),
        ({"refsr": (1, 4, 16, 16)}, r"refsr must be \[N, 3, H, W\], got \[1, 4, 16, 16\]"),
        ({"lr": (1, 3, 0, 4)}, r"lr must be at least 1x1 pixels, got \[1, 3, 0, 4\]"),
        ({"ref": (1, 3, 3, 16)}, r"ref must be at least 4x4 pixels, got \[1, 3, 3, 16\]"),
        ({"lrsr": (1, 3, 16, 15)}, r"lrsr must be \[1, 3, 16, 16\], four times lr .*16, 15\]"),
        ({"lrsr": (2, 3, 16, 16)}, r"lrsr must be \[1, 3, 16, 16\], four times lr .*16, 16\]"),
        ({"refsr": (1, 3, 16, 12)}, r"refsr must have the shape of ref .*, got \[1, 3, 16, 12\]"),
        (
            {"ref": (2, 3, 16, 16), "refsr": (2, 3, 16, 16)},
            r"ref must have batch size 1 or 1 \(that of lr\), got \[2, 3, 16, 16\]",
        ),
    ],
)
def test_images_that_do_not_fit(shapes, message):
    good = {"lr": (1, 3, 4, 4)} | dict.fromkeys(("lrsr", "ref", "refsr"), (1, 3, 16, 16))
    model = TTSR(*SMALL)
    with pytest.raises(ValueError, match=message):
        model(**{name: torch.zeros(shape) for name, shape in (good | shapes).items()})


def test_sr_stands_alone_and_nothing_may_be_missing():
    model = TTSR(*SMALL)
    image = torch.zeros(1, 3, 16, 16)
    for name in ("lr", "key_mask"):
        with pytest.raises(ValueError, match="sr must be given alone"):
            model(sr=image, **{name: image})
    with pytest.raises(ValueError, match=r"sr must be at least 4x4 pixels, got \[1, 3, 3, 16\]"):
        model(sr=image[:, :, :3])
    with pytest.raises(TypeError, match=r"refsr must be a \[N, 3, H, W\] tensor, got NoneType"):
        model(torch.zeros(1, 3, 4, 4), image, image)


@pytest.mark.torch(2, 6)
def test_exported_program_is_for_all_sizes(tmp_path):
    """Saved and loaded; the operators check what it calls them with."""
    torch.manual_seed(0)
    model = TTSR((1, 1, 1, 1), 4).eval()

    def maps(height, width, ref_height, ref_width):
        sizes = ((height, width), (4 * height, 4 * width), (ref_height, ref_width))
        return tuple(torch.rand(1, 3, *size) * 2 - 1 for size in (*sizes, sizes[2]))

    names = ("h", "w", "key_h", "key_w")
    h, w, key_h, key_w = (torch.export.Dim(name, min=3, max=1024) for name in names)
    sizes = ({2: h, 3: w}, {2: 4 * h, 3: 4 * w}, *[{2: 4 * key_h, 3: 4 * key_w}] * 2)
    inputs = maps(12, 7, 20, 24)
    with torch.no_grad():
        program = torch.export.export(model, maps(8, 10, 12, 16), dynamic_shapes=sizes)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for actual, expected in zip(loaded(*inputs), model(*inputs), strict=True):
            assert torch.equal(actual, expected)
