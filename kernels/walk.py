"""What the two algorithms share that walk down both images at once.

A walk is given by the offset between its key rows and its query rows. Along it the products of a
tile of query pixels with a tile of key pixels are formed row by row, and three that follow each
other are the product of the patches: `total(y) = row(y) + row(y + 1) + row(y + 2)`. No row is
formed twice, and the sum has one order wherever it lies, so equal patches have bit-equal scores.
"""

import triton
import triton.language as tl


@triton.jit
def walk(
    rank,  # 0 to HO + HKO - 2
    HO,
    HKO,
):
    """The offset of a walk, its first query row and the number of rows; the longest walks first."""
    half = (rank + 1) // 2
    offset = (HO + HKO) // 2 - HO + tl.where(rank % 2 == 1, half, -half)
    first = tl.maximum(0, -offset)
    return offset, first, tl.minimum(HO, HKO - offset) - first
