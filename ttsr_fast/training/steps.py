"""One step of a training: the losses, their gradients, the change of the weights."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ttsr_fast.training.config import Config
from ttsr_fast.training.losses import (
    adversarial_loss,
    discriminator_loss,
    perceptual_loss,
    reconstruction_loss,
    transferal_loss,
)
from ttsr_fast.training.networks import Networks

Batch = Mapping[str, Tensor]


class Output(NamedTuple):
    """What the generator makes of a batch."""

    sr: Tensor
    S: Tensor | None = None  # None without hard attention
    textures: tuple[Tensor, ...] = ()


class NotFinite(RuntimeError):
    """A loss is NaN or infinite; the generator is as it was before the step.

    Attributes:
        own: whether it is so in this process.
    """

    def __init__(self, message: str, own: bool) -> None:
        super().__init__(message)
        self.own = own


class Steps:
    """Steps of generator and discriminator.

    What a step does depends neither on the number of processes nor on `run.accumulate`: both share
    out the batch, and numbers for the gradient penalty are drawn for all of it.

    Args:
        config: of the training.
        networks: are changed.
        accelerator: as the networks have it.
    """

    def __init__(self, config: Config, networks: Networks, accelerator: Accelerator) -> None:
        self._config, self._networks, self._accelerator = config, networks, accelerator
        self.penalty_rng = torch.Generator().manual_seed(config.run.seed)

    def step(self, batch: Batch, full: bool) -> dict[str, float]:
        """Change the weights once.

        Args:
            batch: this process's share, on its device, as `datasets` has the items.
            full: with all losses, not with the reconstruction loss alone.

        Returns:
            The losses, without their weights, as means over all processes; `total` is with them.

        Raises:
            NotFinite: see there.
        """
        parts = self._parts_of(batch)
        losses: dict[str, Tensor] = {}
        # With several parts there is memory for the graph of one at a time.
        outputs = [self._forward(parts[0])] if len(parts) == 1 else None
        if full and self._networks.discriminator is not None:
            fakes = [x.sr for x in outputs or self._without_graph(parts)]
            losses["discriminator"] = self._train_discriminator(parts, fakes)
        losses |= self._generator_gradients(parts, outputs, full)
        means = self._checked(losses)
        networks, clip = self._networks, self._config.optim.clip
        if clip is not None:
            self._accelerator.clip_grad_norm_(networks.generator.parameters(), clip)
        networks.optimizer.step()
        if networks.ema is not None:
            networks.ema.update_parameters(networks.ttsr)
        return means

    def losses(self, output: Output, batch: Batch, full: bool) -> dict[str, Tensor]:
        """Those of the generator and, as `total`, their weighted sum."""
        loss, networks = self._config.loss, self._networks
        sr, hr = output.sr, batch["hr"]
        losses = {"rec": reconstruction_loss(sr, hr, loss.rec_type)}
        weights = {"rec": loss.rec_w, "per": loss.per_w, "tpl": loss.tpl_w, "adv": loss.adv_w}
        if full and networks.vgg is not None:
            with self._accelerator.autocast():
                losses["per"] = perceptual_loss(networks.vgg, sr, hr)
        if full and loss.tpl_w > 0:
            S = output.S if loss.tpl_use_S else None
            features = networks.ttsr(sr=sr)
            losses["tpl"] = transferal_loss(features, output.textures, S, loss.tpl_type)
        if full and networks.discriminator is not None:
            losses["adv"] = adversarial_loss(networks.discriminator, sr, loss.gan_type)
        losses["total"] = torch.stack([weights[name] * x for name, x in losses.items()]).sum()
        return losses

    def _generator_gradients(
        self, parts: list[Batch], outputs: list[Output] | None, full: bool
    ) -> dict[str, Tensor]:
        networks = self._networks
        sums: dict[str, Tensor] = {}
        networks.optimizer.zero_grad()
        if networks.discriminator is not None:
            networks.discriminator.requires_grad_(False)
        for number, part in enumerate(parts, 1):
            waiting = number < len(parts)
            with self._accelerator.no_sync(networks.generator) if waiting else nullcontext():
                output = outputs[0] if outputs else self._forward(part)
                losses = self.losses(output, part, full)
                self._accelerator.backward(losses["total"] / len(parts))
            _add(sums, losses, len(parts))
        if networks.discriminator is not None:
            networks.discriminator.requires_grad_(True)
        return sums

    def _train_discriminator(self, parts: list[Batch], fakes: list[Tensor]) -> Tensor:
        """`gan_k` steps on what the generator makes now; the loss of the last."""
        networks, loss = self._networks, self._config.loss
        assert networks.discriminator is not None and networks.optimizer_d is not None
        sums: dict[str, Tensor] = {}
        for _ in range(loss.gan_k):
            sums = {}
            networks.optimizer_d.zero_grad()
            self._skip_draws(self._accelerator.process_index, fakes)
            for part, fake in zip(parts, fakes, strict=True):
                value = discriminator_loss(
                    networks.discriminator,
                    fake.detach(),
                    part["hr"],
                    loss.gan_type,
                    loss.penalty,
                    self.penalty_rng,
                )
                (value / len(parts)).backward()
                _add(sums, {"discriminator": value}, len(parts))
            after = self._accelerator.num_processes - self._accelerator.process_index - 1
            self._skip_draws(after, fakes)
            networks.average_gradients(networks.discriminator)
            self._checked(sums)
            networks.optimizer_d.step()
        return sums["discriminator"]

    def _skip_draws(self, processes: int, fakes: list[Tensor]) -> None:
        """Those of the images of so many other processes, one for each."""
        torch.rand(processes * sum(map(len, fakes)), generator=self.penalty_rng)

    def _forward(self, batch: Batch) -> Output:
        images = {name: batch[name] for name in ("lr", "lrsr", "ref", "refsr")}
        mask = batch["key_mask"] if self._config.data.mask_padding else None
        sr, *others = self._networks.generator(**images, key_mask=mask)
        return Output(sr, others[0], tuple(others[1:])) if others else Output(sr)

    def _without_graph(self, parts: list[Batch]) -> list[Output]:
        with torch.no_grad():
            return [self._forward(part) for part in parts]

    def _parts_of(self, batch: Batch) -> list[Batch]:
        count = self._config.run.accumulate
        chunks = {name: x.chunk(count) for name, x in batch.items()}
        return [{name: x[i] for name, x in chunks.items()} for i in range(count)]

    def _checked(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The means over all processes, if they are finite."""
        own = torch.stack([x.float() for x in losses.values()])
        means = self._accelerator.reduce(own, "mean").tolist()
        bad = {n: x for n, x in zip(losses, means, strict=True) if not math.isfinite(x)}
        if bad:
            raise NotFinite(
                " and ".join(f"loss {name} is {value}" for name, value in bad.items()),
                not bool(own.isfinite().all()),
            )
        return dict(zip(losses, means, strict=True))


def _add(sums: dict[str, Tensor], losses: Mapping[str, Tensor], count: int) -> None:
    """Add a part's share, one of `count`, of means."""
    for name, value in losses.items():
        sums[name] = sums.get(name, 0) + value.detach() / count
