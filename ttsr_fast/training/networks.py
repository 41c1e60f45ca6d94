"""Networks of a training, with their optimisers and schedules."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ttsr_fast.devices import gpu
from ttsr_fast.model import TTSR, load_model
from ttsr_fast.model.discriminator import Discriminator
from ttsr_fast.model.vgg import VGG19, find_vgg19
from ttsr_fast.optional import optional
from ttsr_fast.training import config as configs
from ttsr_fast.training.config import Config
from ttsr_fast.training.data import Batch, model_inputs
from ttsr_fast.training.initialisation import initialise_as_upscaling

if TYPE_CHECKING:
    from accelerate import Accelerator

accelerate = optional("accelerate", "training needs accelerate: pip install 'ttsr-fast[train]'")


class Output(NamedTuple):
    """Result of the generator for a batch."""

    sr: Tensor
    S: Tensor | None = None  # None without hard attention
    textures: tuple[Tensor, ...] = ()


class Networks:
    """Generator, discriminator, VGG19 and average of weights, as far as the settings need them.

    accelerate wraps the generator for several processes and for 16 bits. The discriminator is small
    and runs several times before its loss is known: it stays in float32 and unwrapped, and
    `average_gradients` averages its gradients over all processes.

    Attributes:
        generator: as it is called.
        ttsr: the model itself.
        discriminator, optimizer_d, vgg, ema: None in a training without them.
        penalty_rng: generator of the gradient penalty's random numbers.
        lacks_vgg19: LTE starts from random weights because no others were found.
    """

    def __init__(self, config: Config, accelerator: "Accelerator") -> None:
        optim = config.optim
        self._accelerator, self._mask_padding = accelerator, config.data.mask_padding
        vgg19 = _vgg19(config)
        accelerate.utils.set_seed(config.run.seed)
        with _errors_only("ttsr_fast.model"):  # `lacks_vgg19` decides about the warning
            self.ttsr = _generator(config.model, vgg19).to(accelerator.device)
        textures = config.model.hard_attention and config.model.weights is None
        self.lacks_vgg19 = vgg19 is None and config.model.vgg19 == "auto" and textures
        optimizer = _optimizer(self.ttsr, optim)
        self._schedules = [StepLR(optimizer, optim.decay, optim.gamma)] if optim.decay else []
        self.ema = None
        if optim.ema is not None:
            average = get_ema_multi_avg_fn(optim.ema)
            self.ema = AveragedModel(self.ttsr, multi_avg_fn=average)
        if config.run.amp is not None and self.ttsr.hard_attention:
            _keep_matches(self.ttsr)
        self.generator, self.optimizer = accelerator.prepare(self.ttsr, optimizer)
        self.discriminator: Discriminator | None = None
        self.optimizer_d: torch.optim.Optimizer | None = None
        self.penalty_rng = torch.Generator().manual_seed(config.run.seed)
        if config.loss.adv_w > 0:
            self.discriminator = Discriminator(config.data.size).to(accelerator.device)
            rate, betas = optim.lr_rate_dis, (0.0, 0.9)  # arXiv 1704.00028, algorithm 1
            self.optimizer_d = torch.optim.Adam(self.discriminator.parameters(), rate, betas)
            if optim.decay:
                self._schedules.append(StepLR(self.optimizer_d, optim.decay, optim.gamma))
        self.vgg = None
        if config.loss.per_w > 0:
            assert vgg19 is not None
            self.vgg = VGG19(vgg19).to(accelerator.device)

    def forward(self, batch: Batch) -> Output:
        """Result of the generator for a batch."""
        sr, *others = self.generator(**model_inputs(batch, self._mask_padding))
        return Output(sr, others[0], tuple(others[1:])) if others else Output(sr)

    @property
    def best(self) -> TTSR:
        """The average of the generator, or the generator in a training without one."""
        return self.ttsr if self.ema is None else cast(TTSR, self.ema.module)

    def rates(self) -> dict[str, float]:
        """Current learning rates."""
        groups = self.optimizer.param_groups
        rates = dict(zip(("MainNet", "LTE"), (group["lr"] for group in groups), strict=False))
        if self.optimizer_d is not None:
            rates["discriminator"] = self.optimizer_d.param_groups[0]["lr"]
        return rates

    def end_epoch(self) -> None:
        """Advance the schedules after an epoch with all losses."""
        for schedule in self._schedules:
            schedule.step()

    def average_gradients(self, network: nn.Module) -> None:
        """Average the gradients of an unwrapped network over all processes."""
        if self._accelerator.num_processes > 1:
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad = self._accelerator.reduce(parameter.grad, "mean")

    def state(self) -> dict[str, Any]:
        """All state that training changes, for `load`."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {
            "state_dict": self.ttsr.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            "penalty_rng": self.penalty_rng.get_state(),
            **parts,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Load the state of a training with the same parts and shapes."""
        self.ttsr.load_state_dict(state["state_dict"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for schedule, saved in zip(self._schedules, state["schedules"], strict=False):
            schedule.load_state_dict(saved)
        self.penalty_rng.set_state(state["penalty_rng"])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "optimizer_d": self.optimizer_d,
            "ema": self.ema,
            "scaler": self._accelerator.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}


def make_accelerator(config: Config) -> "Accelerator":
    """accelerate's device, processes and 16 bits.

    Raises:
        ValueError: a batch that the processes cannot divide, or settings refused by accelerate.
    """
    model = config.model
    whole = model.hard_attention and model.soft_attention and model.csfi
    wrapping = accelerate.utils.DistributedDataParallelKwargs(find_unused_parameters=not whole)
    # By default accelerate treats processes without a GPU as trainings of one process each.
    cpu = config.run.cpu or gpu() is None
    accelerator = accelerate.Accelerator(
        cpu=cpu, mixed_precision=config.run.amp or "no", kwargs_handlers=[wrapping]
    )
    if config.run.amp is not None and not accelerator.native_amp:  # accelerate ignores it
        raise ValueError(f"run.amp {config.run.amp} is not possible on {accelerator.device.type}")
    batch, parts = config.data.batch_size, accelerator.num_processes * config.run.accumulate
    if batch % parts:
        raise ValueError(
            f"data.batch_size must be a multiple of {parts} ({accelerator.num_processes} processes "
            f"x run.accumulate {config.run.accumulate}), got {batch}"
        )
    return accelerator


def _generator(model: configs.Model, vgg19: Mapping[str, Tensor] | None) -> TTSR:
    ttsr = TTSR(
        model.num_res_blocks,
        model.n_feats,
        model.res_scale,
        vgg19=vgg19,
        precision=model.precision,
        backend=model.backend,
        hard_attention=model.hard_attention,
        soft_attention=model.soft_attention,
        csfi=model.csfi,
    )
    if model.start == "enlargement":
        initialise_as_upscaling(ttsr)
    if model.weights is not None:
        given = load_model(model.weights)
        try:
            ttsr.load_state_dict(given.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"model.weights {model.weights} are of another model than model.num_res_blocks "
                f"{model.num_res_blocks} and model.n_feats {model.n_feats}"
            ) from error
    return ttsr


@contextmanager
def frozen(network: nn.Module | None) -> Iterator[None]:
    """No gradients for the weights of a network inside the block."""
    parameters = [] if network is None else list(network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Mute the warnings of a logger inside the block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _keep_matches(ttsr: TTSR) -> None:
    """Features and search in float32 under autocast, so that 16 bits change no match."""
    outside = torch.autocast(ttsr.device.type, enabled=False)
    ttsr.LTE.forward = outside(ttsr.LTE.forward)  # type: ignore[method-assign]
    ttsr.SearchTransfer.precision = ttsr.SearchTransfer.precision or "fp32"


def _vgg19(config: Config) -> dict[str, Tensor] | None:
    """Weights of VGG19 for the start of LTE and for the perceptual loss."""
    where, needed = config.model.vgg19, config.loss.per_w > 0
    if where not in ("auto", "none"):
        return find_vgg19(where)
    if where == "none" and not needed:
        return None
    try:
        return find_vgg19()
    except FileNotFoundError as error:
        if not needed:
            return None
        raise FileNotFoundError(f"loss.per_w needs them: {error} as model.vgg19") from error


def _optimizer(ttsr: TTSR, optim: configs.Optim) -> torch.optim.Optimizer:
    """Adam for MainNet and, unless it is frozen or left out, LTE."""
    groups: list[dict[str, Any]] = [
        {"params": list(ttsr.MainNet.parameters()), "lr": optim.lr_rate}
    ]
    if ttsr.hard_attention and optim.lr_rate_lte > 0:
        learnt = [x for x in ttsr.LTE.parameters() if x.requires_grad]  # without sub_mean
        groups.append({"params": learnt, "lr": optim.lr_rate_lte})
    elif ttsr.hard_attention:
        ttsr.LTE.requires_grad_(False)
    return torch.optim.Adam(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
