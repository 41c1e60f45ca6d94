"""What the matrix products multiply, for every precision, and the product of two tiles of it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Operands:
    """Features as they are multiplied.

    Features that have to be rounded are kept in parts: `scale * x = parts[0] + parts[1] + ...`,
    each the rounded remainder of those before it.

    Attributes:
        dtype: of the parts.
        stored: how many parts are kept; together they are as accurate as float32.
        multiplied: how many of them the search multiplies; the others serve the final score.
        scaled: whether features are multiplied by a power of two, one for an image, that brings the
            largest near the top of float16.
        input_precision: of products of float32, as Triton names it.
    """

    dtype: torch.dtype
    stored: int = 1
    multiplied: int = 1
    scaled: bool = False
    input_precision: str = "ieee"

    @property
    def exact(self) -> bool:
        """Whether the scores of the search are those of the features as given.

        Those of tensor cores are not: they round every partial sum towards zero.
        """
        return self.dtype == torch.float32 and self.input_precision == "ieee"

    @property
    def name(self) -> str:
        """For the table of tiles: `float16`, `float16x3` for two parts, `tf32`."""
        if self.input_precision == "tf32":
            return "tf32"
        return str(self.dtype).removeprefix("torch.") + ("x3" if self.multiplied == 2 else "")


# For features in float32.
OPERANDS = {
    "fp32": Operands(torch.float32),
    "tf32": Operands(torch.float32, input_precision="tf32"),
    "fp16x3": Operands(torch.float16, stored=2, multiplied=2, scaled=True),
    "fp16": Operands(torch.float16, stored=2, scaled=True),
    "bf16": Operands(torch.bfloat16, stored=3),
}


def operands(dtype: torch.dtype, precision: str) -> Operands:
    """What is multiplied of features of `dtype`; those of 16 bits as they are, which is exact."""
    return OPERANDS[precision] if dtype == torch.float32 else Operands(dtype)


@triton.jit
def columns(section, c, C: tl.constexpr, MULTIPLIED: tl.constexpr):
    """The columns of channel `c` of query and key in a product of parts.

    With two parts the sections are low * high, high * low and high * high: the small ones first.
    """
    c_q, c_k = c, c
    if MULTIPLIED == 2:
        c_q += tl.where(section == 0, C, 0)
        c_k += tl.where(section == 1, C, 0)
    return c_q, c_k


@triton.jit
def multiply_add(
    b_q,  # [BLOCK_Q, BLOCK_C]
    b_k,  # [BLOCK_C, BLOCK_K]
    b_t,  # [BLOCK_Q, BLOCK_K] float32
    INPUT_PRECISION: tl.constexpr,
):  # [BLOCK_Q, BLOCK_K]
    if INTERPRETED:  # where the product of bfloat16 is one of bit patterns
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    return tl.dot(b_q, b_k, b_t, input_precision=INPUT_PRECISION)
