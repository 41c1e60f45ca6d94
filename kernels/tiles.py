"""The tile sizes of every kernel: one table, keyed by algorithm, target and operand type.

`candidates` is what a search for better ones goes through; its winners are entered here.
"""

from dataclasses import dataclass

import triton
from triton.runtime import driver


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel is cut.

    Attributes:
        block_q: query positions.
        block_k: key positions.
        block_c: channels multiplied at a time; divides 64.
        num_warps: of 32 threads (64 on AMD).
        num_stages: depth of the software pipeline.
    """

    block_q: int
    block_k: int
    block_c: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Fits 48 KiB of shared memory on any target, whatever is multiplied.
SAFE = {
    "direct": Tile(64, 64, 32, 4, 2),
    "rolled": Tile(32, 64, 32, 4, 2),
    "slab": Tile(64, 32, 64, 4, 1),
}
# The largest tiles that a compiler fits into registers without a spill; none is measured yet.
TABLE = {
    ("rolled", "sm_80", "float16"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_80", "bfloat16"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_80", "float16x3"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_80", "tf32"): Tile(64, 128, 32, 8, 4),
    ("rolled", "sm_80", "float32"): Tile(64, 128, 32, 8, 2),
    ("direct", "sm_80", "float16"): Tile(128, 128, 64, 8, 3),
    ("direct", "sm_80", "bfloat16"): Tile(128, 128, 64, 8, 3),
    ("direct", "sm_80", "float16x3"): Tile(128, 128, 64, 8, 3),
    ("direct", "sm_80", "tf32"): Tile(128, 128, 32, 8, 3),
    ("direct", "sm_80", "float32"): Tile(64, 128, 32, 8, 2),
    ("rolled", "sm_90", "float16"): Tile(128, 128, 64, 8, 4),
    ("rolled", "sm_90", "bfloat16"): Tile(128, 128, 64, 8, 4),
    ("rolled", "sm_90", "float16x3"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_90", "tf32"): Tile(128, 128, 32, 8, 4),
    ("rolled", "sm_90", "float32"): Tile(64, 64, 32, 8, 2),
    ("direct", "sm_90", "float16"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_90", "bfloat16"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_90", "float16x3"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_90", "tf32"): Tile(128, 128, 32, 8, 4),
    ("direct", "sm_90", "float32"): Tile(64, 128, 32, 8, 2),
    ("rolled", "sm_100", "float16"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_100", "bfloat16"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_100", "float16x3"): Tile(64, 128, 64, 8, 4),
    ("rolled", "sm_100", "tf32"): Tile(64, 128, 32, 8, 4),
    ("rolled", "sm_100", "float32"): Tile(64, 64, 32, 8, 2),
    ("direct", "sm_100", "float16"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_100", "bfloat16"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_100", "float16x3"): Tile(128, 128, 64, 8, 4),
    ("direct", "sm_100", "tf32"): Tile(128, 128, 32, 8, 4),
    ("direct", "sm_100", "float32"): Tile(64, 128, 32, 8, 2),
    ("rolled", "gfx942", "float16"): Tile(128, 128, 64, 8, 2),
    ("rolled", "gfx942", "bfloat16"): Tile(128, 128, 64, 8, 2),
    ("rolled", "gfx942", "float16x3"): Tile(128, 128, 64, 8, 2),
    ("rolled", "gfx942", "tf32"): Tile(128, 128, 32, 8, 2),
    ("rolled", "gfx942", "float32"): Tile(128, 128, 32, 8, 2),
    ("direct", "gfx942", "float16"): Tile(128, 128, 64, 8, 2),
    ("direct", "gfx942", "bfloat16"): Tile(128, 128, 64, 8, 2),
    ("direct", "gfx942", "float16x3"): Tile(128, 128, 64, 8, 2),
    ("direct", "gfx942", "tf32"): Tile(128, 128, 32, 8, 2),
    ("direct", "gfx942", "float32"): Tile(64, 128, 32, 8, 2),
}


def candidates(algorithm: str) -> list[Tile]:
    """What is worth trying for an algorithm, the safe one first."""
    shapes = [
        (128, 128, 8),
        (64, 128, 8),
        (64, 128, 4),
        (128, 64, 8),
        (64, 64, 8),
        (64, 64, 4),
        (32, 64, 4),
    ]
    if algorithm == "slab":
        shapes = [(32, 32, 4), (64, 64, 8), (128, 32, 8), (128, 16, 4)]
        return [SAFE[algorithm], *(Tile(q, k, 64, warps, 1) for q, k, warps in shapes)]
    return [
        SAFE[algorithm],
        *(
            Tile(q, k, c, warps, stages)
            for c in (64, 32)
            for stages in (4, 3, 2)
            for q, k, warps in shapes
        ),
    ]


def tile(algorithm: str, operands: str) -> Tile:
    """The tile of an algorithm on the current target for operands named as in `operands.py`."""
    return TABLE.get((algorithm, target(), operands), SAFE[algorithm])


def target() -> str:
    """What kernels are compiled for: `sm_90`, `gfx942`; or `interpreter`."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    arch = driver.active.get_current_target().arch
    return f"sm_{arch}" if isinstance(arch, int) else arch


def has_descriptors() -> bool:
    """Whether the target copies blocks by descriptor (TMA: Hopper and later)."""
    name = target()
    return name == "interpreter" or (name.startswith("sm_") and int(name[3:]) >= 90)


def lazy() -> bool:
    """Whether a kernel with matrix products may branch on whether a tile improved on the best.

    Triton 3.6 and 3.7 do not compile that where products lie in tensor memory (Blackwell).
    """
    return not target().startswith("sm_1")
