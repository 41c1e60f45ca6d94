"""Where the pixels of an image lie in a packed map, so that tiles of a fixed width are full.

The grid of patches is cut into bands of rows, which lie beside each other in one line, and into
strips of columns, which follow each other. Every piece holds all pixels of its patches, so pixels
that two pieces need are stored twice. Pixel (dy, dx) of a patch lies `dy * LINE + dx` rows after
its first pixel, in every layout.

A walk is given by the offset between its key rows and its query rows. Along it the products of a
tile of query pixels with a tile of key pixels are formed row by row, and three that follow each
other are the product of the patches: `total(y) = row(y) + row(y + 1) + row(y + 2)`. No row is
formed twice, and the sum has one order wherever it lies, so equal patches have bit-equal scores.
"""

from dataclasses import dataclass
from functools import cached_property

import triton
import triton.language as tl


@dataclass(frozen=True)
class Layout:
    """A grid of patches and how it is cut.

    Attributes:
        height: rows of patches.
        width: columns of patches.
        halo: kernel_size - 1.
        bands: pieces beside each other.
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
        """All that is stored of an image."""
        return self.strips * self.lines * self.line

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """As kernels take them, named by `SIZES`."""
        sizes = (self.height, self.width, self.band_height, self.strip_width, self.piece)
        return (*sizes, self.line, self.lines)


SIZES = ("HEIGHT", "WIDTH", "BAND_HEIGHT", "STRIP_WIDTH", "PIECE", "LINE", "LINES")


def size_names(suffix: str = "") -> list[str]:
    """The parameters of a kernel that take `Layout.sizes`."""
    return [name + suffix for name in SIZES]


@triton.jit
def first_pixel(o_i, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, LINE, LINES):
    """The row of the packed image at which patch `o_i` of the grid begins."""
    y, x = o_i // WIDTH, o_i % WIDTH
    band, strip = y // BAND_HEIGHT, x // STRIP_WIDTH
    line = strip * LINES + y - band * BAND_HEIGHT
    return line * LINE + band * PIECE + x - strip * STRIP_WIDTH


@triton.jit
def column_of(o_c, HEIGHT, WIDTH, BAND_HEIGHT, STRIP_WIDTH, PIECE, strip=0):
    """The first of the patches below each other that begin in a column of a strip.

    The next is WIDTH further, and all indices below HEIGHT * WIDTH are patches: in a column that
    holds none, none is.
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
    """The offset of a walk, its first query row and the number of rows; the longest walks first."""
    half = (rank + 1) // 2
    offset = (HO + HKO) // 2 - HO + tl.where(rank % 2 == 1, half, -half)
    first = tl.maximum(0, -offset)
    return offset, first, tl.minimum(HO, HKO - offset) - first
