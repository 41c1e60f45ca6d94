"""What a training does: one dataclass for each part, read from a preset or YAML file and overrides.

A key is `part.field`. The name of the field is enough, as no two parts share one, and the options
of the official program (researchmm/TTSR, option.py) are taken under their own names too.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ttsr_fast.training import yaml_files
from ttsr_fast.training.yaml_files import check_plain

PRESET_FOLDER = Path(__file__).parent / "presets"
SETTINGS = "training.yaml"  # in the folder of a training: what it was asked for
PRESETS = tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))


@dataclass
class Model:
    """The generator; the switches are the paper's ablations (section 4.3)."""

    num_res_blocks: list[int] = field(default_factory=lambda: [16, 16, 8, 4])
    n_feats: int = 64
    res_scale: float = 1.0
    hard_attention: bool = True
    soft_attention: bool = True
    csfi: bool = True
    weights: str | None = None  # a checkpoint whose generator it starts from
    start: str = "random"  # without one; enlargement: at the enlarged picture, for short trainings
    vgg19: str = "auto"  # a file with VGG19's weights; auto: if they are found; none: random
    precision: str | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        blocks = self.num_res_blocks
        good = len(blocks) == 4 and min(blocks) >= 0
        _require("model.num_res_blocks", blocks, good, "four numbers, such as 16+16+8+4")
        good = self.n_feats >= 2 and self.n_feats % 2 == 0
        _require("model.n_feats", self.n_feats, good, "even and positive")
        _require_finite("model.res_scale", self.res_scale)
        _require_one_of("model.start", self.start, ("random", "enlargement"))


@dataclass
class Data:
    """The pictures; `size` is that of HR and of the reference."""

    layout: str = "cufed"
    root: str | None = None
    references: Any = None  # as `ttsr_fast.pairs.find_pairs` takes them
    validation: str | None = None  # held-out pictures
    validation_layout: str | None = None  # as layout
    size: int = 160
    batch_size: int = 9  # of a step, over all processes
    augment: bool = True
    mask_padding: bool = False
    crops_per_photo: int = 8
    unrelated: float | None = None  # share; 0.1, or 0 where there is one photograph alone
    candidates: int = 4  # places in a photograph of which the one with most detail is taken
    longest: int | None = None  # photographs with a longer side are reduced to it
    on_error: str = "raise"
    on_change: str = "raise"  # accept: a training goes on with other files than before
    num_workers: int = 4

    def __post_init__(self) -> None:
        _require_one_of("data.layout", self.layout, LAYOUTS)
        _require_one_of("data.validation_layout", self.validation_layout, (None, *LAYOUTS))
        _require_one_of("data.on_error", self.on_error, ("raise", "skip"))
        _require_one_of("data.on_change", self.on_change, ("raise", "accept"))
        good = self.size >= 16 and self.size % 4 == 0
        _require("data.size", self.size, good, "a multiple of 4, 16 or more")
        for name in ("batch_size", "crops_per_photo", "candidates", "longest"):
            _require_at_least(f"data.{name}", getattr(self, name), 1)
        _require_at_least("data.num_workers", self.num_workers, 0)
        share = self.unrelated or 0
        _require("data.unrelated", share, 0 <= share <= 1, "from 0 to 1")


@dataclass
class Loss:
    """Kinds and weights of the losses (section 3.3); a weight of 0 leaves a loss out."""

    rec_w: float = 1.0
    per_w: float = 0.0
    tpl_w: float = 0.0
    adv_w: float = 0.0
    rec_type: str = "l1"
    tpl_type: str = "l2"
    tpl_use_S: bool = False
    gan_type: str = "wgan-gp"
    gan_k: int = 2  # steps of the discriminator for each one of the generator
    penalty: float = 10.0

    def __post_init__(self) -> None:
        for name in ("rec_w", "per_w", "tpl_w", "adv_w", "penalty"):
            _require_finite(f"loss.{name}", getattr(self, name), 0)
        _require("loss.rec_w", self.rec_w, self.rec_w > 0, "positive")
        _require_one_of("loss.rec_type", self.rec_type, ("l1", "l2"))
        _require_one_of("loss.tpl_type", self.tpl_type, ("l1", "l2"))
        _require_one_of("loss.gan_type", self.gan_type, ("wgan-gp", "gan"))
        _require_at_least("loss.gan_k", self.gan_k, 1)


@dataclass
class Optim:
    """Adam and what goes with it."""

    lr_rate: float = 1e-4  # of MainNet
    lr_rate_lte: float = 1e-5  # 0 freezes LTE
    lr_rate_dis: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay: int | None = None  # epochs with all losses until the rates are multiplied by gamma
    gamma: float = 0.5
    clip: float | None = None  # norm to which the generator's gradients are clipped
    ema: float | None = None  # decay of an average of the weights, such as 0.999

    def __post_init__(self) -> None:
        for name in ("lr_rate", "lr_rate_lte", "lr_rate_dis", "eps", "gamma"):
            _require_finite(f"optim.{name}", getattr(self, name), 0)
        _require("optim.lr_rate", self.lr_rate, self.lr_rate > 0, "positive")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            good = value is None or 0 <= value < 1
            _require(f"optim.{name}", value, good, "at least 0 and below 1")
        _require("optim.clip", self.clip, self.clip is None or self.clip > 0, "positive")
        _require_at_least("optim.decay", self.decay, 1)


@dataclass
class Run:
    """How long, where, and what is kept."""

    out: str | None = None
    seed: int = 0
    num_init_epochs: int = 2  # with the reconstruction loss alone
    num_epochs: int = 50  # then with all losses
    accumulate: int = 1  # parts in which a batch is worked through, to need less memory
    amp: str | None = None  # fp16 or bf16
    cpu: bool = False
    print_every: int = 10  # steps
    val_every: int = 1  # epochs
    save_every: int = 1  # epochs
    save_steps: int | None = None  # and within epochs

    def __post_init__(self) -> None:
        _require_one_of("run.amp", self.amp, (None, "fp16", "bf16"))
        for name in ("accumulate", "print_every", "val_every", "save_every", "save_steps"):
            _require_at_least(f"run.{name}", getattr(self, name), 1)
        for name in ("num_init_epochs", "num_epochs", "seed"):
            _require_at_least(f"run.{name}", getattr(self, name), 0)
        epochs = self.num_init_epochs + self.num_epochs
        _require("run.num_epochs", self.num_epochs, epochs > 0, "positive, or num_init_epochs is")


@dataclass
class Config:
    """All of a training."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        size, parts = self.data.size, self.run.accumulate
        good = self.loss.adv_w == 0 or size % 32 == 0
        _require("data.size", size, good, "a multiple of 32 for the adversarial loss")
        good = self.data.batch_size % parts == 0
        _require("data.batch_size", self.data.batch_size, good, f"a multiple of {parts} parts")
        good = self.loss.tpl_w == 0 or self.model.hard_attention
        _require("loss.tpl_w", self.loss.tpl_w, good, "0 without model.hard_attention")


LAYOUTS = ("cufed", "cufed5", "sun80", "urban100", "manga109", "folders", "photographs")
_PARTS = {part.name: part.default_factory for part in fields(Config)}
_PART_OF = {x.name: name for name, part in _PARTS.items() for x in fields(part)}  # type: ignore[arg-type]


def _official_gan(value: Any) -> Any:
    return {"WGAN_GP": "wgan-gp", "GAN": "gan"}.get(str(value), value)


def _quadruple(value: Any) -> Any:
    return 4 * value if isinstance(value, int) else value


def _blocks(value: Any) -> Any:
    """`16+16+8+4`, as the official program reads it."""
    return value.split("+") if isinstance(value, str) else value


# Official options under another name here, with what makes our value of theirs.
_OFFICIAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "GAN_type": ("loss.gan_type", _official_gan),
    "GAN_k": ("loss.gan_k", lambda value: value),
    "dataset": ("data.layout", lambda value: str(value).lower()),
    "dataset_dir": ("data.root", lambda value: value),
    "train_crop_size": ("data.size", _quadruple),  # theirs is that of LR
    "model_path": ("model.weights", lambda value: value),
    "save_dir": ("run.out", lambda value: value),
}
_INSTEAD = {
    "num_gpu": "start the program with accelerate launch --num_processes",
    "reset": "nothing is ever deleted; choose another folder",
    "eval": "use ttsr-fast eval",
    "eval_save_results": "use ttsr-fast eval",
    "log_file_name": "scalars are logged to TensorBoard in the folder logs",
    "logger_name": "scalars are logged to TensorBoard in the folder logs",
}


def load_config(
    source: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    values: Mapping[str, Any] | None = None,
) -> Config:
    """A preset or a YAML file with overrides, checked.

    No file but `source` is read, and no variable of the environment.

    Args:
        source: the name of a preset (`PRESETS`) or a YAML file, which may name one that it starts
            from as `preset: NAME`; None for the defaults.
        overrides: `key=value`, the later the stronger; values are written as in YAML.
        values: keys with values that are taken as they are, the strongest.

    Raises:
        ValueError: no such preset or file, no plain YAML, an unknown key, a value that is
            impossible or refers to others (`${...}`).
        ImportError: OmegaConf is missing.
    """
    given = [*_read(source), *(pair for text in overrides for pair in _override(text))]
    given += _flat(values or {})
    return _merged({_full_key(key): _converted(key, value) for key, value in given})


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain dicts, lists, numbers and strings."""
    return {
        part: {x.name: getattr(getattr(config, part), x.name) for x in fields(kind)}  # type: ignore[arg-type]
        for part, kind in _PARTS.items()
    }


def to_yaml(config: Config) -> str:
    """A file that `load_config` reads."""
    return _omegaconf().OmegaConf.to_yaml(_omegaconf().OmegaConf.create(to_dict(config)))


def _merged(settings: Mapping[str, Any]) -> Config:
    omegaconf = _omegaconf()
    merged = omegaconf.OmegaConf.structured(Config)
    for key, value in settings.items():
        check_plain(key, value)
        try:
            omegaconf.OmegaConf.update(merged, key, value)
        except omegaconf.errors.OmegaConfBaseException as error:
            raise ValueError(f"{key} cannot be {value!r}: {_first_line(error)}") from error
    try:
        return omegaconf.OmegaConf.to_object(merged)
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ValueError(_first_line(error)) from error


def _read(source: str | os.PathLike[str] | None) -> Iterator[tuple[str, Any]]:
    """Keys and values of a preset or file; those of the preset that a file names come first."""
    if source is None:
        return
    path = PRESET_FOLDER / f"{source}.yaml" if str(source) in PRESETS else Path(source)
    if not path.is_file():
        raise ValueError(f"no preset ({', '.join(PRESETS)}) and no file has the name {source}")
    content = yaml_files.load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(content).__name__}")
    preset = content.pop("preset", None)
    if preset is not None:
        _require_one_of("preset", preset, PRESETS)
        yield from _read(preset)
    yield from _flat(content)


def _override(text: str) -> Iterator[tuple[str, Any]]:
    """Of `key=value`, as `_flat` gives them."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an override must be key=value, got {text!r}")
    try:
        read = yaml_files.parse(value)
    except ValueError as error:
        raise ValueError(f"{key} has a value that is no YAML: {error}") from error
    yield from _flat({key: read})


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """A part's fields as `part.field`, and everything else as it is."""
    for key, value in content.items():
        if key in _PARTS and (isinstance(value, Mapping) or value is None):
            yield from ((f"{key}.{name}", x) for name, x in (value or {}).items())
        else:
            yield str(key), value


def _full_key(key: str) -> str:
    name = key.rpartition(".")[2]
    if key in _INSTEAD:
        raise ValueError(f"{key} is an option of the official program only: {_INSTEAD[key]}")
    if key in _OFFICIAL:
        return _OFFICIAL[key][0]
    full = f"{_PART_OF[name]}.{name}" if name in _PART_OF else None
    if full is None or key not in (name, full):
        raise ValueError(f"unknown key {key}" + (f", did you mean {full}?" if full else ""))
    return full


def _converted(key: str, value: Any) -> Any:
    if key.rpartition(".")[2] == "num_res_blocks":
        return _blocks(value)
    return _OFFICIAL[key][1](value) if key in _OFFICIAL else value


def _require(key: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{key} must be {expected}, got {value}")


def _require_one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
    _require(key, value, value in choices, f"one of {', '.join(map(str, choices))}")


def _require_at_least(key: str, value: int | None, least: int) -> None:
    _require(key, value, value is None or value >= least, f"at least {least}")


def _require_finite(key: str, value: float, least: float = -math.inf) -> None:
    good = math.isfinite(value) and value >= least
    _require(key, value, good, "finite" if least == -math.inf else f"finite and at least {least}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _omegaconf() -> Any:
    try:
        import omegaconf
    except ImportError as error:
        raise ImportError(
            "a configuration needs OmegaConf: pip install 'ttsr-fast[train]'"
        ) from error
    return omegaconf
