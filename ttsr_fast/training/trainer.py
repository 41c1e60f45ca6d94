"""The training of TTSR: epochs, steps, what is logged and kept."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader

from ttsr_fast.files import keep_as, replacing, write_bytes
from ttsr_fast.model import save_model
from ttsr_fast.training import checkpoints, items
from ttsr_fast.training.checkpoints import BEST, LAST
from ttsr_fast.training.config import SETTINGS, Config, to_yaml
from ttsr_fast.training.data import DistributedBatchSampler, EpochSampler
from ttsr_fast.training.items import training_items, validation_items
from ttsr_fast.training.lock import claimed
from ttsr_fast.training.networks import Networks, make_accelerator
from ttsr_fast.training.record import Record
from ttsr_fast.training.signals import Interruption, ignore_first_signals, signals_blocked
from ttsr_fast.training.steps import Batch, NotFinite, Steps
from ttsr_fast.training.validation import Validation, enlarged, row, validate

MODELS = ("model.safetensors", "model-ema.safetensors")
_POSITION = ("epoch", "done", "step", "best")  # of the state, in checkpoints

_logger = logging.getLogger(__name__)


@dataclass
class State:
    """How far a training is.

    Attributes:
        epoch: the current one, from 0 on; the number of epochs once all are done.
        done: steps of it that are done.
        step: steps since the beginning.
        total: steps there are to be, at the end.
        losses: of the last step; `total` is their weighted sum.
        images_per_second: of the last steps, over all processes.
        validation: the last one.
        best: the highest PSNR of a validation.
        signal: number of the signal that has stopped it, or 0.
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


def train(
    config: Config,
    *,
    resume: str | Path | bool | None = None,
    progress: Callable[[State], None] | None = None,
) -> State:
    """Train TTSR as `config` says, and write the generator as `model.safetensors` at the end.

    In `run.out` there are then also `training.yaml`, `last.pt` and, with held-out pictures,
    `best.pt` (the state after the last and the best epoch), `logs` for TensorBoard, and with an
    average of weights `model-ema.safetensors`. Nothing else in that folder is touched.

    On one device whose operations are deterministic, as those of the CPU are, a training that is
    stopped and resumed ends with the very weights of one that is not, also if it is killed: it then
    goes on from its last checkpoint.

    SIGTERM and SIGINT let the step end, save, and return with `signal` set; a second one ends the
    program. Started by `accelerate launch` or torchrun it runs in all their processes; all of them
    call this function.

    Args:
        config: of `load_config`.
        resume: True goes on from `last.pt` in `run.out`, from `best.pt` if that is gone, or begins
            if there is no training; a path goes on from that checkpoint, in its own folder or one
            without a training; None begins, in a folder without a training.
        progress: called in the main process after every step, and at the end of every epoch, where
            `done` is 0.

    Raises:
        ValueError: settings that are impossible or do not fit the data or the checkpoint, files
            that have changed since the checkpoint, or a folder that holds a training already.
        OSError: pictures or weights that are missing, a checkpoint that cannot be written; the one
            before it is whole then.
        RuntimeError: a checkpoint that cannot be read or is damaged, another training that runs in
            the folder, weights that are not finite, or such a loss: its step's inputs are in
            `run.out` then.
        ImportError: a package of the extra `train` is missing.
    """
    return Trainer(config, progress).run(resume)


class Trainer:
    """One training; see `train`, which is all that most need.

    Args:
        config: of the training.
        progress: as for `train`.
    """

    def __init__(self, config: Config, progress: Callable[[State], None] | None = None) -> None:
        if config.run.out is None:
            raise ValueError("run.out is needed: the folder that a training writes to")
        self.config, self.state, self.out = config, State(), Path(config.run.out)
        self.items, self.held_out = training_items(config), validation_items(config)
        batch = config.data.batch_size
        if len(self.items) < batch:
            raise ValueError(f"data.batch_size is {batch}, but there are {len(self.items)} items")
        self.steps_per_epoch = len(self.items) // batch
        self.epochs = config.run.num_init_epochs + config.run.num_epochs
        self.state.total = self.epochs * self.steps_per_epoch
        self.accelerator = make_accelerator(config)
        self.networks = Networks(config, self.accelerator)
        self.steps = Steps(config, self.networks, self.accelerator)
        self._main = self.accelerator.is_main_process
        self._progress = progress if self._main else None

    def run(self, resume: str | Path | bool | None = None) -> State:
        """From the beginning or a checkpoint to the end, or to a signal."""
        with ExitStack() as stack:
            self._in_main(lambda: stack.enter_context(claimed(self.out)))
            self._start(resume)
            goes_on = self.state.epoch < self.epochs
            if goes_on:
                record = Record(self.out / "logs" if self._main else None, self.state.step)
                with Interruption() as self._interruption, record as self._record:
                    while self.state.epoch < self.epochs and not self.state.signal:
                        self._epoch()
            if self._main and (goes_on or not (self.out / MODELS[0]).exists()):
                self._export()
        return self.state

    def batches(self) -> Iterator[Batch]:
        """This process's share of the batches left in the epoch, on its device."""
        data, device = self.config.data, self.accelerator.device
        draws = EpochSampler(len(self.items), seed=self.config.run.seed, epoch=self.state.epoch)
        process = self.accelerator.process_index, self.accelerator.num_processes
        loader = DataLoader(
            self.items,
            batch_sampler=DistributedBatchSampler(
                draws, data.batch_size, self.state.done, *process
            ),
            num_workers=data.num_workers,
            worker_init_fn=ignore_first_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that it draws from no other
        )
        with signals_blocked():  # the loader's processes are not ready for signals at once
            batches = iter(loader)
        for batch in batches:
            yield {name: x.to(device, non_blocking=True) for name, x in batch.items()}

    def save(self, better: bool = False) -> None:
        """Write `last.pt`, and the same as `best.pt` if it is better than all before.

        Raises:
            RuntimeError: weights that are not finite, as gradients can make them that overflow. The
                checkpoints before stay.
            OSError: the file cannot be written.
        """
        weights = self.networks.ttsr.state_dict()
        bad = next((name for name, x in weights.items() if not x.isfinite().all()), None)
        if bad is not None:
            raise RuntimeError(
                f"weight {bad} is not finite after step {self.state.step}, and the training stops; "
                "no checkpoint is replaced"
            )
        if self._main:
            state = self.state
            position = {name: getattr(state, name) for name in _POSITION}
            saved = {
                **self.networks.state(),
                **position,
                "items": len(self.items),
                "files": items.summary(self.files),
                "penalty_rng": self.steps.penalty_rng.get_state(),
                "rng": checkpoints.rng_state(),
            }
            # The best comes first: a run that ends in between repeats the epoch that was better.
            path = self.out / (BEST if better else LAST)
            checkpoints.save_checkpoint(saved, self.config, path)
            if better:
                keep_as(path, self.out / LAST)
        self.accelerator.wait_for_everyone()

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises: what `load_checkpoint` does; ValueError if it does not fit.
        """
        saved = checkpoints.load_checkpoint(path, self.config)
        self._check_files(saved, path)
        if saved["done"] and saved["items"] != len(self.items):
            raise ValueError(
                f"{path} was saved within an epoch of {saved['items']} items, "
                f"and now there are {len(self.items)}"
            )
        try:
            self.networks.load(saved)
            self.steps.penalty_rng.set_state(saved["penalty_rng"])
            checkpoints.set_rng_state(saved["rng"])
        except Exception as error:  # as many kinds as a state can be wrong in
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{path} does not hold the state of this training: {reason}"
            ) from error
        for name in _POSITION:
            setattr(self.state, name, saved[name])

    @cached_property
    def files(self) -> list[items.File]:
        """Files that the training learns from."""
        return items.data_files(self.items)

    def _check_files(self, saved: dict[str, Any], path: Path) -> None:
        """Notice training files that have changed since a checkpoint, if that has recorded them."""
        before = saved.get("files")
        if not isinstance(before, dict):
            return
        changes = items.difference(self.files, before, path.parent)
        if changes and self.config.data.on_change == "raise":
            raise ValueError(
                f"{path} was saved with other training files: {changes}; put the old ones back, or "
                "go on with --set on_change=accept"
            )
        if changes:
            _logger.warning("the training files have changed: %s", changes)

    def _start(self, resume: str | Path | bool | None) -> None:
        """Restore, or make sure that nothing is there that would be replaced."""
        if resume is True:
            checkpoint = checkpoints.checkpoint_in(self.out)
        else:
            checkpoint = Path(resume) if resume else None
        if checkpoint is None or checkpoint.absolute().parent != self.out.absolute():
            for name in (
                (LAST, BEST, *MODELS) if resume is True else (LAST, BEST, *MODELS, SETTINGS)
            ):
                if (self.out / name).exists():
                    raise ValueError(
                        f"{self.out} holds a training already ({name}): resume it, or choose "
                        "another folder"
                    )
        if checkpoint is not None:
            self.restore(checkpoint)
        elif resume:
            _logger.warning("%s holds no checkpoint yet: starting from the beginning", self.out)
        if checkpoint is None and self.networks.lacks_vgg19 and self._main:
            _logger.warning(
                "LTE starts from random weights, as those of VGG19 are not found: name their file "
                "with vgg19=FILE, or accept it with vgg19=none"
            )
        self.accelerator.wait_for_everyone()  # until all have looked
        if self._main and self.state.epoch < self.epochs:
            # Files are accepted for this run, and not for those that go on from it.
            data = replace(self.config.data, on_change="raise")
            write_bytes(self.out / SETTINGS, to_yaml(replace(self.config, data=data)).encode())
            items.write_list(self.files, self.out)

    def _in_main(self, call: Callable[[], Any]) -> None:
        """Call in the main process; its error is raised in all."""
        error: Exception | None = None
        if self._main:
            try:
                call()
            except (OSError, RuntimeError) as caught:
                error = caught
        if self.accelerator.num_processes > 1:
            error = broadcast_object_list([error])[0]
        if error is not None:
            raise error

    def _epoch(self) -> None:
        """The steps left in the epoch, unless a signal comes, and what follows on the last."""
        state, run = self.state, self.config.run
        full = state.epoch >= run.num_init_epochs
        for batch in self.batches():
            self._step(batch, full)
            state.signal = self._agreed_signal()
            if state.done == self.steps_per_epoch:
                break
            if state.signal or (run.save_steps and state.step % run.save_steps == 0):
                self.save()
            if state.signal:
                return
        if full:
            self.networks.end_epoch()
        state.epoch, state.done = state.epoch + 1, 0
        over = state.epoch == self.epochs
        better = (over or state.epoch % run.val_every == 0) and self._validate(batch)
        if better or over or state.signal or state.epoch % run.save_every == 0:
            self.save(better)
        self._tell()

    def _step(self, batch: Batch, full: bool) -> None:
        state = self.state
        try:
            state.losses = self.steps.step(batch, full)
        except NotFinite as error:
            raise RuntimeError(self._report(error, batch)) from None
        state.done, state.step = state.done + 1, state.step + 1
        state.images_per_second = self._record.speed(self.config.data.batch_size)
        if state.step % self.config.run.print_every == 0:
            self._record.scalars("loss", state.losses, state.step)
            self._record.scalars("rate", self.networks.rates(), state.step)
            self._record.scalars("speed", {"images": state.images_per_second}, state.step)
        self._tell()

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self.state)

    def _agreed_signal(self) -> int:
        """The signal that any of the processes has received."""
        number = self._interruption.signal
        if self.accelerator.num_processes > 1:
            own = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(own).max())
        return number

    def _validate(self, batch: Batch) -> bool:
        """Whether the generator is better than after any epoch before; False without pictures."""
        state, mask = self.state, self.config.data.mask_padding
        model = self.networks.best
        better = False
        if self.held_out is not None:
            state.validation = validate(model, self.held_out, self.accelerator, mask_padding=mask)
            self._record.scalars("psnr", state.validation._asdict(), state.step)
            better = state.validation.psnr > state.best
            state.best = max(state.best, state.validation.psnr)
            first = self.held_out[0]
            batch = {name: x[None].to(self.accelerator.device) for name, x in first.items()}
        if self._main:
            sample = {name: x[:1] for name, x in batch.items()}
            images = (sample["lrsr"], enlarged(model, sample, mask), sample["hr"], sample["ref"])
            self._record.picture("bicubic | sr | hr | ref", row([x[0] for x in images]), state.step)
        return better

    def _report(self, error: NotFinite, batch: Batch) -> str:
        """What the error is to say; what the step was made from is saved before."""
        step = self.state.step + 1
        where = "another process has"
        if error.own:
            several = self.accelerator.num_processes > 1
            process = f"-process-{self.accelerator.process_index}" if several else ""
            path = self.out / f"not-finite-step-{step}{process}.pt"
            with replacing(path) as file:
                torch.save({name: x.cpu() for name, x in batch.items()}, file)
            where = f"{path} holds"
        return f"{error} in step {step}, and the training stops; {where} the pictures of the step"

    def _export(self) -> None:
        """The generators by themselves."""
        save_model(self.networks.ttsr, self.out / MODELS[0])
        if self.networks.ema is not None:
            save_model(self.networks.best, self.out / MODELS[1])
