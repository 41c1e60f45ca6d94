"""What the matrix products multiply, for every precision, and the product of two tiles of it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Precision:
    """Features as they are multiplied.

    Features that have to be rounded are kept in parts: `scale * x = part 0 + part 1 + ...`, each
    the rounded remainder of those before it. A packed pixel is a row of sections of C channels,
    and a section holds one part.

    Attributes:
        dtype: of the parts.
        query_sections: the part in each section of a query pixel. The first `parts` sections hold
            different parts, which together are as accurate as float32.
        key_sections: the same of a key pixel.
        multiplied: how many sections the search multiplies, each with the same section of the other
            map. Products of small parts come first.
        scaled: whether features are multiplied by a power of two, one for an image, that brings the
            largest near the top of float16.
        input_precision: of products of float32, as Triton names it.
    """

    dtype: torch.dtype
    query_sections: tuple[int, ...] = (0,)
    key_sections: tuple[int, ...] = (0,)
    multiplied: int = 1
    scaled: bool = False
    input_precision: str = "ieee"

    @property
    def parts(self) -> int:
        """How many parts a feature has."""
        return max(self.query_sections) + 1

    @property
    def exact(self) -> bool:
        """Whether the scores of the search are those of the features as given.

        Tensor cores round every partial sum towards zero, so theirs are not.
        """
        return self.dtype == torch.float32 and self.input_precision == "ieee"

    @property
    def name(self) -> str:
        """For the table of tiles: `float16`, `float16x3` for three products, `tf32`."""
        if self.input_precision == "tf32":
            return "tf32"
        return str(self.dtype).removeprefix("torch.") + ("x3" if self.multiplied == 3 else "")


# For features in float32. fp16x3 multiplies low * high, high * low and high * high.
PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, input_precision="tf32"),
    "fp16x3": Precision(torch.float16, (1, 0, 0), (0, 1, 0), multiplied=3, scaled=True),
    "fp16": Precision(torch.float16, (0, 1), (0, 1), scaled=True),
    "bf16": Precision(torch.bfloat16, (0, 1, 2), (0, 1, 2)),
}


def precision_for(dtype: torch.dtype, precision: str) -> Precision:
    """What is multiplied of features of `dtype`; those of 16 bits as they are, which is exact."""
    return PRECISIONS[precision] if dtype == torch.float32 else Precision(dtype)


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
