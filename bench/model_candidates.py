"""The candidates of `SearchTransfer` and of the whole model."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache, partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from machine import CPU
from measure import synchronize
from registry import Candidate, Run, Size, noise
from search_candidates import unfold_bytes
from torch import Tensor
from transfer import LEVELS, make_index

from ttsr_fast import TTSR, SearchTransfer, functional, reference
from ttsr_fast.model import lte, main_net
from ttsr_fast.upscaling import ttsr
from ttsr_fast.upscaling.execution import Execution
from ttsr_fast.upscaling.plan import plan_upscale

MODULE = ("SearchTransfer", "with gradients")
MODEL = ("TTSR", "training step")
STAGES = ("LTE", "search", "transfer", "MainNet", "backward", "Adam")
MODULES = ("LTE", "SearchTransfer", "MainNet")
SHIFT = (12, 20)  # pixels between a place in the image and in its reference


# --- SearchTransfer ---


@lru_cache(maxsize=1)
def make_features(size: Size, device: torch.device = CPU) -> tuple[list[Tensor], list[Tensor]]:
    """The five maps of `SearchTransfer`, with clear best matches, and gradients of its results."""
    given = noise(device)

    def normal(channels: int, stride: int, grid: tuple[int, int]) -> Tensor:
        return given(size.batch, channels, *(stride * n for n in grid))

    values = [normal(channels, stride, size.key) for stride, channels in LEVELS.values()]
    refsr = normal(256, 1, size.key)
    lrsr = reference.gather_fold(refsr, make_index("coherent", size, device))
    lrsr += 0.3 * normal(256, 1, size.query)
    grads = [normal(1, 1, size.query)]
    grads += [normal(channels, s, size.query) for s, channels in reversed(LEVELS.values())]
    return [lrsr, refsr, *values], grads


def module_run(name: str, operation: str, maps: list[Tensor], grads: list[Tensor]) -> Run:
    """`SearchTransfer`, forward or with all its gradients."""
    variant = CANDIDATES[name]
    module: Callable[..., tuple[Tensor, ...]] = reference.search_transfer
    if name != ORIGINAL:
        module = SearchTransfer(backend=variant.backend, precision=variant.precision)
    if operation == "SearchTransfer":
        return lambda: module(*maps)
    leaves = [x.detach().requires_grad_() for x in maps]
    return lambda: torch.autograd.grad(module(*leaves), leaves, grads)


# --- the whole model ---


def make_model(name: str) -> TTSR:
    """TTSR as published, in one of its variants, with the same random weights in all of them."""
    variant = CANDIDATES[name]
    logging.disable(logging.WARNING)  # random weights are intended
    with torch.random.fork_rng(devices=[]), CPU:
        torch.manual_seed(0)
        model = TTSR(backend=variant.backend, precision=variant.precision)
    logging.disable(logging.NOTSET)
    if name == ORIGINAL:
        model.SearchTransfer.forward = reference.search_transfer
    return model


def make_images(size: Size) -> dict[str, Tensor]:
    """Inputs of the model, with clear best matches, and `hr`, the target of a training step."""
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
    """A variant of the model with its images.

    A training step returns its loss and the gradient of the first convolution of LTE, which passes
    through all other parts.
    """

    def __init__(
        self,
        name: str,
        operation: str,
        size: Size,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name, self.variant, self.size, self.device = name, CANDIDATES[name], size, device
        self.model = make_model(name).to(device, dtype)
        self.images = {key: x.to(device, dtype) for key, x in make_images(size).items()}
        self.run = self._forward if operation == "TTSR" else self._train
        self._seconds: dict[str, float] | None = None  # of each stage, while it is measured

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.model.parameters(), lr=1e-4)

    def _model_run(self) -> tuple[Tensor, ...]:
        with ExitStack() as stack:
            for module in (lte, main_net) if self.name == ORIGINAL else ():  # contiguous maps
                stack.enter_context(mock.patch.object(module, "channels_last_on_cpu", lambda x: x))
            return self.model(*(self.images[name] for name in ("lr", "lrsr", "ref", "refsr")))

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, ...]:
        if self.variant.amp is None:
            return self._model_run()
        # Image and scores by the functions of `upscale`.
        amp, lr, lrsr, ref, refsr = self.variant.amp, *list(self.images.values())[:4]
        plan = plan_upscale(self.size.query, [self.size.key], model=self.model)
        execution = Execution(backend=self.variant.backend, amp=amp)
        features = [ttsr.reference_features(self.model, ref, refsr, plan, execution)]
        sr, match = ttsr.super_resolve(self.model, lr, lrsr, features, plan, execution)
        return sr, match.score.unsqueeze(1)

    def _train(self) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = F.l1_loss(self._model_run()[0], self.images["hr"])
        with self._stage("backward"):
            loss.backward()
        with self._stage("Adam"):
            self.optimizer.step()
        return loss.detach(), self.model.LTE.slice1[0].weight.grad

    def stages(self) -> dict[str, float]:
        """Seconds in each stage of one run, synchronised; the search is run again by itself."""
        self._seconds = dict.fromkeys(STAGES, 0.0)
        with ExitStack() as stack:
            for name in MODULES:
                module = getattr(self.model, name)
                timed = partial(self._timed, name, module.forward)
                stack.enter_context(mock.patch.object(module, "forward", timed))
            self.run()
        with torch.no_grad(), self._stage("search"):
            self._search(*self._searched)
        found, self._seconds = self._seconds, None
        found["transfer"] = max(0.0, found.pop("SearchTransfer") - found["search"])
        return {name: seconds for name, seconds in found.items() if seconds or name == "transfer"}

    def _timed(
        self, name: str, forward: Callable[..., Any], *inputs: Tensor, **options: Any
    ) -> Any:
        if name == "SearchTransfer":
            self._searched = [x.detach() for x in inputs[:2]]
        with self._stage(name):
            return forward(*inputs, **options)

    def _search(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == ORIGINAL:
            return reference.search(query, key)
        options = {"precision": self.variant.precision, "backend": self.variant.backend}
        return functional.search(query, key, **options)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        if self._seconds is None:
            yield
            return
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start


subject = lru_cache(maxsize=None)(Subject)  # shared by the time of a run and of its stages


# --- the registry ---


def _prepare(name: str, operation: str, size: Size, device: torch.device) -> Run:
    if operation in MODULE:
        return module_run(name, operation, *make_features(size, device))
    return subject(name, operation, size, device).run


def _original_bytes(size: Size, operation: str) -> int:
    """All scores and the unfolded features, or those of level 1; 2.4 times with gradients."""
    if operation in MODEL:
        return 0
    stride, channels = LEVELS["lv1"]
    patches = 4 * 9 * channels * stride**2 * size.batch * (size.queries + size.keys)
    forward = max(unfold_bytes(size, operation), patches)
    return forward * 12 // 5 if operation == "with gradients" else forward


def _variant(name: str, label: str, *devices: str, **options: Any) -> tuple[str, Candidate]:
    return name, Candidate(label, partial(_prepare, name), devices=devices, **options)


ORIGINAL = "reference"
GRAPH = {"graph": True, "operations": MODULE}
MIXED = {"amp": torch.bfloat16, "operations": MODEL[:1]}
CANDIDATES = dict(
    [
        _variant("cpp", "cpp", "cpu", backend="cpp"),
        _variant("cpp-bf16", "cpp, bf16", "cpu", backend="cpp", **MIXED),
        _variant("default", "default", "cuda"),
        _variant("fp16x3", "default, fp16x3", "cuda", precision="fp16x3"),
        _variant("default-graph", "default, graph", "cuda", **GRAPH),
        _variant("fp16x3-graph", "fp16x3, graph", "cuda", precision="fp16x3", **GRAPH),
        _variant("torch", "torch", "cpu", "cuda", backend="torch"),
        _variant(
            ORIGINAL, "original", "cpu", "cuda",
            backend="reference", baseline=True, bytes_needed=_original_bytes,
        ),
    ]
)  # fmt: skip
