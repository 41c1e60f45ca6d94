"""The state of a training on disk: all that is needed to go on as if nothing had happened.

A checkpoint is one file of tensors, numbers and strings, read with `weights_only=True`. The
generator lies under `state_dict`, so `ttsr_fast.load_model` reads these files as well.
"""

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

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


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` when all of it is on the disk.

    Raises:
        OSError: it cannot be written; the message says why, and that the old file is still there.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        reason = _cause(error)
        if reason is None:
            raise
        kept = "; the one before it is still there" if path.is_file() else ""
        raise OSError(f"cannot write {path}: {reason}{kept}") from error


def keep_as(path: Path, name: str) -> None:
    """Let a checkpoint stay under a second name of its folder, whatever becomes of the first."""
    target = path.with_name(name)
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    temporary.replace(target)


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """What `save_checkpoint` has written, on the CPU.

    Args:
        path: the file.
        config: of the training that is to go on with it.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read.
        ValueError: it is no checkpoint of a training, or of another one: the keys that differ are
            named.
    """
    state = _read(path)
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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise almost anything
        raise RuntimeError(
            f"cannot read {path}: it is damaged, or no checkpoint of a training"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no checkpoint of a training; to start from the weights of a model, "
            "name it as model.weights"
        )
    return state


def _fixed(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The values that a training keeps, and whether it has the parts that a state is of."""
    values = {}
    for key in _FIXED:
        part, _, name = key.partition(".")
        values[key] = config[part].get(name)
    return values | {
        "a discriminator": config["loss"]["adv_w"] > 0,
        "an average of weights (optim.ema)": config["optim"]["ema"] is not None,
    }


def _temporary(path: Path) -> Path:
    """One name for each file: what a killed run has left under it is overwritten."""
    return path.with_name(f".{path.name}.tmp")


def _cause(error: BaseException | None) -> str | None:
    """Why the operating system refused; torch reports that in its own words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            return "the disk is full" if full else os.strerror(error.errno)
        error = error.__cause__ or error.__context__
    return None
