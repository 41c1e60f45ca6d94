"""Tile sizes of every kernel: one table, keyed by algorithm, target and arithmetic unit."""

from dataclasses import dataclass

import triton
from triton.runtime import driver


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program and its launch options.

    Attributes:
        block_q: query positions.
        block_k: key positions.
        num_warps: warps of 32 threads (64 on AMD).
        num_stages: depth of the software pipeline.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Options of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Fit 48 KiB of shared memory on any target, in any precision.
SAFE = {
    "direct": TileConfig(16, 64, 4, 2),
    "rolled": TileConfig(32, 64, 4, 2),
    "slab": TileConfig(64, 32, 4, 1),
}
INTERPRETED = TileConfig(64, 64, 4, 2)  # an interpreted operation costs the same at any size
# The largest tiles that compile without a register spill; not yet measured. Target None is the
# default. The unit is "float32", or "tensor" for tensor cores.
TABLE = {
    ("rolled", None, "tensor"): TileConfig(64, 128, 8, 4),
    ("rolled", "sm_90", "tensor"): TileConfig(128, 128, 8, 4),
    ("rolled", "gfx942", "tensor"): TileConfig(128, 128, 8, 2),
    ("rolled", None, "float32"): TileConfig(64, 64, 8, 2),
    ("rolled", "sm_80", "float32"): TileConfig(64, 128, 8, 2),
    ("rolled", "gfx942", "float32"): TileConfig(128, 128, 8, 2),
    ("direct", None, "tensor"): TileConfig(128, 128, 8, 4),
    ("direct", "sm_80", "tensor"): TileConfig(128, 128, 8, 3),
    ("direct", "gfx942", "tensor"): TileConfig(128, 128, 8, 2),
    ("direct", None, "float32"): TileConfig(64, 128, 8, 2),
}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # compiled and checked for the table


def select(algorithm: str, precision: str) -> TileConfig:
    """Tile of an algorithm on the current target, for a precision by `Precision.name`."""
    unit = "float32" if precision == "float32" else "tensor"
    if target() == "interpreter":
        return INTERPRETED
    if target() not in TARGETS or algorithm == "slab":
        return SAFE[algorithm]
    return TABLE.get((algorithm, target(), unit)) or TABLE[algorithm, None, unit]


def target() -> str:
    """Compilation target: `sm_90`, `gfx942`; or `interpreter`."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    arch = driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def has_descriptors() -> bool:
    """Availability of block copies by descriptor (TMA: Hopper and later)."""
    name = target()
    return name == "interpreter" or (name.startswith("sm_") and int(name[3:]) >= 90)


def lazy() -> bool:
    """Permission for kernels with matrix products to skip the index where no score improves.

    Triton 3.6 and 3.7 do not compile such a branch with products in tensor memory (Blackwell).
    """
    return not target().startswith("sm_1")
