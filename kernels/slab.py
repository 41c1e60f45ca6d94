"""The search over a slab: a matrix product per block, then box sum, scale and maximum.

The inner products of a block of key pixels with a block of query pixels are written by one GEMM to
a ring of bounded size, C products per pair, in any precision that the GEMM library has. A second
kernel reads them from the L2 cache: a walk (`layout.py`) in which three loads are the taps along a
row, and the three rows are added up on the way. For patches of 3x3.

Blocks are runs of lines of a packed map, so the GEMM reads them where they are. On NVIDIA GPUs the
loop over blocks and the second kernel are those of the CUDA library (`csrc/cuda/slab_search.cpp`);
elsewhere the loop is here and the kernel below.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import RLock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import merge
from ttsr_fast.kernels.key_scale import image_stride, load_scale
from ttsr_fast.kernels.layout import Layout, diagonal
from ttsr_fast.kernels.pack import Packed
from ttsr_fast.kernels.precision import Precision
from ttsr_fast.kernels.tile_configs import TileConfig

HALO = 2
RING_BYTES = 32 << 20  # of inner products held at a time, at most
LEADING = 4096  # query pixels of a block at most, and floats from one row of the ring to the next
QUERY_WIDTH, KEY_WIDTH = 62, 48  # columns of patches of a strip, at most
SLOTS = 64  # keys: what a tile may read beyond the last of a row
KEYS, ROWS = 8, 16  # keys of a thread and rows of a walk, in the CUDA kernel


def layouts(query: tuple[int, int], key: tuple[int, int]) -> tuple[Layout, Layout]:
    """Strips: blocks are to be about as high as wide, so that little of them is halo."""
    return (
        Layout(*query, HALO, strips=triton.cdiv(query[1], QUERY_WIDTH), align=4),
        Layout(*key, HALO, strips=triton.cdiv(key[1], KEY_WIDTH)),
    )


@dataclass(frozen=True)
class Blocks:
    """How two layouts are cut into blocks of whole lines.

    The last block of a strip overlaps the one before it: all have one shape, so all products run in
    one kernel of the library, and equal patches have equal scores in whatever block they lie.
    """

    query: Layout
    key: Layout
    images: int

    @cached_property
    def query_rows(self) -> int:
        """Rows of patches in a block of queries."""
        return _even_rows(self.query, LEADING // self.query.line)

    @cached_property
    def key_rows(self) -> int:
        return _even_rows(self.key, RING_BYTES // (4 * LEADING) // self.key.line)

    @cached_property
    def query_pixels(self) -> int:
        return (self.query_rows + HALO) * self.query.line

    @cached_property
    def key_pixels(self) -> int:
        return (self.key_rows + HALO) * self.key.line

    @cached_property
    def _across(self) -> bool:
        """Whether the products of images lie beside each other in the ring, or below."""
        return LEADING // self.query_pixels > self._below

    @cached_property
    def _below(self) -> int:
        return max(1, RING_BYTES // (4 * LEADING * self.key_pixels))

    @cached_property
    def batch(self) -> int:
        """Images that are searched in one product."""
        return min(self.images, LEADING // self.query_pixels if self._across else self._below)

    @property
    def image_stride(self) -> int:
        """Floats of the ring from one image to the next."""
        return self.query_pixels if self._across else self.key_pixels * LEADING

    @cached_property
    def count(self) -> int:
        """Products: pairs of blocks, for each batch of images."""
        rows = triton.cdiv(self.query.height, self.query_rows) * self.query.strips
        rows *= triton.cdiv(self.key.height, self.key_rows) * self.key.strips
        return rows * triton.cdiv(self.images, self.batch)

    @property
    def multiplied_pairs(self) -> int:
        """Pairs of pixels that go through the product, halos and overlaps included."""
        return self.count * self.batch * self.query_pixels * self.key_pixels

    @property
    def read_pairs(self) -> int:
        """Pairs that the walks read: a line of queries counts as a whole tile of columns."""
        queries = (self.query_rows + HALO) * (QUERY_WIDTH + HALO)
        return self.count * self.batch * queries * self.key_pixels

    def ring(self, like: Tensor) -> Tensor:  # [rows, LEADING]
        """Memory for the products, with rows that tiles read beyond them without using them."""
        rows = self.key_pixels * (1 if self._across else self.batch)
        return like.new_empty(rows + SLOTS, LEADING, dtype=torch.float32)

    def products(self, ring: Tensor) -> Tensor:  # [batch, key pixels, query pixels]
        """Where the products of a block lie in the ring."""
        size = (self.batch, self.key_pixels, self.query_pixels)
        return ring.as_strided(size, (self.image_stride, LEADING, 1))


def _even_rows(layout: Layout, lines: int) -> int:
    """Rows of patches of blocks that have at most so many lines, all about the same number."""
    most = max(1, min(layout.height, lines - HALO))
    return triton.cdiv(layout.height, triton.cdiv(layout.height, most))


def slab_search(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, strips, band height, slots]
    argmax: Tensor,  # [N, Ho, Wo], merged into
    precision: Precision,
    tile: TileConfig,
) -> None:
    blocks = Blocks(query.layout, key.layout, query.images)
    ring = blocks.ring(query.square)

    def product(block: BlockPair) -> None:
        queries = block.queries(query, precision)
        multiply(block.keys(key, precision), queries.mT, blocks.products(ring))

    with matmul_precision(precision):
        if not has_cuda_kernel(ring):
            for block in all_blocks(query, key, blocks):
                product(block)
                search_block(ring, scale, argmax, block, tile)
            return
        arguments = cuda_arguments(query, key, scale, argmax, ring, precision, blocks)
        try:
            torch.ops.ttsr_fast.cuda_slab_search(*arguments)
        except RuntimeError:
            product(next(all_blocks(query, key, blocks)))  # may raise a clearer error
            raise


def cuda_arguments(
    query: Packed,
    key: Packed,
    scale: Tensor,
    argmax: Tensor,
    ring: Tensor,
    precision: Precision,
    blocks: Blocks,
) -> tuple:
    """What the operators of the CUDA library take."""
    layouts = [
        [x.height, x.width, x.strips, x.strip_width, x.line, rows]
        for x, rows in ((blocks.query, blocks.query_rows), (blocks.key, blocks.key_rows))
    ]
    depth = precision.multiplied * query.channels
    sizes = (key.images, depth, blocks.batch, blocks.image_stride, *layouts)
    return (query.rows, key.rows, scale, argmax, ring, *sizes, KEYS, ROWS)


def has_cuda_kernel(x: Tensor) -> bool:
    """Whether the CUDA library is loaded, and compiled with the CUDA of this torch."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not x.is_cuda or not has_kernel("ttsr_fast::cuda_slab_search", "CUDA"):
        return False
    return str(torch.ops.ttsr_fast.cuda_version() // 1000) == str(torch.version.cuda).split(".")[0]


@dataclass(frozen=True)
class BlockPair:
    """A pair of blocks of some images: in which strips, and the first rows."""

    blocks: Blocks
    image: int
    query_strip: int
    query_row: int
    key_strip: int
    key_row: int

    def queries(self, query: Packed, precision: Precision) -> Tensor:  # [batch, pixels, K]
        rows = self.query_strip * query.layout.lines + self.query_row
        return self._operand(query, rows, self.blocks.query_pixels, precision)

    def keys(self, key: Packed, precision: Precision) -> Tensor:  # [batch, pixels, K]
        rows = self.key_strip * key.layout.lines + self.key_row
        return self._operand(key, rows, self.blocks.key_pixels, precision)

    def _operand(self, packed: Packed, line: int, pixels: int, precision: Precision) -> Tensor:
        images = packed.rows[: packed.images * packed.layout.pixels]
        images = images.view(packed.images, packed.layout.pixels, -1)
        if packed.images > 1:
            images = images[self.image : self.image + self.blocks.batch]
        first = line * packed.layout.line
        columns = precision.multiplied * packed.channels
        x = images[:, first : first + pixels, :columns]
        return x.expand(self.blocks.batch, -1, -1)


def all_blocks(query: Packed, key: Packed, blocks: Blocks) -> Iterator[BlockPair]:
    """All pairs of blocks: for each of keys, all of queries."""
    q, k = query.layout, key.layout
    for image in range(0, blocks.images, blocks.batch):
        image = min(image, blocks.images - blocks.batch)
        for key_strip in range(k.strips):
            for key_row in range(0, k.height, blocks.key_rows):
                key_row = min(key_row, k.height - blocks.key_rows)
                for query_strip in range(q.strips):
                    for query_row in range(0, q.height, blocks.query_rows):
                        query_row = min(query_row, q.height - blocks.query_rows)
                        yield BlockPair(blocks, image, query_strip, query_row, key_strip, key_row)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` for batches, in float32."""
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.bmm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """PyTorch's settings for GEMMs on GPUs, as the operands need them.

    A setting is the whole process's: one search at a time may rely on it or change it.
    """
    setting = torch.backends.cuda.matmul
    if precision.dtype == torch.float32:
        name, wanted = "fp32_precision", precision.input_precision
    elif precision.dtype == torch.float16 and setting.allow_fp16_accumulation:
        name, wanted = "allow_fp16_accumulation", False
    else:
        yield
        return
    with _changing:
        before = getattr(setting, name)
        if before == torch.backends.fp32_precision:  # type: ignore[attr-defined]
            before = "none"  # which follows that one
        setattr(setting, name, wanted)
        try:
            yield
        finally:
            setattr(setting, name, before)


_changing = RLock()


def search_block(
    ring: Tensor,  # [batch * key pixels + SLOTS, LEADING]
    scale: Tensor,  # [N or 1, strips, band height, slots]
    argmax: Tensor,  # [N, Ho, Wo], merged into
    block: BlockPair,
    tile: TileConfig,
) -> None:
    blocks = block.blocks
    q, k = blocks.query, blocks.key
    query_tiles = triton.cdiv(q.strip_width, tile.block_q)
    key_tiles = triton.cdiv(k.strip_width, tile.block_k)
    diagonals = blocks.query_rows + blocks.key_rows - 1
    key_x = block.key_strip * k.strip_width
    query_x = block.query_strip * q.strip_width
    slab_search_kernel[(diagonals * blocks.batch * query_tiles * key_tiles,)](
        ring,
        scale[:, block.key_strip],
        argmax,
        *(
            blocks.batch,
            block.image,
            image_stride(len(scale), scale.stride(0)),
            scale.shape[3],
        ),
        *(argmax.stride(0), q.width, k.width),
        *(block.query_row, query_x, block.key_row, key_x),
        *(blocks.query_rows, min(q.strip_width, q.width - query_x), q.line),
        *(blocks.key_rows, k.line, blocks.image_stride),
        *(query_tiles, key_tiles),
        LEADING=LEADING,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        **tile.options,
    )


@triton.jit(
    do_not_specialize=[
        *("N", "FIRST", "stride_scale", "SLOTS", "stride_argmax", "WIDTH", "WIDTH_K"),
        *("Y", "X", "YK", "XK", "ROWS", "COLUMNS", "LINE", "ROWS_K", "LINE_K", "stride_product"),
        *("QUERY_TILES", "KEY_TILES"),
    ]
)
def slab_search_kernel(
    p_product,  # [*, LEADING]
    p_scale,  # [* or 1, BAND_HEIGHT_K, SLOTS], of a strip
    p_argmax,  # [*, HEIGHT, WIDTH]
    N,
    FIRST,  # image of the products
    stride_scale,  # of images, 0 if one serves all
    SLOTS,
    stride_argmax,
    WIDTH,
    WIDTH_K,
    Y,  # the block of queries: its first position, rows, columns of patches, pixels of a line
    X,
    YK,  # the block of keys
    XK,
    ROWS,
    COLUMNS,
    LINE,
    ROWS_K,
    LINE_K,
    stride_product,  # of images
    QUERY_TILES,
    KEY_TILES,
    LEADING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_k, i_q = i_p % KEY_TILES, i_p // KEY_TILES % QUERY_TILES
    i_p = i_p // (KEY_TILES * QUERY_TILES)
    i_n = (i_p % N).to(tl.int64)
    offset, y_q, length = diagonal(i_p // N, ROWS, ROWS_K)
    y_k = y_q + offset

    o_q, o_k = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_q = o_q < COLUMNS
    o_kq = (tl.arange(0, BLOCK_K) * LEADING)[:, None] + o_q[None, :]  # [BLOCK_K, BLOCK_Q]
    p_row = p_product + i_n * stride_product + y_q * LINE
    p_row += (y_k * LINE_K + i_k * BLOCK_K).to(tl.int64) * LEADING
    p_out = p_argmax + (FIRST + i_n) * stride_argmax + (Y + y_q) * WIDTH + X + o_q
    p_scale += (FIRST + i_n) * stride_scale + (YK + y_k) * SLOTS + o_k
    first_key = (YK + y_k) * WIDTH_K + XK
    b_last = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    b_pair = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    # Nothing is masked: a key beyond the strip has the scale NaN, and such a query is not merged.
    for y in range(length + 2):
        b_row = tl.load(p_row + o_kq)
        b_row += tl.load(p_row + (LEADING + 1) + o_kq)
        b_row += tl.load(p_row + 2 * (LEADING + 1) + o_kq)
        p_row += LINE_K * LEADING + LINE
        b_t = b_pair + b_row
        b_pair = b_last + b_row
        b_last = b_row
        if y >= 2:
            b_s = b_t * load_scale(p_scale + (y - 2) * SLOTS)[:, None]
            key = first_key + (y - 2) * WIDTH_K
            merge(p_out + (y - 2) * WIDTH, tl.trans(b_s), o_k, key, LEADING, 0, m_q, LAZY=True)
