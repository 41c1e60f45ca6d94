"""State of a training in memory and on disk, complete enough to resume bit for bit.

A checkpoint is one file of tensors, numbers and strings, read with `weights_only=True`. The
weights of the generator are under `state_dict`, where `ttsr_fast.load_model` finds them.
"""

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ttsr_fast.files import keep_as, replacing, write_bytes
from ttsr_fast.model import tensor_files
from ttsr_fast.training.config import SETTINGS, Config, to_dict, to_yaml
from ttsr_fast.training.items import (
    File,
    Items,
    check_unchanged,
    data_files,
    summary,
    write_list,
)
from ttsr_fast.training.monitor import Validation
from ttsr_fast.training.networks import Networks

if TYPE_CHECKING:
    from accelerate import Accelerator

LAST, BEST = "last.pt", "best.pt"
MODELS = ("model.safetensors", "model-ema.safetensors")
_FORMAT = "ttsr-fast training 1"
_POSITION = ("epoch", "done", "step", "best")  # of the state, in checkpoints
# Settings that must not change: shapes, data of a step, settings kept by the optimisers.
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
# Content of every checkpoint.
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


@dataclass
class State:
    """Progress of a training.

    Attributes:
        epoch: current epoch, from 0; the number of epochs at the end.
        done: finished steps of the epoch.
        step: finished steps of the training.
        total: steps of the training at its end.
        losses: of the last step; `total` is their weighted sum.
        images_per_second: average of the last steps, over all processes.
        validation: the last one.
        best: highest PSNR of all validations.
        signal: number of the signal that ended the training, or 0.
    """

    epoch: int = 0
    done: int = 0
    step: int = 0
    total: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    images_per_second: float = 0.0
    validation: Validation | None = None
    best: float = float("-inf")
    signal: int = 0


class Checkpoints:
    """Checkpoints in the folder of a training, `run.out`, with its settings and file list.

    Args:
        config: settings.
        state: progress, changed by `resume`.
        networks: changed by `resume`.
        items: training data.
        accelerator: of the networks.
    """

    def __init__(
        self,
        config: Config,
        state: State,
        networks: Networks,
        items: Items,
        accelerator: "Accelerator",
    ) -> None:
        self._config, self._state, self._networks = config, state, networks
        self._items, self._accelerator = items, accelerator
        assert config.run.out is not None
        self._folder = Path(config.run.out)

    @cached_property
    def _files(self) -> list[File]:
        return data_files(self._items)

    def resume(self, resume: str | Path | bool | None) -> bool:
        """Restore a checkpoint, or check that the folder holds no training; write the settings.

        Args:
            resume: as for `train`.

        Returns:
            True if a checkpoint is restored.

        Raises:
            OSError, RuntimeError, ValueError: as `train`.
        """
        path = _checkpoint_in(self._folder) if resume is True else Path(resume) if resume else None
        if path is None or path.absolute().parent != self._folder.absolute():
            names = (LAST, BEST, *MODELS, *(() if resume is True else (SETTINGS,)))
            found = next((name for name in names if (self._folder / name).exists()), None)
            if found is not None:
                raise ValueError(
                    f"{self._folder} holds a training already ({found}): resume it, or choose "
                    "another folder"
                )
        if path is not None:
            self._restore(path)
        elif resume:
            _logger.warning("%s holds no checkpoint yet: starting from the beginning", self._folder)
        self._accelerator.wait_for_everyone()  # all have looked into the folder
        if self._accelerator.is_main_process and self._state.epoch < self._config.run.epochs:
            data = replace(self._config.data, on_change="raise")  # accepted for this run alone
            settings = to_yaml(replace(self._config, data=data))
            write_bytes(self._folder / SETTINGS, settings.encode())
            write_list(self._files, self._folder)
        return path is not None

    def save(self, better: bool = False) -> None:
        """Write `last.pt`, and the same as `best.pt` if it is better than all before.

        Raises:
            RuntimeError: weights are not finite, after gradients that overflow. The checkpoints
                before stay.
            OSError: the file cannot be written.
        """
        state = self._state
        weights = self._networks.ttsr.state_dict()
        bad = next((name for name, x in weights.items() if not x.isfinite().all()), None)
        if bad is not None:
            raise RuntimeError(
                f"weight {bad} is not finite after step {state.step}, and the training stops; "
                "no checkpoint is replaced"
            )
        if self._accelerator.is_main_process:
            content = {
                **self._networks.state(),
                **{name: getattr(state, name) for name in _POSITION},
                "items": len(self._items),
                "files": summary(self._files),
                "rng": _rng_state(),
                "format": _FORMAT,
                "config": to_dict(self._config),
            }
            # The best first: a run that ends in between repeats the better epoch.
            path = self._folder / (BEST if better else LAST)
            with replacing(path) as file:
                torch.save(content, file)
            if better:
                keep_as(path, self._folder / LAST)
        self._accelerator.wait_for_everyone()

    def _restore(self, path: Path) -> None:
        saved = load_checkpoint(path, self._config)
        accept = self._config.data.on_change == "accept"
        check_unchanged(self._files, saved.get("files"), path, accept)
        if saved["done"] and saved["items"] != len(self._items):
            raise ValueError(
                f"{path} was saved within an epoch of {saved['items']} items, "
                f"and now there are {len(self._items)}"
            )
        try:
            self._networks.load(saved)
            _set_rng_state(saved["rng"])
        except Exception as error:  # a damaged state raises errors of all kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{path} does not hold the state of this training: {reason}"
            ) from error
        for name in _POSITION:
            setattr(self._state, name, saved[name])


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """Content of a checkpoint, on the CPU.

    Args:
        path: the file.
        config: settings of the training to resume.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or is damaged. For the last checkpoint the message says
            if the best one is whole.
        ValueError: it is no checkpoint, or the checkpoint of another training: the message names
            the keys that differ.
    """
    try:
        state = _read(path)
    except RuntimeError as error:
        raise RuntimeError(f"{error}{_advice(path)}") from error
    saved = state["config"]
    faults = []
    for key, value in _fixed(to_dict(config)).items():
        before = _fixed(saved).get(key)
        if before != value:
            faults.append(f"{key} {before}, not {value}")
    if faults:
        raise ValueError(f"{path} is of another training, with {'; '.join(faults)}")
    return state


def _checkpoint_in(folder: Path) -> Path | None:
    """The last checkpoint of a folder, or the best if that is gone."""
    last, best = folder / LAST, folder / BEST
    if last.exists() or not best.exists():
        return last if last.exists() else None
    _logger.warning("%s is gone: resuming from %s", last, BEST)
    return best


def _rng_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch, on the CPU and on the GPUs."""
    numpy: Any = np.random.get_state()  # noqa: NPY002 - other code may use it
    kind, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of `_rng_state`; GPUs only if their number is the same."""
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
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for inner in content.values() if isinstance(content, dict) else content:
            yield from _tensors(inner)


def _advice(damaged: Path) -> str:
    """Advice for a damaged last checkpoint."""
    best = damaged.with_name(BEST)
    if damaged.name != LAST:
        return ""
    try:
        epoch = _read(best)["epoch"]
    except (OSError, RuntimeError, ValueError):
        return f"; there is no whole {BEST} either: start again in another folder"
    return (
        f"; {BEST} is whole (after epoch {epoch}): remove {LAST}, and --resume continues from there"
    )


def _fixed(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings that must not change, and the presence of optional parts of the state."""
    values = {}
    for key in _FIXED:
        part, _, name = key.partition(".")
        values[key] = config[part].get(name)
    return values | {
        "a discriminator": config["loss"].get("adv_w") not in (None, 0),
        "an average of weights (optim.ema)": config["optim"].get("ema") is not None,
    }
