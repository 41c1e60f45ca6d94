"""What is trained: the networks, their optimisers and schedules, built and taken apart."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ttsr_fast.devices import gpu
from ttsr_fast.model import TTSR, load_model, lte
from ttsr_fast.model.discriminator import Discriminator
from ttsr_fast.model.vgg import VGG19, find_vgg19
from ttsr_fast.training import config as configs
from ttsr_fast.training.config import Config
from ttsr_fast.training.start import start_at_enlargement

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, set_seed
except ImportError as error:
    raise ImportError("training needs accelerate: pip install 'ttsr-fast[train]'") from error


class Networks:
    """Generator, discriminator, VGG19, average, as far as a training has them.

    The generator is wrapped for several processes and for 16 bits, as accelerate does it. The
    discriminator is small and is called several times before its loss is known: it stays in float32
    and unwrapped, and `average_gradients` makes its gradients those of all processes.

    Attributes:
        generator: as it is called.
        ttsr: the model itself.
        discriminator, vgg, ema: None where the training has none.
        lacks_vgg19: whether LTE starts from random weights because others were not found.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        optim = config.optim
        self._accelerator = accelerator
        vgg19 = _vgg19(config)
        set_seed(config.run.seed)
        with _without_warnings(lte):
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

    @property
    def best(self) -> TTSR:
        """The generator to be used: the average, if there is one."""
        return self.ttsr if self.ema is None else cast(TTSR, self.ema.module)

    def rates(self) -> dict[str, float]:
        """The learning rates of this moment."""
        groups = self.optimizer.param_groups
        rates = dict(zip(("MainNet", "LTE"), (group["lr"] for group in groups), strict=False))
        if self.optimizer_d is not None:
            rates["discriminator"] = self.optimizer_d.param_groups[0]["lr"]
        return rates

    def end_epoch(self) -> None:
        """An epoch with all losses is over: the schedules go on."""
        for schedule in self._schedules:
            schedule.step()

    def average_gradients(self, network: nn.Module) -> None:
        """Those of all processes, for a network that is not wrapped."""
        if self._accelerator.num_processes > 1:
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad = self._accelerator.reduce(parameter.grad, "mean")

    def state(self) -> dict[str, Any]:
        """Everything that training changes, as `load` takes it."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {
            "state_dict": self.ttsr.state_dict(),
            "schedules": [schedule.state_dict() for schedule in self._schedules],
            **parts,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a training with the same parts and shapes."""
        self.ttsr.load_state_dict(state["state_dict"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        for schedule, saved in zip(self._schedules, state["schedules"], strict=False):
            schedule.load_state_dict(saved)

    def _parts(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "optimizer_d": self.optimizer_d,
            "ema": self.ema,
            "scaler": self._accelerator.scaler,
        }
        return {name: part for name, part in parts.items() if part is not None}


def make_accelerator(config: Config) -> Accelerator:
    """accelerate's view of this process: its device, the others, 16 bits.

    Raises:
        ValueError: a batch that cannot be shared out among the processes, and what accelerate
            refuses.
    """
    model = config.model
    whole = model.hard_attention and model.soft_attention and model.csfi
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=not whole)
    # Left to itself, accelerate takes processes without a GPU for trainings of one process each.
    cpu = config.run.cpu or gpu() is None
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=config.run.amp or "no", kwargs_handlers=[wrapping]
    )
    if config.run.amp is not None and not accelerator.native_amp:  # accelerate does without it
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
        start_at_enlargement(ttsr)
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
def _without_warnings(module: ModuleType) -> Iterator[None]:
    """Whoever trains hears of random weights only where nothing replaces them."""
    logger = logging.getLogger(module.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _keep_matches(ttsr: TTSR) -> None:
    """Let features and search stay in float32 under autocast, or 16 bits would choose for them."""
    outside = torch.autocast(ttsr.device.type, enabled=False)
    ttsr.LTE.forward = outside(ttsr.LTE.forward)  # type: ignore[method-assign]
    ttsr.SearchTransfer.precision = ttsr.SearchTransfer.precision or "fp32"


def _vgg19(config: Config) -> dict[str, Tensor] | None:
    """VGG19's weights, which LTE starts from and the perceptual loss needs."""
    where = config.model.vgg19
    if where not in ("auto", "none"):
        return find_vgg19(where)
    if config.loss.per_w > 0:
        try:
            return find_vgg19()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"loss.per_w needs them: {error} as model.vgg19") from error
    if where == "none":
        return None
    try:
        return find_vgg19()
    except FileNotFoundError:
        return None


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
