"""Patches of a map: their grid, their norms, and the normalisation of a score."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Patch(NamedTuple):
    """Side of a square patch, and the zeros around the map that it is taken from.

    The patch at grid position (y, x) begins at row `y - padding` and column `x - padding`.
    """

    kernel_size: int = 3
    padding: int = 1

    @classmethod
    def of(cls, kernel_size: int = 3, padding: int | None = None) -> "Patch":
        """The patch of these arguments of `search`, with their defaults."""
        return cls(kernel_size, kernel_size // 2 if padding is None else padding)

    @property
    def shrink(self) -> int:
        """Positions along an axis that a map has more than its patch grid."""
        return self.kernel_size - 1 - 2 * self.padding

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in a map of `height x width`."""
        return height - self.shrink, width - self.shrink

    def map_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Height and width of the map with `rows x columns` patches."""
        return rows + self.shrink, columns + self.shrink


class Score(NamedTuple):
    """Normalisation of a score: which patches are divided by their norm, and by what exactly."""

    normalize: str = "both"
    eps: float = 1e-12
    add_eps: bool = False

    @property
    def of_query(self) -> bool:
        """True if query patches are normalised."""
        return self.normalize == "both"

    @property
    def of_key(self) -> bool:
        """True if key patches are normalised."""
        return self.normalize != "none"

    def denominator(self, norm: Tensor) -> Tensor:
        """Denominators of patches with these norms."""
        return norm + self.eps if self.add_eps else norm.clamp(min=self.eps)

    @property
    def varies_above(self) -> float:
        """The norm above which the denominator varies with it."""
        return 0.0 if self.add_eps else self.eps


class Transfer(NamedTuple):
    """Options of a transfer: stride of every level, patch, and divisor of the sums."""

    strides: list[int]
    patch: Patch
    divisor: str

    def key_grid(self, value_size: Any, level: int = 0) -> tuple[int, int]:
        """The grid that the index counts in, from the size of a value."""
        stride = self.strides[level]
        return self.patch.grid(value_size[2] // stride, value_size[3] // stride)


# Schemas of the three, as arguments of an operator.
PATCH = "int kernel_size, int padding"
SCORE = "str normalize, float eps, bool add_eps"
TRANSFER = f"int[] strides, {PATCH}, str divisor"


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and of sums over features of `dtype`: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def patch_norm(x: Tensor, patch: Patch) -> Tensor:  # [N, C, H, W] -> [N, 1, Ho, Wo]
    """Norm of every patch of `x`."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=sum_dtype(x.dtype))
    return patch_sum(norm**2, patch).sqrt()


def patch_sum(x: Tensor, patch: Patch) -> Tensor:  # [N, C, H, W] -> [N, C, Ho, Wo]
    """Sum of every patch of `x`, channel by channel."""
    padded = F.pad(x, [patch.padding] * 4)
    return F.avg_pool2d(padded, patch.kernel_size, stride=1, divisor_override=1)


def patch_sum_transpose(x: Tensor, patch: Patch) -> Tensor:  # [N, C, Ho, Wo] -> [N, C, H, W]
    """Transpose of `patch_sum`: the sum over all patches that hold a pixel."""
    return patch_sum(x, Patch(patch.kernel_size, patch.kernel_size - 1 - patch.padding))


def empty_like(x: Tensor, size: list[int]) -> Tensor:  # size
    """An empty map of another size, with dtype, device and memory format of `x`."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
