"""Configuration of a training, read from a preset or YAML file and overrides.

A key is `part.field`, or the field alone, as no two parts share one. The options of the official
program (researchmm/TTSR, option.py) are keys, too. Parts and fields are in `settings.py`.
"""

import difflib
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ttsr_fast.optional import optional
from ttsr_fast.training import yaml_files
from ttsr_fast.training.settings import (
    Config,
    Data,
    Key,
    Loss,
    Model,
    Optim,
    Run,
    explained,
    parts,
    require_one_of,
)
from ttsr_fast.training.yaml_files import check_plain

__all__ = [
    "PRESETS",
    "SETTINGS",
    "Config",
    "Data",
    "Loss",
    "Model",
    "Optim",
    "Run",
    "load_config",
    "to_dict",
    "to_yaml",
]

PRESET_FOLDER = Path(__file__).parent / "presets"
SETTINGS = "training.yaml"  # in the folder of a training: its configuration
PRESETS = tuple(sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml")))
_WIDTH = 80  # columns of a YAML file with explanations
_LONGEST = 34  # columns of a line that has its explanation beside it
_NEAR = 0.7  # least similarity of a suggestion


_PARTS = parts()
_PART_OF = {x.name: name for name, part in _PARTS.items() for x in part}


def _official_gan(value: Any) -> Any:
    return {"WGAN_GP": "wgan-gp", "GAN": "gan"}.get(str(value), value)


def _quadruple(value: Any) -> Any:
    return 4 * value if isinstance(value, int) else value


def _blocks(value: Any) -> Any:
    """`16+16+8+4`, as the official program reads it."""
    return value.split("+") if isinstance(value, str) else value


# Official options with another name here, and conversions of their values.
_OFFICIAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "GAN_type": ("loss.gan_type", _official_gan),
    "GAN_k": ("loss.gan_k", lambda value: value),
    "dataset": ("data.layout", lambda value: str(value).lower()),
    "dataset_dir": ("data.root", lambda value: value),
    "train_crop_size": ("data.size", _quadruple),  # the official size is the LR size
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
    """Validated settings of a preset or a YAML file and overrides.

    Nothing else is read: no other file and no environment variable.

    Args:
        source: the name of a preset (`PRESETS`) or a YAML file, which may extend a preset by
            `preset: NAME`; None for the defaults.
        overrides: `key=value` with values in YAML; later ones take precedence.
        values: keys and values, taken as they are; they take precedence over all others.

    Raises:
        ValueError: no such preset or file, no plain YAML, an unknown key, a value that is
            invalid or refers to others (`${...}`).
        ImportError: OmegaConf is missing.
    """
    given = [*_read(source), *(pair for text in overrides for pair in _override(text))]
    given += _flat(values or {})
    return _merged({_full_key(key): _converted(key, value) for key, value in given})


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Settings as plain dicts, lists, numbers and strings."""
    return {name: {key.name: key.value for key in keys} for name, _, keys in explained(config)}


def to_yaml(config: Config) -> str:
    """Content of a file for `load_config`, with an explanation of every key."""
    lines = [
        "# Configuration for ttsr-fast train FILE.yaml. A key that is left out has its",
        "# default value. --set KEY=VALUE overrides a key.",
    ]
    for name, help, keys in explained(config):
        lines += ["", f"{name}:  # {help}", *_commented(keys)]
    return "\n".join(lines) + "\n"


def _commented(keys: Sequence[Key]) -> Iterator[str]:
    """Lines of a part: explanations in a column, or above a long value."""
    texts = [f"  {key.name}: {yaml_files.dump(key.value)}" for key in keys]
    column = max(len(text) for text in texts if len(text) <= _LONGEST)
    for text, key in zip(texts, keys, strict=True):
        beside = len(text) <= column
        margin = " " * (column if beside else 0) + "  # "
        comment = textwrap.wrap(key.help, _WIDTH - len(margin), break_on_hyphens=False)
        first, *rest = (margin + line for line in comment)
        if beside:
            yield text.ljust(column) + first[column:]
            yield from rest
        else:
            yield from (first, *rest, text)


def _merged(settings: Mapping[str, Any]) -> Config:
    message = "a configuration needs OmegaConf: pip install 'ttsr-fast[train]'"
    omegaconf = optional("omegaconf", message)
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
    """Keys and values of a preset or file, after the keys of the preset that the file names."""
    if source is None:
        return
    path = PRESET_FOLDER / f"{source}.yaml" if str(source) in PRESETS else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(source), PRESETS, 1)
        raise ValueError(
            f"no preset ({', '.join(PRESETS)}) and no file has the name {source}"
            + (f", did you mean {near[0]}?" if near else "")
        )
    content = yaml_files.load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got a {type(content).__name__}")
    preset = content.pop("preset", None)
    if preset is not None:
        require_one_of("preset", preset, PRESETS)
        yield from _read(preset)
    yield from _flat(content)


def _override(text: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of `key=value`."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"an override must be key=value, got {text!r}")
    try:
        read = yaml_files.parse(value)
    except ValueError as error:
        raise ValueError(f"{key} has a value that is no YAML: {error}") from error
    yield from _flat({key: read})


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Keys of the parts as `part.field`, and other keys unchanged."""
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
    if full is not None and key in (name, full):
        return full
    if key in _PARTS:
        raise ValueError(f"{key} is a part, and its keys are set one by one: {key}.KEY=VALUE")
    near = full or _nearest(name)
    raise ValueError(
        f"unknown key {key}, "
        + (f"did you mean {near}?" if near else "ttsr-fast train --show prints all keys")
    )


def _nearest(name: str) -> str | None:
    """The most similar key, or None; a word of a key is similar to it."""
    names = {x: f"{part}.{x}" for x, part in _PART_OF.items()}
    names |= {x: full for x, (full, _) in _OFFICIAL.items()}
    name = name.lower().replace("-", "_")

    def similarity(candidate: str) -> float:
        candidate = candidate.lower()
        ratio = difflib.SequenceMatcher(None, name, candidate).ratio()
        return ratio + (name in candidate.split("_"))

    best = max(names, key=similarity)
    return names[best] if similarity(best) >= _NEAR else None


def _converted(key: str, value: Any) -> Any:
    if key.rpartition(".")[2] == "num_res_blocks":
        return _blocks(value)
    return _OFFICIAL[key][1](value) if key in _OFFICIAL else value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
