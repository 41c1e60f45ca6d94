"""What `model.py` measures: `SearchTransfer` and the whole model, in their variants."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import devices
import torch
import torch.nn.functional as F
from devices import CPU, Run
from sizes import Size
from torch import Tensor, nn
from transfer import LEVELS, make_index

from ttsr_fast import TTSR, SearchTransfer, functional, reference
from ttsr_fast.model import lte, main_net
from ttsr_fast.operators import backends
from ttsr_fast.upscaling import ttsr
from ttsr_fast.upscaling.execution import Execution
from ttsr_fast.upscaling.plan import plan_upscale

STAGES = ("LTE", "search", "transfer", "MainNet", "backward", "Adam")
SHIFT = (12, 20)  # pixels by which the image lies elsewhere than in its reference
TINY = Size((4, 4), (4, 4))
TINY_PAIR = Size((4, 4), (16, 16))


@dataclass(frozen=True)
class Variant:
    """One way of searching and transferring inside the model.

    Attributes:
        label: for tables.
        devices: on which kinds it is measured unless it is asked for by name.
        backend: as in `SearchTransfer`, None for what the package chooses.
        precision: as in `SearchTransfer`.
        graph: whether it is replayed from a CUDA graph.
        amp: type of the convolutions, None for the model's; for the forward pass of the model.
    """

    label: str
    devices: tuple[str, ...]
    backend: str | None = None
    precision: str | None = None
    graph: bool = False
    amp: torch.dtype | None = None

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, None if it can."""
        if self.graph and device.type != "cuda":
            return "it needs a GPU"
        return None if self.backend is None else backends.why_not(self.backend, device)


ORIGINAL = "reference"
VARIANTS = {
    "cpp": Variant("cpp", ("cpu",), "cpp"),
    "cpp-bf16": Variant("cpp, bf16", ("cpu",), "cpp", amp=torch.bfloat16),
    "default": Variant("default", ("cuda",)),
    "fp16x3": Variant("default, fp16x3", ("cuda",), precision="fp16x3"),
    "default-graph": Variant("default, graph", ("cuda",), graph=True),
    "fp16x3-graph": Variant("fp16x3, graph", ("cuda",), precision="fp16x3", graph=True),
    "torch": Variant("torch", ("cpu", "cuda"), "torch"),
    ORIGINAL: Variant("original", ("cpu", "cuda"), "reference"),
}


# --- SearchTransfer ---


def make_features(size: Size, device: torch.device = CPU) -> tuple[list[Tensor], list[Tensor]]:
    """The five maps of `SearchTransfer`, and gradients of its four results.

    The queries are keys along a smooth flow plus noise, so that every best match is clear and
    results can be compared number by number.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(channels: int, stride: int, grid: tuple[int, int]) -> Tensor:
        shape = (size.batch, channels, *(stride * n for n in grid))
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    values = [normal(channels, stride, size.key) for stride, channels in LEVELS.values()]
    refsr = normal(256, 1, size.key)
    lrsr = reference.gather_fold(refsr, make_index("coherent", size, device))
    lrsr += 0.3 * normal(256, 1, size.query)
    grads = [normal(1, 1, size.query)]
    grads += [normal(channels, s, size.query) for s, channels in reversed(LEVELS.values())]
    return [lrsr, refsr, *values], grads


def module_run(name: str, operation: str, maps: list[Tensor], grads: list[Tensor]) -> Run:
    """`SearchTransfer`, forward or with all its gradients."""
    variant = VARIANTS[name]
    module: Callable[..., tuple[Tensor, ...]] = reference.search_transfer
    if name != ORIGINAL:
        module = SearchTransfer(backend=variant.backend, precision=variant.precision)
    if operation == "SearchTransfer":
        return lambda: module(*maps)
    leaves = [x.detach().requires_grad_() for x in maps]
    return lambda: torch.autograd.grad(module(*leaves), leaves, grads)


def module_job(name: str, operation: str, size: Size) -> tuple[Run, Callable[[], Run]]:
    """`module_run` for `memory.peak_bytes`."""

    def prepare(size: Size) -> Run:
        return module_run(name, operation, *make_features(size))

    return prepare(TINY), lambda: prepare(size)


# --- the whole model ---


class Original(nn.Module):
    """The original form in the place of `SearchTransfer`."""

    def forward(self, *maps: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        return reference.search_transfer(*maps, key_mask=key_mask)


def make_model(name: str) -> TTSR:
    """TTSR as published, in one of its variants and with the same random weights in all of them."""
    variant = VARIANTS[name]
    with torch.random.fork_rng(devices=[]), CPU, _errors_only("ttsr_fast.model"):
        torch.manual_seed(0)
        model = TTSR(backend=variant.backend, precision=variant.precision)
    if name == ORIGINAL:
        model.SearchTransfer = Original()
    return model


@contextmanager
def _planes() -> Iterator[None]:
    """Maps as planes of a channel each, as the original form has them."""
    ours = lte.channels_last_on_cpu
    lte.channels_last_on_cpu = main_net.channels_last_on_cpu = lambda x: x
    try:
        yield
    finally:
        lte.channels_last_on_cpu = main_net.channels_last_on_cpu = ours


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    """Keep to itself that weights are random, which each process of a benchmark would say."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def make_images(size: Size) -> dict[str, Tensor]:
    """Images as the model takes them, and `hr`, what a training step aims at.

    Noise, of which the image holds the same as its reference at another place: that makes every
    best match clear, where those of two noises are not.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu") * 2 - 1

    refsr = noise(size.batch, 3, *size.key)
    y, x = (
        (torch.arange(4 * n, device="cpu") + shift) % keys
        for n, keys, shift in zip(size.query, size.key, SHIFT, strict=True)
    )
    lrsr = 0.95 * refsr[:, :, y][:, :, :, x]
    lrsr += 0.05 * noise(*lrsr.shape)
    ref, hr = (0.8 * map_ + 0.2 * noise(*map_.shape) for map_ in (refsr, lrsr))
    return {"lr": F.avg_pool2d(lrsr, 4), "lrsr": lrsr, "ref": ref, "refsr": refsr, "hr": hr}


class Subject:
    """A variant of the model with its images, made at the first run.

    The result of a forward pass is that of the model; the result of a training step is its loss and
    the gradient that reaches the first convolution of LTE, through all that lies between.
    """

    def __init__(
        self,
        name: str,
        operation: str,
        size: Size,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.size, self.device, self.dtype = name, size, device, dtype
        self.run = self._forward if operation == "TTSR" else self._train
        self._seconds: dict[str, float] | None = None  # of each stage, while they are wanted

    @cached_property
    def model(self) -> TTSR:
        return make_model(self.name).to(self.device, self.dtype)

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.model.parameters(), lr=1e-4)

    @cached_property
    def images(self) -> dict[str, Tensor]:
        images = make_images(self.size)
        return {name: image.to(self.device, self.dtype) for name, image in images.items()}

    def prepare(self) -> None:
        """Make what a run makes at its first call."""
        self.model, self.images  # noqa: B018  # properties that keep what they make

    def _model_run(self) -> tuple[Tensor, ...]:
        return self.model(*(self.images[name] for name in ("lr", "lrsr", "ref", "refsr")))

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, ...]:
        variant = VARIANTS[self.name]
        if self.name == ORIGINAL:
            with _planes():
                return self._model_run()
        return self._model_run() if variant.amp is None else self._mixed(variant)

    def _mixed(self, variant: Variant) -> tuple[Tensor, ...]:
        """Picture and scores, as `upscale` makes them."""
        plan = plan_upscale(self.size.query, [self.size.key], model=self.model)
        lr, lrsr, ref, refsr = (self.images[name] for name in ("lr", "lrsr", "ref", "refsr"))
        execution = Execution(backend=variant.backend, amp=variant.amp)
        features = ttsr.reference_features(self.model, ref, refsr, plan, execution)
        sr, match = ttsr.super_resolve(self.model, lr, lrsr, [features], plan, execution)
        return sr, match.score.unsqueeze(1)

    def _train(self) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        with _planes() if self.name == ORIGINAL else nullcontext():
            loss = F.l1_loss(self._model_run()[0], self.images["hr"])
        with self._stage("backward"):
            loss.backward()
        with self._stage("Adam"):
            self.optimizer.step()
        return loss.detach(), self.model.LTE.slice1[0].weight.grad

    def stages(self) -> dict[str, float]:
        """Seconds in each stage of one run.

        The search is run once more by itself on the features of the run; what `SearchTransfer`
        takes beyond that is the transfer. On a GPU every stage is waited for.
        """
        self._seconds = {}
        with self._hooks() as features:
            self.run()
        with torch.no_grad(), self._stage("search"):
            self._search(*features)
        found, self._seconds = self._seconds, None
        found["transfer"] = max(0.0, found.pop("SearchTransfer") - found["search"])
        return {name: found[name] for name in STAGES if name in found}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        if self._seconds is not None:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._seconds is not None:
            devices.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _hooks(self) -> Iterator[list[Tensor]]:
        """Stages by module; gives a list that will hold the maps that were searched."""
        features: list[Tensor] = []
        running: list[AbstractContextManager[None]] = []
        modules = {getattr(self.model, name): name for name in ("LTE", "SearchTransfer", "MainNet")}

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module is self.model.SearchTransfer:
                features[:] = [x.detach() for x in inputs[:2]]
            running.append(self._stage(modules[module]))
            running[-1].__enter__()

        def leave(module: nn.Module, inputs: Any, result: Any) -> None:
            running.pop().__exit__(None, None, None)

        handles = [module.register_forward_pre_hook(enter) for module in modules]
        handles += [module.register_forward_hook(leave) for module in modules]
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def _search(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == ORIGINAL:
            return reference.search(query, key)
        variant = VARIANTS[self.name]
        return functional.search(query, key, precision=variant.precision, backend=variant.backend)


def subject_job(name: str, operation: str, size: Size) -> tuple[Run, Callable[[], Run]]:
    """`Subject.run` for `memory.peak_bytes`, which counts gradients and Adam's state as well."""

    def prepare() -> Run:
        subject = Subject(name, operation, size)
        subject.prepare()
        return subject.run

    return Subject(name, operation, TINY_PAIR).run, prepare
