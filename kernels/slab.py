"""Slab search: one matrix product per pair of blocks, then box sum, scale and maximum.

One GEMM writes the inner products of a block of key pixels and a block of query pixels to a ring of
bounded size: C products per pair, in any precision of the GEMM library. A second kernel reads them
from the L2 cache along diagonals (`layout.py`): three loads are the taps of a row, and three rows
are summed. For patches of 3x3.

Blocks are runs of lines of a packed map, so the GEMM reads them in place. On NVIDIA GPUs the CUDA
library has the loop over blocks and the second kernel (`csrc/cuda/slab_search.cpp`). The loop and
the kernel below are for other GPUs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from threading import RLock

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.argmax import Argmax, merge
from ttsr_fast.kernels.key_scale import image_stride, load_scale
from ttsr_fast.kernels.layout import Layout, diagonal
from ttsr_fast.kernels.pack import Packed
from ttsr_fast.kernels.precision import Precision
from ttsr_fast.kernels.tile_configs import TileConfig

HALO = 2
RING_BYTES = 32 << 20  # maximum of the inner products in memory
LEADING = 4096  # leading dimension of the ring, and the maximum of query pixels of a block
QUERY_WIDTH, KEY_WIDTH = 62, 48  # maximum columns of patches of a strip
SLOTS = 64  # keys that a tile may read beyond the end of a row
KEYS, ROWS = 8, 16  # in the CUDA kernel: keys of a thread, rows of a diagonal


def layouts(query: tuple[int, int], key: tuple[int, int]) -> tuple[Layout, Layout]:
    """Strips for blocks that are about as high as wide, for a small share of halo."""
    return (
        Layout(*query, HALO, strips=triton.cdiv(query[1], QUERY_WIDTH), align=4),
        Layout(*key, HALO, strips=triton.cdiv(key[1], KEY_WIDTH)),
    )


@dataclass(frozen=True)
class Blocks:
    """Blocks of whole lines of two layouts.

    The last block of a strip overlaps the block before it. All blocks have one shape, so all
    products run in one kernel of the GEMM library, and equal patches have equal scores in every
    block.
    """

    query: Layout
    key: Layout
    images: int

    @cached_property
    def query_rows(self) -> int:
        """Rows of patches of a query block."""
        return _even_rows(self.query, LEADING // self.query.line)

    @cached_property
    def key_rows(self) -> int:
        """Rows of patches of a key block."""
        return _even_rows(self.key, RING_BYTES // (4 * LEADING) // self.key.line)

    @cached_property
    def query_pixels(self) -> int:
        return (self.query_rows + HALO) * self.query.line

    @cached_property
    def key_pixels(self) -> int:
        return (self.key_rows + HALO) * self.key.line

    @cached_property
    def _images_across(self) -> int:
        return LEADING // self.query_pixels

    @cached_property
    def _images_down(self) -> int:
        return max(1, RING_BYTES // (4 * LEADING * self.key_pixels))

    @cached_property
    def _across(self) -> bool:
        """Images of a batch are contiguous in a row of the ring, not in a column."""
        return self._images_across > self._images_down

    @cached_property
    def batch(self) -> int:
        """Images of one product."""
        return min(self.images, max(self._images_across, self._images_down))

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
        """Pairs of pixels in the products, halos and overlaps included."""
        return self.count * self.batch * self.query_pixels * self.key_pixels

    @property
    def read_pairs(self) -> int:
        """Pairs read by the second kernel; a line of queries counts as a whole tile of columns."""
        queries = (self.query_rows + HALO) * (QUERY_WIDTH + HALO)
        return self.count * self.batch * queries * self.key_pixels

    def ring(self, like: Tensor) -> Tensor:  # [rows, LEADING]
        """Memory for the products, and for rows that tiles read beyond them but do not use."""
        rows = self.key_pixels * (1 if self._across else self.batch)
        return like.new_empty(rows + SLOTS, LEADING, dtype=torch.float32)

    def products(self, ring: Tensor) -> Tensor:  # [batch, key pixels, query pixels]
        """View of the ring for the products of a pair of blocks."""
        size = (self.batch, self.key_pixels, self.query_pixels)
        return ring.as_strided(size, (self.image_stride, LEADING, 1))


def _even_rows(layout: Layout, lines: int) -> int:
    """Rows of patches of a block of at most `lines` lines, for blocks of about equal height."""
    most = max(1, min(layout.height, lines - HALO))
    return triton.cdiv(layout.height, triton.cdiv(layout.height, most))


def slab_search(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, strips, band height, slots]
    argmax: Argmax,  # words are merged into
    tile: TileConfig,
) -> None:
    blocks = Blocks(query.layout, key.layout, query.images)
    ring = blocks.ring(query.rows)

    def form_products(block: BlockPair) -> None:
        multiply(block.keys(key), block.queries(query).mT, blocks.products(ring))

    with matmul_precision(query.precision):
        if not has_cuda_kernel(ring):
            for block in all_blocks(blocks):
                form_products(block)
                search_block(ring, scale, argmax.words, block, tile)
            return
        arguments = cuda_arguments(query, key, scale, argmax.words, ring, blocks)
        try:
            torch.ops.ttsr_fast.cuda_slab_search(*arguments)
        except RuntimeError:
            form_products(next(all_blocks(blocks)))  # may raise a clearer error
            raise


def cuda_arguments(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, strips, band height, slots]
    words: Tensor,  # [N, Ho, Wo]
    ring: Tensor,  # [rows, LEADING]
    blocks: Blocks,
) -> tuple:
    """Arguments of the slab's operators in the CUDA library."""
    layouts = [
        [x.height, x.width, x.strips, x.strip_width, x.line, rows]
        for x, rows in ((blocks.query, blocks.query_rows), (blocks.key, blocks.key_rows))
    ]
    depth = query.precision.products * query.channels
    sizes = (key.images, depth, blocks.batch, blocks.image_stride, *layouts)
    return (query.rows, key.rows, scale, words, ring, *sizes, KEYS, ROWS)


def has_cuda_kernel(x: Tensor) -> bool:
    """Availability of the CUDA library for a tensor, compiled with the CUDA of this torch."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not x.is_cuda or not has_kernel("ttsr_fast::cuda_slab_search", "CUDA"):
        return False
    return str(torch.ops.ttsr_fast.cuda_version() // 1000) == str(torch.version.cuda).split(".")[0]


@dataclass(frozen=True)
class BlockPair:
    """A block of queries and a block of keys, for a batch of images: strips and first rows."""

    blocks: Blocks
    image: int
    query_strip: int
    query_row: int
    key_strip: int
    key_row: int

    def queries(self, query: Packed) -> Tensor:  # [batch, query pixels, K]
        line = self.query_strip * query.layout.lines + self.query_row
        return self._rows(query, line, self.blocks.query_pixels)

    def keys(self, key: Packed) -> Tensor:  # [batch, key pixels, K]
        line = self.key_strip * key.layout.lines + self.key_row
        return self._rows(key, line, self.blocks.key_pixels)

    def _rows(self, packed: Packed, line: int, pixels: int) -> Tensor:
        images = packed.rows[: packed.images * packed.layout.pixels]
        images = images.view(packed.images, packed.layout.pixels, -1)
        if packed.images > 1:
            images = images[self.image : self.image + self.blocks.batch]
        first = line * packed.layout.line
        columns = packed.precision.products * packed.channels
        return images[:, first : first + pixels, :columns].expand(self.blocks.batch, -1, -1)


def all_blocks(blocks: Blocks) -> Iterator[BlockPair]:
    """All pairs of blocks: for each block of keys, all blocks of queries."""
    query_rows = list(_first_rows(blocks.query, blocks.query_rows))
    key_rows = list(_first_rows(blocks.key, blocks.key_rows))
    for image in range(0, blocks.images, blocks.batch):
        image = min(image, blocks.images - blocks.batch)
        for keys, queries in product(key_rows, query_rows):
            yield BlockPair(blocks, image, *queries, *keys)


def _first_rows(layout: Layout, rows: int) -> Iterator[tuple[int, int]]:
    """Strip and first row of every block."""
    for strip in range(layout.strips):
        for row in range(0, layout.height, rows):
            yield strip, min(row, layout.height - rows)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Batched product `out = a @ b`, in float32."""
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.bmm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """PyTorch's settings for GEMMs on GPUs, for a precision of the search.

    The settings are global to the process: a lock keeps searches with different settings apart.
    """
    setting = torch.backends.cuda.matmul
    value: str | bool
    if precision.dtype == torch.float32:
        name, value = "fp32_precision", precision.input_precision
    elif precision.dtype == torch.float16 and setting.allow_fp16_accumulation:
        name, value = "allow_fp16_accumulation", False
    else:
        yield
        return
    with _setting_lock:
        before = getattr(setting, name)
        if before == torch.backends.fp32_precision:  # type: ignore[attr-defined]
            before = "none"  # inherits from it
        setattr(setting, name, value)
        try:
            yield
        finally:
            setattr(setting, name, before)


_setting_lock = RLock()


def search_block(
    ring: Tensor,  # [batch * key pixels + SLOTS, LEADING]
    scale: Tensor,  # [N or 1, strips, band height, slots]
    words: Tensor,  # [N, Ho, Wo], merged into
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
        words,
        *(blocks.batch, block.image, image_stride(len(scale), scale.stride(0)), scale.shape[3]),
        *(words.stride(0), q.width, k.width),
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
    p_scale,  # [* or 1, BAND_HEIGHT_K, SLOTS], of the strip
    p_argmax,  # [*, HEIGHT, WIDTH], merged into
    N,
    FIRST,  # first image of the batch
    stride_scale,  # of images, or 0
    SLOTS,
    stride_argmax,
    WIDTH,
    WIDTH_K,
    Y,  # first patch of the block of queries
    X,
    YK,  # first patch of the block of keys
    XK,
    ROWS,  # of patches of the block of queries
    COLUMNS,
    LINE,  # pixels of a line
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
    # Loads need no mask: the scale of a key beyond the strip is NaN, and `merge` masks queries.
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
