"""Checkpoints: every kind of file that loads, every kind that must not, and renaming."""

import sys
from pathlib import Path

import pytest
import torch

from ttsr_fast.model import TTSR, load_model, lte, save_model
from ttsr_fast.model.checkpoint import from_mmagic, read_tensors, to_mmagic

BLOCKS, N_FEATS = (1, 3, 2, 1), 6

# Both in the same order.
OFFICIAL = """
SFE.conv_head SFE.conv_tail conv11_head conv11_tail conv12 conv23 conv22_head conv33_head
ex12.conv12 ex12.conv21 ex12.conv_merge1 ex12.conv_merge2 conv21_tail conv22_tail
ex123.conv12 ex123.conv13 ex123.conv21 ex123.conv23 ex123.conv31_1 ex123.conv31_2 ex123.conv32
ex123.conv_merge1 ex123.conv_merge2 ex123.conv_merge3 conv31_tail conv32_tail conv33_tail
merge_tail.conv13 merge_tail.conv23 merge_tail.conv_merge merge_tail.conv_tail1
merge_tail.conv_tail2
"""
MMAGIC = """
sfe.conv_first sfe.conv_last conv_first1 conv_last1 up1.upsample_conv up2.upsample_conv conv_first2
conv_first3 csfi2.conv1to2 csfi2.conv2to1 csfi2.conv_merge1 csfi2.conv_merge2 conv_last2_1
conv_last2_2 csfi3.conv1to2 csfi3.conv1to4 csfi3.conv2to1 csfi3.conv2to4 csfi3.conv4to1_1
csfi3.conv4to1_2 csfi3.conv4to2 csfi3.conv_merge1 csfi3.conv_merge2 csfi3.conv_merge4 conv_last3_1
conv_last3_2 conv_last3_3 merge_features.conv1to4 merge_features.conv2to4
merge_features.conv_merge merge_features.conv_last1 merge_features.conv_last2
"""
TRUNKS = [
    ("SFE.RBs", "sfe.body", 16),
    ("RB11", "res_block1", 16),
    ("RB21", "res_block2_1", 8),
    ("RB22", "res_block2_2", 8),
    ("RB31", "res_block3_1", 4),
    ("RB32", "res_block3_2", 4),
    ("RB33", "res_block3_3", 4),
]
LTE_LAYERS = ("slice1.0", "slice2.2", "slice2.5", "slice3.7", "slice3.10")


def official_to_mmagic_names():
    pairs = zip(OFFICIAL.split(), MMAGIC.split(), strict=True)
    layers = {f"MainNet.{ours}": f"generator.{theirs}" for ours, theirs in pairs}
    for ours, theirs, count in TRUNKS:
        for i in range(count):
            for conv in ("conv1", "conv2"):
                layers[f"MainNet.{ours}.{i}.{conv}"] = f"generator.{theirs}.{i}.{conv}"
    layers |= {f"LTE.{name}": f"extractor.{name}" for name in LTE_LAYERS}
    layers["LTE.sub_mean"] = "extractor.img_normalize"
    return {f"{a}.{k}": f"{b}.{k}" for a, b in layers.items() for k in ("weight", "bias")}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TTSR(BLOCKS, N_FEATS)


@pytest.fixture
def state(model):
    return dict(model.state_dict())


def assert_same_model(loaded, model):
    wanted = model.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(x, wanted[name]) for name, x in loaded.state_dict().items())
    assert not loaded.training
    assert not loaded.LTE.sub_mean.weight.requires_grad
    assert loaded.LTE.slice3[-2].weight.requires_grad


def test_every_name_has_its_counterpart():
    with torch.device("meta"):
        state = TTSR().state_dict()
    pairs = official_to_mmagic_names()
    assert len(pairs) == len(set(pairs.values())) == 316
    assert state.keys() == pairs.keys()
    theirs = to_mmagic(state)
    assert all(theirs[pairs[name]] is x for name, x in state.items())
    assert list(from_mmagic(theirs).items()) == list(state.items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_save_and_load(model, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"an older file")
    mode = path.stat().st_mode
    save_model(model.to(memory_format=torch.channels_last), path)
    assert_same_model(load_model(path), model)
    assert path.stat().st_mode == mode, "readable by whom the process's umask says"
    assert list(tmp_path.iterdir()) == [path]


def test_own_file_is_an_official_file(model, state, tmp_path):
    save_model(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert content.keys() == state.keys()


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."),
        *("model.", "model._orig_mod.net.", "_fsdp_wrapped_module._orig_mod."),
    ],
)
def test_prefixes_of_wrappers_go(model, state, tmp_path, prefix):
    torch.save({prefix + name: x for name, x in state.items()}, tmp_path / "TTSR.pt")
    assert_same_model(load_model(tmp_path / "TTSR.pt"), model)


def test_wrappers_of_parts_go(model, state, tmp_path):
    """`model.MainNet = torch.compile(model.MainNet)`, in DistributedDataParallel."""
    wrapped = {f"module.{n.replace('MainNet.', 'MainNet._orig_mod.')}": x for n, x in state.items()}
    torch.save(wrapped, tmp_path / "TTSR.pt")
    assert_same_model(load_model(tmp_path / "TTSR.pt"), model)


def test_names_that_would_clash_keep_their_prefix(state, tmp_path):
    twice = state | {"MainNet._orig_mod.conv12.bias": torch.zeros(24)}
    torch.save(twice, tmp_path / "TTSR.pt")
    with pytest.raises(ValueError, match=r"1 superfluous \(MainNet._orig_mod.conv12.bias\)"):
        load_model(tmp_path / "TTSR.pt")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s, other: {"params": s},
        lambda s, other: {"params": other, "params_ema": s},  # BasicSR's convention
        lambda s, other: {"g": other, "g_ema": s},
        lambda s, other: {"model_state_dict": s, "epoch": 3, "loss": 0.5},
        lambda s, other: {"model": s, "optimizer": {"state": {}}},
        lambda s, other: {"model": s, "ema": other},  # nobody says that the average is meant
        lambda s, other: {"generator": s, "discriminator": other},
        lambda s, other: {"net_g": {"state_dict": s}},
        lambda s, other: {"ema": {"n_averaged": torch.tensor(3)} | _prefixed(s)},
    ],
    ids=["params", "params_ema", "g_ema", "tutorial", "model", "ema", "gan", "nested", "averaged"],
)
def test_containers_are_opened(model, state, tmp_path, caplog, wrap):
    content = wrap(state, {name: x + 1 for name, x in state.items()})
    torch.save(content, tmp_path / "TTSR.pt")
    assert_same_model(load_model(tmp_path / "TTSR.pt"), model)
    several = [name for name in content if name in ("params", "g", "ema") and len(content) > 1]
    assert len(caplog.records) == len(several)
    for name in several:
        assert f"not '{name}'" in caplog.messages[0]
        assert str(tmp_path / "TTSR.pt") in caplog.messages[0]


def _prefixed(state):
    return {f"module.{name}": x for name, x in state.items()}


def test_official_names_of_the_frozen_copy_are_ignored(model, state, tmp_path):
    copies = {
        "LTE_copy" + name.removeprefix("LTE"): x for name, x in state.items() if "LTE" in name
    }
    torch.save(state | copies, tmp_path / "TTSR.pt")
    assert_same_model(load_model(tmp_path / "TTSR.pt"), model)


def test_mmagic_file_of_a_whole_training(model, state, tmp_path):
    tensors = to_mmagic(state) | {
        "extractor_copy.slice1.0.bias": torch.zeros(64),
        "discriminator.body.0.bias": torch.zeros(32),
        "perceptual_loss.vgg.vgg_layers.0.bias": torch.zeros(64),
        "step_counter": torch.tensor(7),
    }
    torch.save({"meta": {"iter": 7}, "state_dict": tensors}, tmp_path / "mmagic.pth")
    assert_same_model(load_model(tmp_path / "mmagic.pth"), model)


def test_load_says_nothing_of_random_weights(model, tmp_path, caplog):
    save_model(model, tmp_path / "model.pt")
    lte._say_random.cache_clear()
    load_model(tmp_path / "model.pt")
    assert not caplog.records


def test_sixteen_bit_file_gives_a_float32_model(state, tmp_path):
    torch.save({name: x.half() for name, x in state.items()}, tmp_path / "half.pt")
    for name, x in load_model(tmp_path / "half.pt").state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, state[name].half().float())


def test_options_reach_the_model(model, tmp_path):
    save_model(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt", res_scale=0.5, precision="fp16", backend="torch")
    assert loaded.MainNet.RB11[2].res_scale == 0.5
    assert (loaded.SearchTransfer.precision, loaded.SearchTransfer.backend) == ("fp16", "torch")


@pytest.mark.parametrize("csfi", [True, False])
@pytest.mark.parametrize("hard_attention", [True, False])
def test_parts_that_are_left_out(tmp_path, hard_attention, csfi):
    model = TTSR(BLOCKS, N_FEATS, hard_attention=hard_attention, csfi=csfi)
    save_model(model, tmp_path / "model.pt")
    state = load_model(tmp_path / "model.pt").state_dict()
    assert list(state) == list(model.state_dict())
    missing = 18 * (not hard_attention) + 28 * (not csfi)
    assert len(state) == len(TTSR(BLOCKS, N_FEATS).state_dict()) - missing


def test_soft_attention_is_as_asked_for(model, tmp_path):
    save_model(model, tmp_path / "model.pt")
    inputs = [torch.rand(1, 3, size, size) for size in (3, 12, 12, 12)]
    hard = TTSR(BLOCKS, N_FEATS, soft_attention=False)
    hard.load_state_dict(model.state_dict())
    loaded = load_model(tmp_path / "model.pt", soft_attention=False)
    with torch.no_grad():
        assert torch.equal(loaded(*inputs)[0], hard(*inputs)[0])
        assert not torch.equal(loaded(*inputs)[0], model(*inputs)[0])


def _without(state, *names):
    return {name: x for name, x in state.items() if name not in names}


HEAD = "MainNet.SFE.conv_head.weight"
FAULTS = {
    "missing": (lambda s: _without(s, "LTE.slice3.10.bias"), r"1 missing \(LTE.slice3.10.bias\)"),
    "no head": (lambda s: _without(s, HEAD), rf"1 missing \({HEAD}\); .* of the wrong shape"),
    "superfluous": (lambda s: s | {"extra": torch.ones(1)}, r"checkpoint: 1 superfluous \(extra\)"),
    "shape": (
        lambda s: s | {"MainNet.conv12.bias": torch.ones(3)},
        r"checkpoint: 1 of the wrong shape \(MainNet.conv12.bias \[3\] instead of \[24\]\)",
    ),
    "integer": (
        lambda s: s | {"MainNet.conv12.bias": torch.ones(24, dtype=torch.int64)},
        r"checkpoint: 1 not floating-point \(MainNet.conv12.bias\)",
    ),
    "odd width": (
        lambda s: s | {HEAD: torch.ones(7, 3, 3, 3)},
        r"of the wrong shape \(MainNet.SFE.conv_head.weight \[7, 3, 3, 3\]",
    ),
    "scalar width": (
        lambda s: s | {HEAD: torch.tensor(1.0)},
        r"of the wrong shape \(MainNet.SFE.conv_head.weight \[\]",
    ),
    "gap": (
        lambda s: _without(s, "MainNet.RB11.1.conv1.bias", "MainNet.RB11.1.conv1.weight"),
        r"2 missing \(MainNet.RB11.1.conv1.weight, MainNet.RB11.1.conv1.bias\)$",
    ),
    "all at once": (
        lambda s: (
            {n: x for n, x in s.items() if not n.startswith("LTE")}
            | {"extra": torch.ones(1), "MainNet.conv12.bias": torch.ones(3)}
        ),
        r"12 missing \(.*, \.\.\.\); 1 superfluous \(extra\); 1 of the wrong shape",
    ),
    "another network": (lambda s: {"fc.weight": torch.ones(2, 2)}, r"superfluous \(fc.weight\)"),
    "half a prefix": (
        lambda s: {("module." if "LTE" in n else "") + n: x for n, x in s.items()},
        r"12 missing .*; 12 superfluous \(module\.",
    ),
    "unknown mmagic layer": (
        lambda s: to_mmagic(s) | {"generator.extra.bias": torch.ones(1)},
        r"checkpoint: 1 superfluous \(generator.extra.bias\)",
    ),
    "control characters": (
        lambda s: s | {"a\x1b[2J\n" + 10**6 * "b": torch.ones(1)},
        r"checkpoint: 1 superfluous \(a\\x1b\[2J\\nb{194}\)$",
    ),
    "empty": (lambda s: {}, "missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tensors(state, tmp_path, fault):
    change, message = FAULTS[fault]
    path = tmp_path / "wrong.pt"
    torch.save(change(state), path)
    with pytest.raises(ValueError, match=r"wrong\.pt is not a TTSR checkpoint: ") as caught:
        load_model(path)
    assert caught.match(message)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), "a Tensor"),
        ([torch.ones(3)], "a list"),
        ({"epoch": 3}, "a dict of 1 ('epoch': int)"),
        ({3: torch.ones(1)}, "a dict of 1 ('3': Tensor)"),
        ({"a\x1b[2J\n": 1}, "a dict of 1 ('a\\x1b[2J\\n': int)"),
        ({"state_dict": {"a": 1}}, "a dict of 1 ('a': int) under 'state_dict'"),
        (
            {"mine": {}, "x": 1, "y": 2, "z": 3},
            "a dict of 4 ('mine': dict, 'x': int, 'y': int, ...)",
        ),
    ],
)
def test_foreign_content(tmp_path, content, found):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(
        ValueError, match=r"foreign\.pt must hold a dict of tensors by name"
    ) as caught:
        load_model(tmp_path / "foreign.pt")
    assert str(caught.value).endswith(f"got {found}")


def test_a_container_of_itself_is_refused(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt must hold a dict of tensors by name"):
        load_model(tmp_path / "foreign.pt")


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(state, tmp_path, legacy):
    victim = tmp_path / "victim"
    content = {"state_dict": state, "meta": Malicious(victim)}
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(RuntimeError, match=r"cannot read .*evil\.pt: .*Python objects") as caught:
        load_model(tmp_path / "evil.pt")
    assert caught.value.__cause__ is not None
    assert not victim.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_file(model, tmp_path, suffix, damage):
    path = tmp_path / f"damaged{suffix}"
    save_model(model, path)
    content = path.read_bytes()
    path.write_bytes(
        {"empty": b"", "text": b"<html>404</html>", "truncated": content[: len(content) // 2]}[
            damage
        ]
    )
    with pytest.raises(RuntimeError, match=r"cannot read .*damaged.*: it is damaged") as caught:
        load_model(path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["none.pt", "none.safetensors", ""])
def test_no_file(tmp_path, name):
    with pytest.raises(RuntimeError, match="no such file"):
        load_model(tmp_path / name)


def test_reading_keeps_names_and_dtypes(tmp_path):
    tensors = {"a.b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(tensors, tmp_path / "any.pth")
    read = read_tensors(tmp_path / "any.pth")
    assert read.keys() == tensors.keys()
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        assert torch.equal(read[name], x)


def test_without_safetensors(model, tmp_path, monkeypatch):
    save_model(model, tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match="pip install safetensors"):
        load_model(tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="pip install safetensors"):
        save_model(model, tmp_path / "other.safetensors")


def test_save_refuses(model, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt or \.pth"):
        save_model(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="existing folder"):
        save_model(model, tmp_path / "none" / "model.pt")
    with pytest.raises(TypeError, match="unwrapped, got DataParallel"):
        save_model(torch.nn.DataParallel(model), tmp_path / "model.pt")
