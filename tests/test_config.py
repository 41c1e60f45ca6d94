"""Configuration: presets, files, overrides, official names, errors."""

import re
import time
from pathlib import Path

import pytest

from ttsr_fast.functional import PRECISIONS
from ttsr_fast.operators.backends import BACKENDS
from ttsr_fast.training.config import PRESETS, Config, load_config, to_dict, to_yaml
from ttsr_fast.training.settings import explained

each = pytest.mark.parametrize


def test_presets_are_the_published_recipes():
    """SPEC: arXiv 2006.04139, section 4.1, and train.sh of the official repository."""
    ttsr, rec = load_config("ttsr"), load_config("ttsr-rec")
    for config in (ttsr, rec):
        assert config.model.num_res_blocks == [16, 16, 8, 4]
        assert (config.model.n_feats, config.model.res_scale) == (64, 1)
        assert (config.data.size, config.data.batch_size) == (160, 9)
        assert (config.optim.lr_rate, config.optim.lr_rate_lte) == (1e-4, 1e-5)
        assert (config.optim.lr_rate_dis, config.optim.decay) == (1e-4, None)
        assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.999, 1e-8)
        assert (config.optim.clip, config.optim.ema, config.run.amp) == (None, None, None)
        assert (config.loss.rec_type, config.loss.tpl_type, config.loss.tpl_use_S) == (
            *("l1", "l2"),
            False,
        )
    loss = ttsr.loss
    assert (loss.rec_w, loss.per_w, loss.tpl_w, loss.adv_w) == (1, 1e-2, 1e-2, 1e-3)
    assert (loss.gan_type, loss.gan_k, loss.penalty) == ("wgan-gp", 2, 10)
    assert (rec.loss.rec_w, rec.loss.per_w, rec.loss.tpl_w, rec.loss.adv_w) == (1, 0, 0, 0)
    assert (ttsr.run.num_init_epochs, ttsr.run.num_epochs) == (2, 50)
    assert (rec.run.num_init_epochs, rec.run.num_epochs) == (0, 200)


@each(
    ("official", "key", "value"),
    [
        ("num_res_blocks=16+8+4+2", "model.num_res_blocks", [16, 8, 4, 2]),
        ("n_feats=32", "model.n_feats", 32),
        ("res_scale=0.5", "model.res_scale", 0.5),
        ("model_path=a.pt", "model.weights", "a.pt"),
        ("dataset=CUFED", "data.layout", "cufed"),
        ("dataset_dir=/data/CUFED/", "data.root", "/data/CUFED/"),
        ("num_workers=9", "data.num_workers", 9),
        ("batch_size=3", "data.batch_size", 3),
        ("train_crop_size=40", "data.size", 160),
        ("train_crop_size=24", "data.size", 96),
        ("rec_w=2", "loss.rec_w", 2.0),
        ("per_w=1e-2", "loss.per_w", 0.01),
        ("tpl_w=0.1", "loss.tpl_w", 0.1),
        ("adv_w=1e-3", "loss.adv_w", 0.001),
        ("tpl_use_S=True", "loss.tpl_use_S", True),
        ("tpl_type=l1", "loss.tpl_type", "l1"),
        ("GAN_type=WGAN_GP", "loss.gan_type", "wgan-gp"),
        ("GAN_type=GAN", "loss.gan_type", "gan"),
        ("GAN_k=3", "loss.gan_k", 3),
        ("lr_rate=2e-4", "optim.lr_rate", 2e-4),
        ("lr_rate_dis=3e-4", "optim.lr_rate_dis", 3e-4),
        ("lr_rate_lte=0", "optim.lr_rate_lte", 0.0),
        ("beta1=0.5", "optim.beta1", 0.5),
        ("beta2=0.9", "optim.beta2", 0.9),
        ("eps=1e-6", "optim.eps", 1e-6),
        ("decay=999999", "optim.decay", 999999),
        ("gamma=0.1", "optim.gamma", 0.1),
        ("save_dir=./train/CUFED/TTSR", "run.out", "./train/CUFED/TTSR"),
        ("cpu=True", "run.cpu", True),
        ("num_init_epochs=1", "run.num_init_epochs", 1),
        ("num_epochs=7", "run.num_epochs", 7),
        ("print_every=600", "run.print_every", 600),
        ("save_every=10", "run.save_every", 10),
        ("val_every=10", "run.val_every", 10),
    ],
)
def test_official_options_are_keys(official, key, value, tmp_path):
    part, _, name = key.partition(".")
    assert to_dict(load_config(None, [official]))[part][name] == value
    file = tmp_path / "official.yaml"
    file.write_text(official.replace("=", ": ", 1))
    assert to_dict(load_config(file))[part][name] == value


def test_later_values_take_precedence(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("preset: ttsr-rec\nmodel:\n  n_feats: 32\nloss: {per_w: 0.5}\nlr_rate: 1e-3\n")
    config = load_config(file, ["model.n_feats=16", "n_feats=8", "run={seed: 4}"])
    assert (config.model.n_feats, config.run.seed) == (8, 4)
    assert (config.loss.per_w, config.optim.lr_rate) == (0.5, 1e-3)
    assert (config.run.num_init_epochs, config.run.num_epochs) == (0, 200)  # the preset's


@each("preset", PRESETS)
def test_the_printed_configuration_is_read_back(preset, tmp_path):
    config = load_config(preset, ["run.out=a b", "data.references=[1, 5]", "save_steps=7"])
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config


@each(
    "value",
    ["a\nb", "a, b", "# x", "x # y", "1e-5", "2026-11-28", "null", "", " ", "größe", "\x85\udc80"],
)
def test_any_text_is_printed_in_one_line(value, tmp_path):
    """Beside its explanation or below it, quoted where YAML needs that."""
    paths = {"out": value, "root": 60 * value, "references": [1, value, {value: None}, value]}
    config = load_config("tiny", values=paths)
    text = to_yaml(config)
    (tmp_path / "printed.yaml").write_bytes(text.encode())
    assert load_config(tmp_path / "printed.yaml") == config
    assert all(line[:2] in ("", "# ", "  ") or re.match(r"\w+:  # ", line) for line in lines(text))


def test_a_path_is_printed_as_text(tmp_path):
    config = Config()
    config.run.out = Path("a b")
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml").run.out == "a b"


def test_every_key_is_explained():
    """With its choices and the meaning of null, in lines that fit into 80 columns."""
    text = to_yaml(Config())
    assert max(map(len, lines(text))) <= 80
    assert text.isascii()
    words = re.sub(r"\n +# ", " ", text)  # explanations in one line each
    for part, help, keys in explained(Config()):
        assert f"\n\n{part}:  # {help}\n" in text
        for key in keys:
            assert re.search(rf"\n  {key.name}: \S.* # {re.escape(key.help)}\n", words)
            assert ("null: " in key.help) == (key.value is None and key.name not in ("root", "out"))
    assert "; one of l1, l2\n" in words
    assert ", ".join(PRECISIONS) in words and ", ".join(BACKENDS) in words


def lines(text):
    return text.split("\n")


@each(
    ("override", "message"),
    [
        ("n_feat=3", "unknown key n_feat, did you mean model.n_feats\\?"),
        ("btach_size=4", "unknown key btach_size, did you mean data.batch_size\\?"),
        ("data.batchsize=4", "unknown key data.batchsize, did you mean data.batch_size\\?"),
        ("optim.batch_size=4", "unknown key optim.batch_size, did you mean data.batch_size\\?"),
        ("lr=1", "unknown key lr, did you mean optim.lr_rate\\?"),
        ("epochs=1", "unknown key epochs, did you mean run.num_epochs\\?"),
        ("Save-Dir=a", "unknown key Save-Dir, did you mean run.out\\?"),
        ("dataset_dri=a", "unknown key dataset_dri, did you mean data.root\\?"),
        ("model.q=1", "unknown key model.q, ttsr-fast train --show prints all keys"),
        ("loss.n_feats=2", "unknown key loss.n_feats, did you mean model.n_feats\\?"),
        ("model=3", "model is a part, and its keys are set one by one: model.KEY=VALUE"),
        ("n_feats", "an override must be key=value, got 'n_feats'"),
        ("n_feats=3", "model.n_feats must be even and positive, got 3"),
        ("n_feats=x", "model.n_feats cannot be 'x': Value 'x' of type 'str' could not .*Integer"),
        ("n_feats=null", "model.n_feats cannot be None: .*not Optional"),
        ("num_res_blocks=1+2", "model.num_res_blocks must be four numbers.*, got \\[1, 2\\]"),
        ("num_res_blocks=1+a+3+4", "model.num_res_blocks cannot be .*'a'.*"),
        ("lr_rate=nan", "optim.lr_rate must be finite and at least 0, got nan"),
        ("lr_rate=[", "lr_rate has a value that is no YAML: .*"),
        ("lr_rate=0", "optim.lr_rate must be positive, got 0.0"),
        ("beta1=1", "optim.beta1 must be at least 0 and below 1, got 1.0"),
        ("ema=1.5", "optim.ema must be at least 0 and below 1, got 1.5"),
        ("clip=0", "optim.clip must be positive, got 0.0"),
        ("batch_size=0", "data.batch_size must be at least 1, got 0"),
        ("size=50", "data.size must be a multiple of 4, 16 or more, got 50"),
        ("layout=coco", "data.layout must be one of cufed, .*, photographs, got coco"),
        ("unrelated=2", "data.unrelated must be from 0 to 1, got 2.0"),
        ("GAN_type=LSGAN", "loss.gan_type must be one of wgan-gp, gan, got LSGAN"),
        ("rec_w=-1", "loss.rec_w must be finite and at least 0, got -1.0"),
        ("amp=int8", "run.amp must be one of None, fp16, bf16, got int8"),
        ("accumulate=2", "data.batch_size must be a multiple of 2 parts, got 9"),
        ("size=48", "data.size must be a multiple of 32 for the adversarial loss, got 48"),
        ("hard_attention=no", "loss.tpl_w must be 0 without model.hard_attention, got 0.01"),
        ("run={num_init_epochs: 0, num_epochs: 0}", "run.num_epochs must be positive, .*"),
        ("reset=True", "reset is an option of the official program only: nothing is ever .*"),
        ("num_gpu=4", "num_gpu is an option of the official program only: .*accelerate launch.*"),
        ("out=${nothing}", "run.out must not refer to other values .*, got '\\${nothing}'"),
        ("n_feats=???", ".*missing mandatory value: n_feats"),
        ("lr_rate=!!float 1", "lr_rate has a value that is no YAML: tag .*:float in line 1"),
        ("n_feats=&a 4", "n_feats has a value that is no YAML: anchor or alias in line 1"),
        ("n_feats=" + 5000 * "9", "n_feats has a value that is no YAML: Exceeds the limit .*"),
    ],
)
def test_invalid_values_are_refused(override, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        load_config("ttsr", [override])


LAUGHS = ["a: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 9)
]


@each(
    ("content", "message"),
    [
        ("\n".join(LAUGHS), "anchor or alias in line 1"),
        ("model:\n  weights: !!python/object/apply:os.system [ls]", "tag .*os.system in line 2"),
        ("model: !!python/name:os.system", "tag tag:yaml.org,2002:python/name:os.system in line 1"),
        ("data: !include /etc/passwd", "tag !include in line 1"),
        (10_000 * "[", "too deep a nesting in line 1"),
        (10_000 * "{a: ", "too deep a nesting in line 1"),
        ("n_feats: 4\nn_feats: 8", "duplicate or impossible key 'n_feats' in line 2"),
        ("model:\n  n_feats: 4\n  n_feats: 8", "duplicate or impossible key 'n_feats' in line 3"),
        ("<<: {n_feats: 4}", "duplicate or impossible key '<<' in line 1"),
        ("[1, 2]: 3", "duplicate or impossible key 'sequence' in line 1"),
        ("a: 1\n---\nb: 2", "but found another document in line 2"),
        ("n_feats: 4\0", "unacceptable character #x0000: special characters are not allowed"),
        ("#" * 2**16 + "\n", " of settings: it has more than 65536 bytes"),
        ("seed: " + "1:" * 20_000 + "1", "^run.seed must have at most 63 bits, got 118"),
    ],
    ids=lambda x: x[:20],
)
def test_hostile_files_are_refused_at_once(content, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load_config(tmp_path / "bad.yaml")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


@each(
    ("text", "key"),
    [
        ('data: {root: "${oc.env:SECRET_TOKEN}"}', "data.root"),
        ("model:\n  weights: x${oc.env:SECRET_TOKEN}", "model.weights"),
        ("n_feats: ${oc.decode:${oc.env:SECRET_TOKEN}}", "model.n_feats"),
        ('data: {references: [1, {a: ["${data.root}"]}]}', "data.references"),
        ('data: {references: {"${oc.env:SECRET_TOKEN}": 1}}', "data.references"),
        ("out: ${", "run.out"),
        ("num_res_blocks: ${oc.env:SECRET_TOKEN}+1", "model.num_res_blocks"),
    ],
)
def test_no_references_to_other_values(text, key, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"^{key} must not refer to other values with") as caught:
        load_config(tmp_path / "own.yaml")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"^{key} must not refer to other values with"):
        load_config(None, [f"{key}=${{oc.env:SECRET_TOKEN}}"])


def test_values_are_taken_as_they_are():
    config = load_config("tiny", ["run.out=a"], values={"run.out": "[1, 2", "data.root": "1e5"})
    assert (config.run.out, config.data.root) == ("[1, 2", "1e5")
    with pytest.raises(ValueError, match=r"^run.out must not refer to other values"):
        load_config("tiny", values={"run.out": "${oc.env:HOME}"})


@each("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@each("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(encoding, end, tmp_path):
    lines = ["preset: tiny", "run:", "  out: größe", "  seed: 4", ""]
    (tmp_path / "own.yaml").write_bytes(end.join(lines).encode(encoding))
    config = load_config(tmp_path / "own.yaml")
    assert (config.run.out, config.run.seed) == ("größe", 4)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "own.yaml").write_bytes("out: größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.yaml is not a YAML file: it is not in UTF-8$"):
        load_config(tmp_path / "own.yaml")


def test_a_date_is_a_name(tmp_path):
    (tmp_path / "own.yaml").write_text("out: 2026-11-28")
    assert load_config(tmp_path / "own.yaml").run.out == "2026-11-28"


@each(
    ("content", "message"),
    [
        (
            "model: [1",
            "{file} is not a YAML file: expected ',' or ']', but got '<stream end>' in line 1",
        ),
        ("- 1\n- 2", "{file} must hold keys and values, got a list"),
        ("preset: best", "preset must be one of tiny, ttsr, ttsr-rec, got best"),
        ("widths: 3", "unknown key widths, ttsr-fast train --show prints all keys"),
    ],
)
def test_bad_files_are_refused(content, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(file=file))}$"):
        load_config(file)


def test_an_unknown_preset_is_refused():
    with pytest.raises(
        ValueError, match="no preset \\(tiny, ttsr, ttsr-rec\\) and no file .* best"
    ):
        load_config("best")
    with pytest.raises(ValueError, match=r"the name ttsr-rex, did you mean ttsr-rec\?$"):
        load_config("ttsr-rex")
