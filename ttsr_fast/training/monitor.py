"""Validation of a training and its TensorBoard log."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ttsr_fast.metrics import raw_psnr
from ttsr_fast.model import TTSR
from ttsr_fast.optional import optional
from ttsr_fast.training.data import Batch, model_inputs

if TYPE_CHECKING:
    from accelerate import Accelerator

_INERTIA = 0.9  # of the average speed, per step


class Validation(NamedTuple):
    """Mean PSNR in dB over the images, of all RGB values rounded to 8 bits."""

    psnr: float
    bicubic: float


def validate(
    ttsr: TTSR, items: Dataset, accelerator: "Accelerator", mask_padding: bool = False
) -> Validation:
    """PSNR of the generator and of bicubic upscaling.

    Args:
        ttsr: the model itself; its mode is restored.
        items: data set; divided among the processes.
        accelerator: of the processes.
        mask_padding: as in training.
    """
    count = len(items)  # type: ignore[arg-type]
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(accelerator.process_index, count, accelerator.num_processes):
        batch = {name: x[None].to(accelerator.device) for name, x in items[number].items()}
        sr, hr = upscaled(ttsr, batch, mask_padding), batch["hr"]
        sums += torch.tensor([psnr(sr[0], hr[0]), psnr(batch["lrsr"][0], hr[0])]).double()
    sums = accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum")
    return Validation(*(sums / count).tolist())


@torch.no_grad()
def upscaled(ttsr: TTSR, batch: Batch, mask_padding: bool = False) -> Tensor:  # [N, 3, H, W]
    """Result of the generator for a batch."""
    training = ttsr.training
    try:
        return ttsr.eval()(**model_inputs(batch, mask_padding))[0]
    finally:
        ttsr.train(training)


def psnr(
    x: Tensor,  # [3, H, W]
    y: Tensor,  # [3, H, W]
) -> float:
    """PSNR in dB of images in [-1, 1], in 8 bits; infinite for equal images, NaN with a NaN."""
    if x.isnan().any() or y.isnan().any():  # 8 bits would hide it
        return math.nan
    return raw_psnr(_bytes(y), _bytes(x))


def comparison(ttsr: TTSR, batch: Batch, mask_padding: bool) -> np.ndarray:  # [H, W, 3] uint8
    """lrsr, the generator's result, hr and ref of the first item, in a row."""
    first = {name: x[:1] for name, x in batch.items()}
    sr = upscaled(ttsr, first, mask_padding)
    arrays = [_bytes(x[0]) for x in (first["lrsr"], sr, first["hr"], first["ref"])]
    height = max(len(array) for array in arrays)
    return np.hstack([np.pad(x, [(0, height - len(x)), (0, 4), (0, 0)]) for x in arrays])


def _bytes(
    image: Tensor,  # [3, H, W]
) -> np.ndarray:  # [H, W, 3] uint8
    """[-1, 1] to 0 to 255."""
    levels = ((image.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(1, 2, 0).byte().cpu().numpy()


class Log:
    """Scalars and images in TensorBoard's format.

    Args:
        folder: of its files; None for a process that writes none.
        step: last step before. Entries of later steps, from a killed run, are hidden.

    Raises:
        ImportError: tensorboard is missing.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            message = "a training's log needs tensorboard: pip install 'ttsr-fast[train]'"
            tensorboard = optional("torch.utils.tensorboard", message)
            self._writer = tensorboard.SummaryWriter(folder, purge_step=step + 1)
        self._before: float | None = None
        self._seconds: float | None = None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values as `group/name`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def image(
        self,
        name: str,
        pixels: np.ndarray,  # [H, W, 3] uint8
        step: int,
    ) -> None:
        """Write an image."""
        if self._writer is not None:
            self._writer.add_image(name, pixels, step, dataformats="HWC")

    def speed(self, images: int) -> float:
        """Images per second since the last call, averaged over the last steps; at first 0."""
        now = time.perf_counter()
        if self._before is not None:
            seconds = now - self._before
            mean = seconds if self._seconds is None else self._seconds
            self._seconds = _INERTIA * mean + (1 - _INERTIA) * seconds
        self._before = now
        return 0.0 if not self._seconds else images / self._seconds
