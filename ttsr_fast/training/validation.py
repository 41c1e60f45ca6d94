"""How good the generator is on held-out pictures, and pictures to look at."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from ttsr_fast.model import TTSR
from ttsr_fast.training.steps import Batch


class Validation(NamedTuple):
    """Mean PSNR in dB over the pictures, all RGB values rounded to 8 bits."""

    psnr: float
    bicubic: float


def validate(
    ttsr: TTSR, items: Dataset, accelerator: Accelerator, *, mask_padding: bool = False
) -> Validation:
    """PSNR of the generator and of bicubic enlargement.

    Args:
        ttsr: the model itself; its mode is as before afterwards.
        items: as `datasets` has them; shared out among the processes.
        accelerator: tells which this process is.
        mask_padding: as in training.
    """
    count = len(items)  # type: ignore[arg-type]
    sums = torch.zeros(2, dtype=torch.float64)
    for number in range(accelerator.process_index, count, accelerator.num_processes):
        batch = {name: x[None].to(accelerator.device) for name, x in items[number].items()}
        sr, hr = enlarged(ttsr, batch, mask_padding), batch["hr"]
        sums += torch.tensor([psnr(sr[0], hr[0]), psnr(batch["lrsr"][0], hr[0])]).double()
    sums = accelerator.reduce(sums.to(accelerator.device, torch.float32), "sum")
    return Validation(*(sums / count).tolist())


@torch.no_grad()
def enlarged(ttsr: TTSR, batch: Batch, mask_padding: bool = False) -> Tensor:  # [N, 3, H, W]
    """What the generator makes of a batch."""
    images = {name: batch[name] for name in ("lr", "lrsr", "ref", "refsr")}
    training = ttsr.training
    try:
        return ttsr.eval()(**images, key_mask=batch["key_mask"] if mask_padding else None)[0]
    finally:
        ttsr.train(training)


def psnr(
    x: Tensor,  # [3, H, W]
    y: Tensor,  # [3, H, W]
) -> float:
    """In dB, of images in [-1, 1]; infinite for equal ones, NaN for one that holds NaN."""
    from skimage.metrics import peak_signal_noise_ratio

    if x.isnan().any() or y.isnan().any():  # 8 bits would hide it
        return float("nan")
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(to_bytes(y), to_bytes(x), data_range=255))


def to_bytes(
    image: Tensor,  # [3, H, W]
) -> np.ndarray:  # [H, W, 3] uint8
    """[-1, 1] to 0 to 255."""
    levels = ((image.float() + 1) * 127.5).round().clamp(0, 255)
    return levels.permute(1, 2, 0).byte().cpu().numpy()


def row(images: Sequence[Tensor]) -> np.ndarray:  # [H, W, 3] uint8
    """Images `[3, *, *]` side by side, black where one is smaller than another."""
    arrays = [to_bytes(image) for image in images]
    height = max(len(array) for array in arrays)
    return np.hstack([np.pad(x, [(0, height - len(x)), (0, 4), (0, 0)]) for x in arrays])
