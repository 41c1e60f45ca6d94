"""VGG19 up to relu5_1 against plain convolutions, and where its weights come from."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F

from ttsr_fast.model.vgg import VGG19, find_vgg19

# Numbers of the layers in torchvision's `vgg19().features`, and their channels.
CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    16: (256, 256),
    19: (256, 512),
    21: (512, 512),
    23: (512, 512),
    25: (512, 512),
    28: (512, 512),
}
POOLS = (4, 9, 18, 27)
KINDS = ("weight", "bias")


@cache
def random_weights():
    """Random ones that keep the variance of the signal, and some that are of no use."""
    generator = torch.Generator("cpu").manual_seed(0)
    found = {"classifier.6.bias": torch.ones(3), "features.30.bias": torch.ones(512)}
    for number, (channels, width) in CONVOLUTIONS.items():
        weight = torch.randn(width, channels, 3, 3, generator=generator, device="cpu")
        found[f"features.{number}.weight"] = weight * (2 / (9 * channels)) ** 0.5
        found[f"features.{number}.bias"] = 0.1 * torch.randn(
            width, generator=generator, device="cpu"
        )
    return found


def plain_relu5_1(weights, image):
    """The 30 layers one after the other, image in [0, 1]."""
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    for number in range(29):
        if number in POOLS:
            x = F.max_pool2d(x, 2)
        elif number in CONVOLUTIONS:
            weight, bias = (
                weights[f"features.{number}.{kind}"].to(x) for kind in ("weight", "bias")
            )
            x = F.conv2d(x, weight, bias, padding=1).clamp(min=0)
    return x


@pytest.mark.parametrize("size", [(16, 16), (33, 50)])
def test_features_and_their_gradient(size):
    weights = random_weights()
    image = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = VGG19(weights).double()(image), plain_relu5_1(weights, image)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # the mean is in float32
    assert 0 < (found == 0).double().mean() < 1, "it is taken after its ReLU"
    into = torch.randn_like(found)
    grads = (torch.autograd.grad(x, image, into)[0] for x in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_it_is_frozen():
    weights = random_weights()
    vgg = VGG19(weights)
    assert not any(p.requires_grad for p in vgg.parameters())
    assert not vgg.training
    assert set(vgg.state_dict()) == {f"features.{n}.{kind}" for n in CONVOLUTIONS for kind in KINDS}
    assert all(torch.equal(x.cpu(), weights[name]) for name, x in vgg.state_dict().items())


def test_building_it_draws_nothing():
    weights = random_weights()
    before = torch.get_rng_state()
    VGG19(weights)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_of_another_network(fault):
    other = dict(random_weights())
    if fault == "missing":
        del other["features.28.bias"]
    else:
        other["features.28.bias"] = torch.zeros(511)
    with pytest.raises(ValueError, match=r"1 of 26 are missing .*\(features\.28\.bias, "):
        VGG19(other)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 15)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"image must be \[N, 3, H, W\], at least 16x16 pixels"):
        VGG19(random_weights())(torch.zeros(shape))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_from_a_file(tmp_path, name):
    tensors = {"features.0.bias": torch.arange(3.0), "classifier.0.bias": torch.ones(2)}
    if name.endswith(".pth"):
        torch.save(tensors, tmp_path / name)
    else:
        from safetensors.torch import save_file

        save_file(tensors, tmp_path / name)
    found = find_vgg19(tmp_path / name)
    assert list(found) == ["features.0.bias"]
    assert torch.equal(found["features.0.bias"].cpu(), torch.arange(3.0, device="cpu"))


def test_weights_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    with pytest.raises(FileNotFoundError, match=r"there is no vgg19-\*\.pth in .*checkpoints") as e:
        find_vgg19()
    assert str(cache) in str(e.value)
    cache.mkdir(parents=True)
    torch.save({"features.0.bias": torch.ones(1)}, cache / "vgg19_bn-c79401a0.pth")
    with pytest.raises(FileNotFoundError):
        find_vgg19()
    torch.save({"features.0.bias": torch.ones(2)}, cache / "vgg19-dcbb9e9d.pth")
    assert find_vgg19()["features.0.bias"].shape == (2,)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RuntimeError, match=r"cannot read .*none\.pth: no such file"):
        find_vgg19(tmp_path / "none.pth")
