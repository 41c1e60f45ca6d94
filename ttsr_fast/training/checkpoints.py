"""The state of a training on disk: all that is needed to go on as if nothing had happened.

A checkpoint is one file of tensors, numbers and strings, read with `weights_only=True`. The
generator lies under `state_dict`, so `ttsr_fast.load_model` reads these files as well.
"""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttsr_fast.files import replacing
from ttsr_fast.model import tensor_files
from ttsr_fast.training.config import Config, to_dict

LAST, BEST = "last.pt", "best.pt"
_FORMAT = "ttsr-fast training 1"
# What cannot change in mid-training: shapes, the data of a step, what is kept with the optimisers.
_FIXED = (
    "model.num_res_blocks",
    "model.n_feats",
    "model.res_scale",
    "model.hard_attention",
    "model.soft_attention",
    "model.csfi",
    "data.layout",
    "data.size",
    "data.batch_size",
    "loss.gan_type",
    "optim.lr_rate",
    "optim.lr_rate_lte",
    "optim.lr_rate_dis",
    "optim.beta1",
    "optim.beta2",
    "optim.eps",
    "optim.decay",
    "optim.gamma",
    "run.seed",
)
# What every checkpoint holds.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "state_dict": dict,
    "optimizer": dict,
    "schedules": list,
    "epoch": int,
    "done": int,
    "step": int,
    "items": int,
    "best": (float, int),
    "rng": dict,
    "penalty_rng": Tensor,
}

_logger = logging.getLogger(__name__)


def save_checkpoint(state: dict[str, Any], config: Config, path: Path) -> None:
    """Write a state; what was under this name is replaced when its successor is complete.

    Args:
        state: dicts, lists and tuples of tensors, numbers, strings and None; the generator's
            weights under `state_dict`.
        config: what the training was asked for.
        path: a file in a folder that exists.

    Raises:
        OSError: the file cannot be written, such as on a full disk; the old one is as it was.
    """
    with replacing(path) as file:
        torch.save({**state, "format": _FORMAT, "config": to_dict(config)}, file)


def checkpoint_in(folder: Path) -> Path | None:
    """The checkpoint to resume in this folder: the last, or the best if that is gone."""
    last, best = folder / LAST, folder / BEST
    if last.exists() or not best.exists():
        return last if last.exists() else None
    _logger.warning("%s is gone: going on from %s", last, BEST)
    return best


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """What `save_checkpoint` has written, on the CPU.

    Args:
        path: the file.
        config: of the training that is to go on with it.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or is damaged. For the last checkpoint the message says
            whether the best is whole.
        ValueError: it is no checkpoint of a training, or of another one: the keys that differ are
            named.
    """
    try:
        state = _read(path)
    except RuntimeError as error:
        raise RuntimeError(f"{error}{_way_out(path)}") from error
    saved = state["config"]
    faults = []
    for key, value in _fixed(to_dict(config)).items():
        before = _fixed(saved).get(key)
        if before != value:
            faults.append(f"{key} {before}, not {value}")
    if faults:
        raise ValueError(f"{path} is of another training, with {'; '.join(faults)}")
    return state


def rng_state() -> dict[str, Any]:
    """Of Python, NumPy and torch, on the CPU and on the GPUs."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - for whoever still draws from it
    kind, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo all draws since `rng_state`; GPUs that were not there then stay as they are."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 - as above
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count() and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"cannot read {path}: no such file")
    state = tensor_files.load(path)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of a training; to start from the weights of a model, "
            "name it as model.weights"
        )
    bad = [name for name, kind in _KINDS.items() if not isinstance(state.get(name), kind)]
    if bad or any(not isinstance(state["config"].get(part), dict) for part in to_dict(Config())):
        raise ValueError(
            f"{path} is no whole checkpoint of a training: {', '.join(bad or ['config'])}"
        )
    if any(x.numel() * x.element_size() > x.untyped_storage().nbytes() for x in _tensors(state)):
        raise ValueError(f"{path} is no whole checkpoint of a training: its tensors lack values")
    return state


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors, however deep."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _tensors(inner)


def _way_out(damaged: Path) -> str:
    """Advice for a last checkpoint that is damaged."""
    best = damaged.with_name(BEST)
    if damaged.name != LAST:
        return ""
    try:
        epoch = _read(best)["epoch"]
    except (OSError, RuntimeError, ValueError):
        return f"; there is no whole {BEST} either: begin again in another folder"
    return (
        f"; {BEST} is whole (after epoch {epoch}): remove {LAST}, and --resume goes on from there"
    )


def _fixed(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values that a training keeps, and whether it has the parts that a state is of."""
    values = {}
    for key in _FIXED:
        part, _, name = key.partition(".")
        values[key] = config[part].get(name)
    return values | {
        "a discriminator": config["loss"].get("adv_w") not in (None, 0),
        "an average of weights (optim.ema)": config["optim"].get("ema") is not None,
    }
