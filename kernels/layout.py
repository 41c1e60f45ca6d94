"""Layout of a packed map: the grid of patches, cut so that tiles of a fixed width are full.

Bands of rows are contiguous within a line. Strips of columns follow each other. A piece is one band
of one strip with all pixels of its patches, so pixels of two pieces are stored twice. Pixel
(dy, dx) of a patch is `dy * LINE + dx` rows after the first pixel, in every layout.

`slab` and `rolled` process pairs of rows by diagonals: all pairs with the same offset between key
row and query row. The products of pixels are formed row by row along a diagonal, and three in
sequence are the product of patches: `total(y) = row(y) + row(y + 1) + row(y + 2)`. No row is formed
twice. The sum has one order on every diagonal, so equal patches have bit-equal scores.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import triton
import triton.language as tl


class Patch(Protocol):
    """Patch geometry."""

    @property
    def kernel_size(self) -> int: ...
    @property
    def padding(self) -> int: ...
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in a map."""
        ...


@dataclass(frozen=True)
class Layout:
    """Grid of patches and its pieces.

    Attributes:
        height: rows of patches.
        width: columns of patches.
        halo: kernel_size - 1.
        bands: pieces in a line.
        strips: pieces after each other.
        align: the pixels of a piece's row are padded to a multiple of this.
    """

    height: int
    width: int
    halo: int
    bands: int = 1
    strips: int = 1
    align: int = 1

    @cached_property
    def band_height(self) -> int:
        """Rows of patches in a piece; the last band may have fewer."""
        return triton.cdiv(self.height, self.bands)

    @cached_property
    def strip_width(self) -> int:
        """Columns of patches in a piece; the last strip may have fewer."""
        return triton.cdiv(self.width, self.strips)

    @cached_property
    def piece(self) -> int:
        """Pixels in a row of a piece."""
        return triton.cdiv(self.strip_width + self.halo, self.align) * self.align

    @cached_property
    def line(self) -> int:
        """Pixels in a row of all bands."""
        return self.bands * self.piece

    @cached_property
    def lines(self) -> int:
        """Rows of pixels in a strip."""
        return self.band_height + self.halo

    @cached_property
    def pixels(self) -> int:
        """Stored pixels of an image."""
        return self.strips * self.lines * self.line

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Kernel arguments, in the order of `SIZES`."""
        sizes = (self.height, self.width, self.band_height, self.strip_width, self.piece)
        return (*sizes, self.line, self.lines)


SIZES = ("HEIGHT", "WIDTH", "BAND_HEIGHT", "STRIP_WIDTH", "PIECE", "LINE", "LINES")


def size_names(suffix: str = "") -> list[str]:
    """Kernel parameters for `Layout.sizes`."""
    return [name + suffix for name in SIZES]


@triton.jit
def first_pixel(o_i, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES):
    """First row of patch `o_i` of the grid in the packed image."""
    y, x = o_i // WIDTH, o_i % WIDTH
    band, strip = y // BAND_HEIGHT, x // STRIP_WIDTH
    line = strip * LINES + y - band * BAND_HEIGHT
    return line * LINE + band * PIECE + x - strip * STRIP_WIDTH


@triton.jit
def column_of(o_c, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, strip=0):
    """Index of the top patch in a column of a strip.

    The next patch of the column is WIDTH further. Indices from HEIGHT * WIDTH on are no patches; a
    column without patches starts there.
    """
    y, x = o_c // PIECE * BAND_HEIGHT, o_c % PIECE
    x_grid = strip * STRIP_WIDTH + x
    inside = (x < STRIP_WIDTH) & (x_grid < WIDTH) & (y < HEIGHT)
    return tl.where(inside, y * WIDTH + x_grid, HEIGHT * WIDTH)


@triton.jit
def diagonal(
    rank,  # 0 to HO + HKO - 2
    HO,
    HKO,
):
    """Offset, first query row and length of a diagonal; the longest first, for load balance."""
    half = (rank + 1) // 2
    offset = (HO + HKO) // 2 - HO + tl.where(rank % 2 == 1, half, -half)
    first = tl.maximum(0, -offset)
    return offset, first, tl.minimum(HO, HKO - offset) - first
