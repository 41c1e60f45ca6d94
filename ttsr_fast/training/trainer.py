"""Training of TTSR: the loop over epochs and batches, and its step."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ttsr_fast.files import replacing
from ttsr_fast.model import save_model
from ttsr_fast.training.checkpoints import MODELS, Checkpoints, State
from ttsr_fast.training.config import Config
from ttsr_fast.training.data import Batch, DistributedBatchSampler, EpochSampler
from ttsr_fast.training.items import training_items, validation_items
from ttsr_fast.training.lock import claimed
from ttsr_fast.training.losses import (
    adversarial_loss,
    discriminator_loss,
    perceptual_loss,
    reconstruction_loss,
    transferal_loss,
)
from ttsr_fast.training.monitor import Log, comparison, validate
from ttsr_fast.training.networks import Networks, Output, accelerate, frozen, make_accelerator
from ttsr_fast.training.signals import Interruption, ignore_first_signals, signals_blocked

_logger = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """A loss is NaN or infinite; the generator is unchanged.

    Attributes:
        own: it is not finite in this process.
    """

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.own = own


def train(
    config: Config,
    *,
    resume: str | Path | bool | None = None,
    progress: Callable[[State], None] | None = None,
) -> State:
    """Train TTSR with the settings of `config`, and write the generator as `model.safetensors`.

    The folder `run.out` then also holds `training.yaml`, `last.pt` and, with validation images,
    `best.pt` (the state after the last and the best epoch), `logs` for TensorBoard, and with an
    average of weights `model-ema.safetensors`. Its other files stay as they are.

    On one device with deterministic operations, such as the CPU, a training that was stopped and
    resumed ends with the same weights, bit for bit, as one without a stop. A killed training
    resumes from its last checkpoint.

    SIGTERM and SIGINT let the step end, save, and return with `signal` set; a second one ends the
    program. With `accelerate launch` or torchrun, every process calls this function.

    Args:
        config: result of `load_config`.
        resume: True resumes from `last.pt` in `run.out`, from `best.pt` if that is gone, or starts
            if there is no training; a path resumes from that checkpoint, in its own folder or one
            without a training; None starts in a folder without a training.
        progress: called in the main process after every step, and at the end of every epoch with
            `done` 0.

    Raises:
        ValueError: invalid settings, settings that do not fit the data or the checkpoint, files
            that have changed since the checkpoint, or a folder that holds a training already.
        OSError: missing images or weights, or a checkpoint that cannot be written; the one before
            it stays whole.
        RuntimeError: an unreadable or damaged checkpoint, another training in the folder, weights
            that are not finite, or a loss that is not finite: the inputs of its step are then in
            `run.out`.
        ImportError: a package of the extra `train` is missing.
    """
    return Trainer(config, progress).run(resume)


class Trainer:
    """A training; see `train` for its use.

    Args:
        config: settings.
        progress: as for `train`.
    """

    def __init__(self, config: Config, progress: Callable[[State], None] | None = None) -> None:
        if config.run.out is None:
            raise ValueError("run.out is needed: the folder for the results of the training")
        self.config, self.state, self.out = config, State(), Path(config.run.out)
        self.items, self.validation_items = training_items(config), validation_items(config)
        batch = config.data.batch_size
        if len(self.items) < batch:
            raise ValueError(f"data.batch_size is {batch}, but there are {len(self.items)} items")
        self.steps_per_epoch = len(self.items) // batch
        self.state.total = config.run.epochs * self.steps_per_epoch
        self.accelerator = make_accelerator(config)
        self.networks = Networks(config, self.accelerator)
        self.checkpoints = Checkpoints(
            config, self.state, self.networks, self.items, self.accelerator
        )
        self._main = self.accelerator.is_main_process
        self._progress = progress if progress and self._main else lambda state: None

    def run(self, resume: str | Path | bool | None = None) -> State:
        """Train from the beginning or a checkpoint to the end or a signal; arguments of `train`."""
        with ExitStack() as stack:
            self._in_main(lambda: stack.enter_context(claimed(self.out)))
            resumed = self.checkpoints.resume(resume)
            if self._main and self.networks.lacks_vgg19 and not resumed:
                _logger.warning(
                    "LTE starts from random weights, as the weights of VGG19 are not found: name "
                    "their file with vgg19=FILE, or accept it with vgg19=none"
                )
            unfinished = self.state.epoch < self.config.run.epochs
            if unfinished:
                log = Log(self.out / "logs" if self._main else None, self.state.step)
                with Interruption() as self._interruption, closing(log) as self._log:
                    self._loop()
            if self._main and (unfinished or not (self.out / MODELS[0]).exists()):
                self._export()
        return self.state

    def _loop(self) -> None:
        """Epochs until the end or a signal."""
        state, run = self.state, self.config.run
        while state.epoch < run.epochs and not state.signal:
            full = state.epoch >= run.num_init_epochs
            for batch in self.batches():
                with self._inputs_saved(batch):
                    state.losses = self.step(batch, full)
                state.done, state.step = state.done + 1, state.step + 1
                self._log_step()
                state.signal = self._received_signal()
                if state.done == self.steps_per_epoch:
                    break
                if state.signal or (run.save_steps and state.step % run.save_steps == 0):
                    self.checkpoints.save()
                if state.signal:
                    return
            if full:
                self.networks.end_epoch()
            state.epoch, state.done = state.epoch + 1, 0
            last = state.epoch == run.epochs
            better = (last or state.epoch % run.val_every == 0) and self._validate(batch)
            if better or last or state.signal or state.epoch % run.save_every == 0:
                self.checkpoints.save(better)
            self._progress(self.state)

    def step(self, batch: Batch, full: bool) -> dict[str, float]:
        """One update of the discriminator, if there is one, and of the generator.

        The update depends neither on the number of processes nor on `run.accumulate`: both divide
        the batch, and random numbers of the gradient penalty are sampled for all of it.

        Args:
            batch: this process's part, on its device.
            full: all losses, not the reconstruction loss alone.

        Returns:
            The losses without their weights, as means over all processes, and `total` with them.

        Raises:
            NotFinite: a loss is NaN or infinite.
        """
        networks, clip = self.networks, self.config.optim.clip
        parts = _parts(batch, self.config.run.accumulate)
        losses: dict[str, Tensor] = {}
        # With several parts, memory holds one graph at a time.
        outputs = [networks.forward(batch)] if len(parts) == 1 else None
        if full and networks.discriminator is not None:
            losses["discriminator"] = self._train_discriminator(parts, outputs)
        networks.optimizer.zero_grad()
        with frozen(networks.discriminator):
            for number, part in enumerate(parts, 1):
                sync = number == len(parts)
                with nullcontext() if sync else self.accelerator.no_sync(networks.generator):
                    output = outputs[0] if outputs else networks.forward(part)
                    of_part = self._losses(output, part, full)
                    self.accelerator.backward(of_part["total"] / len(parts))
                _add(losses, of_part, len(parts))
        means = self._finite_means(losses)
        if clip is not None:
            self.accelerator.clip_grad_norm_(networks.generator.parameters(), clip)
        networks.optimizer.step()
        if networks.ema is not None:
            networks.ema.update_parameters(networks.ttsr)
        return means

    def _losses(self, output: Output, batch: Batch, full: bool) -> dict[str, Tensor]:
        """Losses of the generator and, as `total`, their weighted sum."""
        loss, networks = self.config.loss, self.networks
        sr, hr = output.sr, batch["hr"]
        losses = {"rec": reconstruction_loss(sr, hr, loss.rec_type)}
        weights = {"rec": loss.rec_w, "per": loss.per_w, "tpl": loss.tpl_w, "adv": loss.adv_w}
        if full and networks.vgg is not None:
            with self.accelerator.autocast():
                losses["per"] = perceptual_loss(networks.vgg, sr, hr)
        if full and loss.tpl_w > 0:
            S = output.S if loss.tpl_use_S else None
            features = networks.ttsr(sr=sr)
            losses["tpl"] = transferal_loss(features, output.textures, S, loss.tpl_type)
        if full and networks.discriminator is not None:
            losses["adv"] = adversarial_loss(networks.discriminator, sr, loss.gan_type)
        losses["total"] = torch.stack([weights[name] * x for name, x in losses.items()]).sum()
        return losses

    def _train_discriminator(self, parts: list[Batch], outputs: list[Output] | None) -> Tensor:
        """`gan_k` updates with the generator's current results; the loss of the last update."""
        networks, loss = self.networks, self.config.loss
        discriminator, optimizer = networks.discriminator, networks.optimizer_d
        assert discriminator is not None and optimizer is not None
        rng = networks.penalty_rng
        if outputs is None:
            with torch.no_grad():
                outputs = [networks.forward(part) for part in parts]
        images = sum(len(output.sr) for output in outputs)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        for _ in range(loss.gan_k):
            sums: dict[str, Tensor] = {}
            optimizer.zero_grad()
            torch.rand(rank * images, generator=rng)  # numbers of the other processes' images
            for part, output in zip(parts, outputs, strict=True):
                sr, hr = output.sr.detach(), part["hr"]
                value = discriminator_loss(discriminator, sr, hr, loss.gan_type, loss.penalty, rng)
                (value / len(parts)).backward()
                _add(sums, {"discriminator": value}, len(parts))
            torch.rand((processes - rank - 1) * images, generator=rng)
            networks.average_gradients(discriminator)
            self._finite_means(sums)
            optimizer.step()
        return sums["discriminator"]

    def _finite_means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """Means over all processes.

        Raises:
            NotFinite: one of them is NaN or infinite.
        """
        own = torch.stack([x.float() for x in losses.values()])
        means = dict(zip(losses, self.accelerator.reduce(own, "mean").tolist(), strict=True))
        faults = [f"loss {name} is {x}" for name, x in means.items() if not math.isfinite(x)]
        if faults:
            raise NotFinite(" and ".join(faults), own=not bool(own.isfinite().all()))
        return means

    def batches(self) -> Iterator[Batch]:
        """This process's part of the remaining batches of the epoch, on its device."""
        data, state, accelerator = self.config.data, self.state, self.accelerator
        sampler = EpochSampler(len(self.items), seed=self.config.run.seed, epoch=state.epoch)
        loader = DataLoader(
            self.items,
            batch_sampler=DistributedBatchSampler(
                sampler,
                data.batch_size,
                state.done,
                accelerator.process_index,
                accelerator.num_processes,
            ),
            num_workers=data.num_workers,
            worker_init_fn=ignore_first_signals,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # leaves torch's own generator alone
        )
        with signals_blocked():  # until the workers handle them
            batches = iter(loader)
        for batch in batches:
            yield {name: x.to(accelerator.device, non_blocking=True) for name, x in batch.items()}

    def _in_main(self, call: Callable[[], Any]) -> None:
        """Call in the main process, and raise its error in all processes."""
        error: Exception | None = None
        if self._main:
            try:
                call()
            except (OSError, RuntimeError) as caught:
                error = caught
        if self.accelerator.num_processes > 1:
            error = accelerate.utils.broadcast_object_list([error])[0]
        if error is not None:
            raise error

    def _received_signal(self) -> int:
        """The signal received by any process, or 0."""
        number = self._interruption.signal
        if self.accelerator.num_processes > 1:
            own = torch.tensor([number], device=self.accelerator.device)
            number = int(self.accelerator.gather(own).max())
        return number

    def _validate(self, batch: Batch) -> bool:
        """Validation, and an image in the log; True if the generator is the best so far."""
        state, mask, model = self.state, self.config.data.mask_padding, self.networks.best
        better = False
        if self.validation_items is not None:
            state.validation = validate(model, self.validation_items, self.accelerator, mask)
            self._log.scalars("psnr", state.validation._asdict(), state.step)
            better = state.validation.psnr > state.best
            state.best = max(state.best, state.validation.psnr)
            first = self.validation_items[0].items()
            batch = {name: x[None].to(self.accelerator.device) for name, x in first}
        if self._main:
            pixels = comparison(model, batch, mask)
            self._log.image("bicubic | sr | hr | ref", pixels, state.step)
        return better

    def _log_step(self) -> None:
        state, log = self.state, self._log
        state.images_per_second = log.speed(self.config.data.batch_size)
        if state.step % self.config.run.print_every == 0:
            log.scalars("loss", state.losses, state.step)
            log.scalars("rate", self.networks.rates(), state.step)
            log.scalars("speed", {"images": state.images_per_second}, state.step)
        self._progress(self.state)

    @contextmanager
    def _inputs_saved(self, batch: Batch) -> Iterator[None]:
        """Save the batch of a step with a loss that is not finite, and name its file."""
        try:
            yield
        except NotFinite as error:
            step, where = self.state.step + 1, "another process has"
            if error.own:
                several = self.accelerator.num_processes > 1
                process = f"-process-{self.accelerator.process_index}" if several else ""
                path = self.out / f"not-finite-step-{step}{process}.pt"
                with replacing(path) as file:
                    torch.save({name: x.cpu() for name, x in batch.items()}, file)
                where = f"{path} holds"
            raise RuntimeError(
                f"{error} in step {step}, and the training stops; {where} the images of the step"
            ) from None

    def _export(self) -> None:
        """Write the generators as models."""
        save_model(self.networks.ttsr, self.out / MODELS[0])
        if self.networks.ema is not None:
            save_model(self.networks.best, self.out / MODELS[1])


def _parts(batch: Batch, count: int) -> list[Batch]:
    chunks = {name: x.chunk(count) for name, x in batch.items()}
    return [{name: x[i] for name, x in chunks.items()} for i in range(count)]


def _add(sums: dict[str, Tensor], losses: Mapping[str, Tensor], count: int) -> None:
    """Add the means of one of `count` parts."""
    for name, value in losses.items():
        sums[name] = sums.get(name, 0) + value.detach() / count
