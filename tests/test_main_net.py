"""The main network against a restatement in plain functions of its weights."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from ttsr_fast.model import MainNet
from ttsr_fast.model.main_net import _CompiledUp, _up


def plain_main_net(weights, blocks, res_scale, lr, s, t3, t2, t1, hard=True, soft=True, csfi=True):
    """Texture transformer of arXiv 2006.04139 on 1x, 2x and 4x, from a dict of weights."""

    def conv(name, *parts, stride=1):
        weight = weights[name + ".weight"]
        bias, padding = weights[name + ".bias"], weight.shape[-1] // 2
        return F.conv2d(torch.cat(parts, 1), weight, bias, stride=stride, padding=padding)

    def relu(name, *parts, stride=1):
        return conv(name, *parts, stride=stride).clamp(min=0)

    def bicubic(x, factor):
        size = [factor * n for n in x.shape[2:]]
        return F.interpolate(x, size=size, mode="bicubic", align_corners=False)

    def trunk(name, count, x):
        for i in range(count):
            x = x + res_scale * conv(f"{name}.{i}.conv2", relu(f"{name}.{i}.conv1", x))
        return x

    def shuffled(name, x):
        return F.pixel_shuffle(conv(name, x), 2).clamp(min=0)

    def attended(name, x, factor, texture):
        weight = bicubic(s, factor) if soft else 1
        return x + weight * conv(name, x, texture) if hard else x

    x0 = relu("SFE.conv_head", lr)
    x = x0 + conv("SFE.conv_tail", trunk("SFE.RBs", blocks[0], x0))
    x11 = attended("conv11_head", x, 1, t3)
    x11 = x11 + conv("conv11_tail", trunk("RB11", blocks[1], x11))

    x22 = attended("conv22_head", shuffled("conv12", x11), 2, t2)
    out1, out2 = x11, x22
    if csfi:
        a = relu("ex12.conv12", bicubic(x11, 2))
        b = relu("ex12.conv21", x22, stride=2)
        out1, out2 = relu("ex12.conv_merge1", x11, b), relu("ex12.conv_merge2", x22, a)
    x21 = x11 + conv("conv21_tail", trunk("RB21", blocks[2], out1))
    x22 = x22 + conv("conv22_tail", trunk("RB22", blocks[2], out2))

    x33 = attended("conv33_head", shuffled("conv23", x22), 4, t1)
    outs = (x21, x22, x33)
    if csfi:
        to12, to13 = (relu(f"ex123.conv1{k}", bicubic(x21, f)) for k, f in ((2, 2), (3, 4)))
        to21, to23 = relu("ex123.conv21", x22, stride=2), relu("ex123.conv23", bicubic(x22, 2))
        to31 = relu("ex123.conv31_2", relu("ex123.conv31_1", x33, stride=2), stride=2)
        to32 = relu("ex123.conv32", x33, stride=2)
        outs = (
            relu("ex123.conv_merge1", x21, to21, to31),
            relu("ex123.conv_merge2", x22, to12, to32),
            relu("ex123.conv_merge3", x33, to13, to23),
        )
    x31, x32, x33 = (
        own + conv(f"conv3{k}_tail", trunk(f"RB3{k}", blocks[3], out))
        for k, own, out in zip((1, 2, 3), (x21, x22, x33), outs, strict=True)
    )

    y13 = relu("merge_tail.conv13", bicubic(x31, 4))
    y23 = relu("merge_tail.conv23", bicubic(x32, 2))
    y = conv("merge_tail.conv_tail1", relu("merge_tail.conv_merge", x33, y13, y23))
    return conv("merge_tail.conv_tail2", y).clamp(-1, 1)


def random_inputs(n, h, w):
    lr = torch.rand(n, 3, h, w, dtype=torch.float64) * 2 - 1
    s = torch.rand(n, 1, h, w, dtype=torch.float64)
    textures = [
        torch.rand(n, c, f * h, f * w, dtype=torch.float64)
        for c, f in ((256, 1), (128, 2), (64, 4))
    ]
    return lr, s, *textures


@pytest.mark.parametrize(
    ("blocks", "n_feats", "res_scale", "size"),
    [
        ((1, 1, 1, 1), 8, 1.0, (5, 7)),
        ((3, 2, 1, 0), 8, 0.25, (4, 4)),
        ((1, 1, 1, 1), 6, 1.0, (1, 1)),
        ((16, 16, 8, 4), 64, 1.0, (3, 4)),
    ],
)
def test_image_and_gradients(blocks, n_feats, res_scale, size):
    net = MainNet(blocks, n_feats, res_scale).double()
    inputs = [x.requires_grad_() for x in random_inputs(2, *size)]
    leaves = inputs + list(net.parameters())
    image = net(*inputs)
    plain = plain_main_net(dict(net.named_parameters()), blocks, res_scale, *inputs)
    torch.testing.assert_close(image, plain, rtol=1e-10, atol=1e-12)

    into = torch.randn_like(image)
    ours = torch.autograd.grad(image, leaves, into)
    theirs = torch.autograd.grad(plain, leaves, into)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


SWITCHES = ("hard_attention", "soft_attention", "csfi")


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)), ids=str)
def test_parts_that_are_left_out(switches):
    blocks = (1, 2, 1, 1)
    net = MainNet(blocks, 6, 0.5, **dict(zip(SWITCHES, switches, strict=True))).double()
    inputs = random_inputs(2, 4, 5)
    weights = dict(net.named_parameters())
    given = inputs if switches[0] else (inputs[0], None, None, None, None)
    image, plain = net(*given), plain_main_net(weights, blocks, 0.5, *inputs, *switches)
    torch.testing.assert_close(image, plain, rtol=1e-10, atol=1e-12)

    into = torch.randn_like(image)
    ours = torch.autograd.grad(image, list(weights.values()), into)
    theirs = torch.autograd.grad(plain, list(weights.values()), into)
    for x, y in zip(ours, theirs, strict=True):
        assert x.abs().sum() > 0, "a weight that nothing depends on"
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_names_of_parts_that_are_left_out():
    whole = set(MainNet((1, 1, 1, 1), 8).state_dict())

    def missing(**switches):
        return whole - set(MainNet((1, 1, 1, 1), 8, **switches).state_dict())

    assert missing(soft_attention=False) == set()
    heads = {f"conv{k}_head.{kind}" for k in (11, 22, 33) for kind in ("weight", "bias")}
    assert missing(hard_attention=False) == heads
    assert missing(csfi=False) == {name for name in whole if name.startswith("ex")}


def test_image_is_clamped():
    net = MainNet((1, 1, 1, 1), 8).double()
    inputs = random_inputs(1, 4, 5)
    with torch.no_grad():
        net.merge_tail.conv_tail2.bias.copy_(torch.tensor([3.0, -3.0, 0.0]))
        image = net(*inputs)
    assert (image[:, 0] == 1).all()
    assert (image[:, 1] == -1).all()
    assert (image[:, 2].abs() < 1).all()


def test_published_size():
    assert sum(p.numel() for p in MainNet().parameters()) == 6_174_275


@pytest.mark.parametrize(
    ("blocks", "n_feats", "message"),
    [
        ((16, 16, 8), 64, r"num_res_blocks must be four counts, got \(16, 16, 8\)"),
        ((1, 1, -1, 1), 64, r"num_res_blocks must be four counts, got \(1, 1, -1, 1\)"),
        ((1, 1, 1, 1), 7, "n_feats must be even and positive, got 7"),
        ((1, 1, 1, 1), 0, "n_feats must be even and positive, got 0"),
    ],
)
def test_sizes_that_make_no_network(blocks, n_feats, message):
    with pytest.raises(ValueError, match=message):
        MainNet(blocks, n_feats)


# --- compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_enlargement_for_the_compiler_is_bicubic(factor, layout):
    """Bit for bit, with both of its gradients."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    y, plain = _CompiledUp.apply(x, factor), F.interpolate(x, scale_factor=factor, mode="bicubic")
    assert torch.equal(y, plain)
    into = torch.randn_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, into)[0] for out in (y, plain)))
    x = x.detach()[:1].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: _CompiledUp.apply(x, factor), x)


def test_no_gradient_is_compiled_to_scatters():
    """Inductor of torch 2.13 sums some of them before they are filled."""
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    net = MainNet((0, 0, 0, 0), 4)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    inputs = [x.float().requires_grad_() for x in random_inputs(1, 4, 5)]
    out = torch.compile(net, backend=backend, fullgraph=True)(*inputs)
    ours = torch.autograd.grad(out.sum(), list(net.parameters()))
    theirs = torch.autograd.grad(net(*inputs).sum(), list(net.parameters()))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    forward, backward = graphs
    assert not [name for name in forward + backward if "index_put" in name or "scatter" in name]
    assert backward.count("aten.upsample_bicubic2d_backward.default") == 8


def test_compiled_gradients_are_those_of_eager():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(up(x, 2).square().sum(), x)[0]
        for up in (torch.compile(_up, fullgraph=True), _up)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
