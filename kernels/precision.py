"""Precisions of the search: how features are rounded and stored, and the product of two tiles."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Precision:
    """Storage and multiplication of features.

    Rounded features are stored in parts: `scale * x = part 0 + part 1 + ...`, each the rounded
    remainder of the parts before it. A packed pixel is a row of sections of C channels, with one
    part in each section.

    Attributes:
        dtype: type of the parts.
        query_sections: part in each section of a query pixel. The first `parts` sections hold
            different parts. Their sum is as accurate as float32.
        key_sections: part in each section of a key pixel.
        products: sections in the product of the search, each with the same section of the other
            map. Products of small parts come first.
        scaled: features are multiplied by a power of two, one for each image, so that the largest
            is near the top of float16.
        input_precision: Triton's name for the precision of float32 products.
    """

    dtype: torch.dtype
    query_sections: tuple[int, ...] = (0,)
    key_sections: tuple[int, ...] = (0,)
    products: int = 1
    scaled: bool = False
    input_precision: str = "ieee"

    @property
    def parts(self) -> int:
        """Parts of a feature."""
        return max(self.query_sections) + 1

    @property
    def exact(self) -> bool:
        """Exact products: search scores are final.

        Tensor cores round every partial sum towards zero.
        """
        return self.dtype == torch.float32 and self.input_precision == "ieee"

    @property
    def name(self) -> str:
        """Name in the table of tiles: `float16`, `float16x3` for three products, `tf32`."""
        if self.input_precision == "tf32":
            return "tf32"
        return str(self.dtype).removeprefix("torch.") + ("x3" if self.products == 3 else "")

    @property
    def block_c(self) -> int:
        """Channels per step of a product: one cache line of 128 bytes."""
        return 128 // self.dtype.itemsize


# For float32 features. fp16x3 multiplies low * high, high * low and high * high.
PRECISIONS = {
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, input_precision="tf32"),
    "fp16x3": Precision(torch.float16, (1, 0, 0), (0, 1, 0), products=3, scaled=True),
    "fp16": Precision(torch.float16, (0, 1), (0, 1), scaled=True),
    "bf16": Precision(torch.bfloat16, (0, 1, 2), (0, 1, 2)),
}


def precision_for(dtype: torch.dtype, name: str) -> Precision:
    """Precision for features of `dtype`; 16-bit features are multiplied as given, exactly."""
    return PRECISIONS[name] if dtype == torch.float32 else Precision(dtype)


@triton.jit
def multiply_add(
    b_q,  # [BLOCK_Q, BLOCK_C]
    b_k,  # [BLOCK_C, BLOCK_K]
    b_t,  # [BLOCK_Q, BLOCK_K] float32
    INPUT_PRECISION: tl.constexpr,
):  # [BLOCK_Q, BLOCK_K]
    if INTERPRETED:  # the interpreter multiplies bfloat16 as bit patterns
        b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    return tl.dot(b_q, b_k, b_t, input_precision=INPUT_PRECISION)
