"""Settings of a training: one dataclass for each part, with an explanation for every key.

The explanation belongs to the field. `ttsr-fast train --help`, `--show` and the file
`training.yaml` print it.
"""
# ruff: noqa: RUF009 - `setting` and `part` return fields

import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NamedTuple

from ttsr_fast.choices import BACKENDS, PRECISIONS
from ttsr_fast.choices import LAYOUTS as FOLDERS

LAYOUTS = (*FOLDERS, "photographs")


def setting(default: Any, help: str, choices: Sequence[Any] = ()) -> Any:
    """A field of a part.

    Args:
        default: value where neither preset nor file nor override sets one.
        help: explanation, in ASCII: unit, meaning, and meaning of null.
        choices: allowed values, added to an explanation without them; empty for any value.
    """
    names = [choice for choice in choices if choice is not None]
    text = help if all(name in help for name in names) else f"{help}; one of {', '.join(names)}"
    metadata = {"help": text, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def part(kind: type, help: str) -> Any:
    """A field of `Config`: a part with its defaults."""
    return field(default_factory=kind, metadata={"help": help})


@dataclass
class Model:
    """Generator."""

    num_res_blocks: list[int] = setting([16, 16, 8, 4], "residual blocks: encoder, x1, x2, x4")
    n_feats: int = setting(64, "channels, an even number")
    res_scale: float = setting(1.0, "factor of every residual block's update")
    hard_attention: bool = setting(True, "texture transfer; false: ablation")
    soft_attention: bool = setting(True, "weights by confidence; false: ablation")
    csfi: bool = setting(True, "cross-scale features; false: ablation")
    weights: str | None = setting(None, "checkpoint to start from; null: see start")
    start: str = setting(
        "random",
        "initial generator: random, or enlargement (upscales bilinearly; for short trainings)",
        ("random", "enlargement"),
    )
    vgg19: str = setting(
        "auto",
        "file of VGG19's weights; auto: torch.hub's cache, if they are there; none: random LTE",
    )
    precision: str | None = setting(
        None, f"arithmetic of the search: {', '.join(PRECISIONS)}; null: fp32"
    )
    backend: str | None = setting(
        None, f"backend of the search: {', '.join(BACKENDS)}; null: the fastest"
    )

    def __post_init__(self) -> None:
        blocks = self.num_res_blocks
        good = len(blocks) == 4 and min(blocks) >= 0
        require("model.num_res_blocks", blocks, good, "four numbers, such as 16+16+8+4")
        good = self.n_feats >= 2 and self.n_feats % 2 == 0
        require("model.n_feats", self.n_feats, good, "even and positive")
        _require_finite("model.res_scale", self.res_scale)
        _require_choices("model", self)


@dataclass
class Data:
    """Images."""

    layout: str = setting("cufed", "layout of the folder", LAYOUTS)
    root: str | None = setting(None, "folder of the training images, as --data")
    references: Any = setting(
        None,
        "folders: folder of references; urban100, manga109: list file; cufed5, sun80: numbers, "
        "such as [1, 5]; null: the layout's own",
    )
    validation: str | None = setting(None, "folder of held-out images; null: no validation")
    validation_layout: str | None = setting(
        None, "layout of that folder; null: as layout", (None, *LAYOUTS)
    )
    size: int = setting(160, "pixels, side of HR and reference; a multiple of 4, with adv_w of 32")
    batch_size: int = setting(9, "images per step, over all processes")
    augment: bool = setting(True, "random flips and rotations")
    mask_padding: bool = setting(False, "no matches with the padding of small references")
    crops_per_photo: int = setting(8, "photographs: items per photograph and epoch")
    unrelated: float | None = setting(
        None, "photographs: share of unrelated references, 0 to 1; null: 0.1, or 0 for one file"
    )
    candidates: int = setting(4, "photographs: places per item; most detail wins")
    longest: int | None = setting(
        None, "photographs: pixels, longer side after reduction; null: as they are"
    )
    on_error: str = setting(
        "raise",
        "unreadable image: raise (an error), or skip (the next item instead)",
        ("raise", "skip"),
    )
    on_change: str = setting(
        "raise",
        "files changed since the checkpoint: raise (an error), or accept",
        ("raise", "accept"),
    )
    num_workers: int = setting(4, "loader processes per training process; 0: none")

    def __post_init__(self) -> None:
        _require_choices("data", self)
        good = self.size >= 16 and self.size % 4 == 0
        require("data.size", self.size, good, "a multiple of 4, 16 or more")
        for name in ("batch_size", "crops_per_photo", "candidates", "longest"):
            _require_at_least(f"data.{name}", getattr(self, name), 1)
        _require_at_least("data.num_workers", self.num_workers, 0)
        share = self.unrelated or 0
        require("data.unrelated", share, 0 <= share <= 1, "from 0 to 1")


@dataclass
class Loss:
    """Losses."""

    rec_w: float = setting(1.0, "weight of the reconstruction loss")
    per_w: float = setting(0.0, "weight of the perceptual loss, which needs VGG19")
    tpl_w: float = setting(0.0, "weight of the transferal perceptual loss")
    adv_w: float = setting(0.0, "weight of the adversarial loss")
    rec_type: str = setting("l1", "kind of the reconstruction loss", ("l1", "l2"))
    tpl_type: str = setting("l2", "kind of the transferal perceptual loss", ("l1", "l2"))
    tpl_use_S: bool = setting(False, "transferal perceptual loss weighted by confidence")
    gan_type: str = setting("wgan-gp", "kind of the adversarial loss", ("wgan-gp", "gan"))
    gan_k: int = setting(2, "discriminator steps per generator step")
    penalty: float = setting(10.0, "weight of the gradient penalty of wgan-gp")

    def __post_init__(self) -> None:
        for name in ("rec_w", "per_w", "tpl_w", "adv_w", "penalty"):
            _require_finite(f"loss.{name}", getattr(self, name), 0)
        require("loss.rec_w", self.rec_w, self.rec_w > 0, "positive")
        _require_choices("loss", self)
        _require_at_least("loss.gan_k", self.gan_k, 1)


@dataclass
class Optim:
    """Optimisers."""

    lr_rate: float = setting(1e-4, "learning rate of MainNet")
    lr_rate_lte: float = setting(1e-5, "learning rate of LTE; 0: frozen")
    lr_rate_dis: float = setting(1e-4, "learning rate of the discriminator")
    beta1: float = setting(0.9, "Adam's beta1 for the generator")
    beta2: float = setting(0.999, "Adam's beta2 for the generator")
    eps: float = setting(1e-8, "Adam's epsilon for the generator")
    decay: int | None = setting(
        None, "epochs with all losses per reduction of the learning rates; null: no reduction"
    )
    gamma: float = setting(0.5, "factor of every reduction")
    clip: float | None = setting(None, "maximum norm of the generator's gradients; null: none")
    ema: float | None = setting(
        None,
        "decay of an average of the weights, such as 0.999; null: no average. With an average, use "
        "model-ema.safetensors for upscale and eval, not model.safetensors",
    )

    def __post_init__(self) -> None:
        for name in ("lr_rate", "lr_rate_lte", "lr_rate_dis", "eps", "gamma"):
            _require_finite(f"optim.{name}", getattr(self, name), 0)
        require("optim.lr_rate", self.lr_rate, self.lr_rate > 0, "positive")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            good = value is None or 0 <= value < 1
            require(f"optim.{name}", value, good, "at least 0 and below 1")
        require("optim.clip", self.clip, self.clip is None or self.clip > 0, "positive")
        _require_at_least("optim.decay", self.decay, 1)


@dataclass
class Run:
    """Length, devices and results."""

    out: str | None = setting(None, "folder for all results, as --out")
    seed: int = setting(0, "seed of all random numbers")
    num_init_epochs: int = setting(2, "epochs with the reconstruction loss alone, at the start")
    num_epochs: int = setting(50, "epochs with all losses, after num_init_epochs")
    accumulate: int = setting(1, "parts of a batch, one at a time, to save memory")
    amp: str | None = setting(
        None, "16-bit convolutions: fp16, bf16; null: float32", (None, "fp16", "bf16")
    )
    cpu: bool = setting(False, "CPU even where there is a GPU")
    print_every: int = setting(10, "steps between entries in TensorBoard's logs")
    val_every: int = setting(1, "epochs between validations")
    save_every: int = setting(1, "epochs between checkpoints")
    save_steps: int | None = setting(None, "steps between checkpoints within epochs; null: none")

    def __post_init__(self) -> None:
        _require_choices("run", self)
        for name in ("accumulate", "print_every", "val_every", "save_every", "save_steps"):
            _require_at_least(f"run.{name}", getattr(self, name), 1)
        for name in ("num_init_epochs", "num_epochs", "seed"):
            _require_at_least(f"run.{name}", getattr(self, name), 0)
        require(
            "run.num_epochs", self.num_epochs, self.epochs > 0, "positive, or num_init_epochs is"
        )

    @property
    def epochs(self) -> int:
        """Epochs of both kinds."""
        return self.num_init_epochs + self.num_epochs


@dataclass
class Config:
    """All settings of a training."""

    model: Model = part(Model, "generator and its search")
    data: Data = part(Data, "training and validation images")
    loss: Loss = part(Loss, "losses; a weight of 0 leaves a loss out")
    optim: Optim = part(Optim, "Adam, learning rates, average of the weights")
    run: Run = part(Run, "length, devices, results")

    def __post_init__(self) -> None:
        size, parts = self.data.size, self.run.accumulate
        good = self.loss.adv_w == 0 or size % 32 == 0
        require("data.size", size, good, "a multiple of 32 for the adversarial loss")
        good = self.data.batch_size % parts == 0
        require("data.batch_size", self.data.batch_size, good, f"a multiple of {parts} parts")
        good = self.loss.tpl_w == 0 or self.model.hard_attention
        require("loss.tpl_w", self.loss.tpl_w, good, "0 without model.hard_attention")


class Key(NamedTuple):
    """A key of a part with its value and explanation."""

    name: str
    value: Any
    help: str


def parts() -> dict[str, tuple[Field[Any], ...]]:
    """Fields of every part by its name."""
    return {x.name: fields(x.default_factory) for x in fields(Config)}  # type: ignore[arg-type]


def explained(config: Config) -> Iterator[tuple[str, str, list[Key]]]:
    """Name, explanation and keys of every part."""
    for x in fields(config):
        kind = getattr(config, x.name)
        keys = [Key(y.name, getattr(kind, y.name), y.metadata["help"]) for y in fields(kind)]
        yield x.name, x.metadata["help"], keys


def require(key: str, value: Any, good: bool, expected: str) -> None:
    """Raise ValueError for a value that is not `good`."""
    if not good:
        raise ValueError(f"{key} must be {expected}, got {value}")


def require_one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError for a value that is none of `choices`."""
    require(key, value, value in choices, f"one of {', '.join(map(str, choices))}")


def _require_choices(name: str, settings: Any) -> None:
    for x in fields(settings):
        if x.metadata["choices"]:
            require_one_of(f"{name}.{x.name}", getattr(settings, x.name), x.metadata["choices"])


def _require_at_least(key: str, value: int | None, least: int) -> None:
    require(key, value, value is None or value >= least, f"at least {least}")


def _require_finite(key: str, value: float, least: float = -math.inf) -> None:
    good = math.isfinite(value) and value >= least
    require(key, value, good, "finite" if least == -math.inf else f"finite and at least {least}")
