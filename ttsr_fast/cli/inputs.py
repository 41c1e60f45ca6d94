"""Objects made from the options of commands: references, model, device, limits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ttsr_fast.cli import environment
from ttsr_fast.datasets import images_in, namesake
from ttsr_fast.files import shown
from ttsr_fast.model import load_model
from ttsr_fast.operators import backends
from ttsr_fast.upscaling import memory
from ttsr_fast.upscaling.bank import ReferenceBank


class ReferenceOptions:
    """References of every image: all for each, or one of the same name."""

    def __init__(self, ref: list[Path] | None, pairs: Path | None, cache: Path | None) -> None:
        if bool(ref) == (pairs is not None):
            raise ValueError("either --ref or --pairs is needed, and not both")
        if pairs is not None and not pairs.is_dir():
            raise ValueError(f"--pairs must be a folder, got {shown(pairs)}")
        self._pairs, self._cache = pairs, cache
        self._all = [file for path in ref or () for file in images_in(path)]
        self._named = set(ref or ())
        self._bank: ReferenceBank | None = None

    def files(self, source: Path) -> list[Path]:
        return self._all if self._pairs is None else [namesake(source, self._pairs)]

    def inputs(self) -> list[Path]:
        """All references of all images."""
        return self._all if self._pairs is None else images_in(self._pairs)

    def check(self, source: Path) -> None:
        """Read shared references now: a bad one is an error of the command, not of an image."""
        if self._pairs is None:
            self.bank(source)

    def leave_out(self, is_result: Callable[[Path], bool]) -> None:
        """Skip results of earlier runs in folders of references."""
        left = [file for file in self._all if file in self._named or not is_result(file)]
        if self._all and not left:
            raise ValueError("--ref must name images, got only results")
        self._all = left

    def bank(self, source: Path) -> ReferenceBank:
        if self._pairs is not None or self._bank is None:
            files = self.files(source)
            self._bank = ReferenceBank(files if len(files) > 1 else files[0], cache=self._cache)
        return self._bank


def upscale_options(
    weights: Path | None,
    method: str | None,
    phases: int | None,
    device: str | None,
    backend: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """Options of `upscale`, with the model on its device."""
    if method == "ttsr" and weights is None:
        raise ValueError("--method ttsr needs --weights")
    if weights is not None and (method == "detail" or phases is not None):
        raise ValueError("--weights are for --method ttsr, which takes no --phases")
    options = {"method": method, "phases": phases, "backend": backend, "precision": precision}
    where = torch.device(device_named(device))
    if backend is not None:
        backends.can_run(backend, where, raise_error=True)
    if weights is not None:
        return {**options, "model": load_model(weights).to(where)}
    return {**options, "device": where}


def device_named(name: str | None) -> str:
    known = environment.devices()
    if name is None:
        return next(iter(known[1:]), "cpu")
    if name not in known and f"{name}:0" not in known:
        builds = f"; torch {torch.__version__} is a build without CUDA"
        why = builds if name.startswith("cuda") and torch.version.cuda is None else ""
        raise ValueError(f"--device must be one of {', '.join(known)}, got {name}{why}")
    return name


def memory_limit(text: str | None) -> int | None:
    try:
        return None if text is None else memory.parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--max-memory: {error}") from None
