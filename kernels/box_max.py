"""The search over a slab: the vendor's matrix product, then box sum, scale and maximum.

The inner products of a block of key pixels with a block of query pixels are written to a ring of
bounded size by one matrix product, C products per pair, in any precision the vendor's library has.
One kernel reads them while they are in the cache: a program is a walk (`walk.py`) in which three
loads are the taps along a row and the three rows are added up on the way. For patches of 3x3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttsr_fast.kernels.best import merge
from ttsr_fast.kernels.operands import Operands
from ttsr_fast.kernels.pack import Packed
from ttsr_fast.kernels.patch_norm import image_stride, load_scale
from ttsr_fast.kernels.tiles import Tile
from ttsr_fast.kernels.walk import walk

RING_BYTES = 64 << 20  # of inner products held at a time
WIDTH = 128  # columns of a block, at most


@dataclass(frozen=True)
class Block:
    """A rectangle of patch positions: its place in the grid and its size."""

    y: int
    x: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of all its patches."""
        return (self.height + 2) * (self.width + 2)


def slab_search(
    query: Packed,
    key: Packed,
    scale: Tensor,  # [N or 1, HKo, WKo]
    best: Tensor,  # [N, Ho, Wo], merged into
    operands: Operands,
    tile: Tile,
) -> None:
    n, _, hp, wp = query.size
    entries = RING_BYTES // 4
    side = int(entries**0.5)  # pixels of a block; both maps have blocks of that many
    query_blocks = _blocks(hp - 2, wp - 2, side)
    key_blocks = _blocks(key.size[2] - 2, key.size[3] - 2, side)
    largest = query_blocks[0].pixels * key_blocks[0].pixels
    images = min(n, max(1, entries // largest))
    ring = query.square.new_empty(images * largest)
    for first in range(0, n, images):
        first = min(first, n - images)
        batch = slice(first, first + images)
        for query_block in query_blocks:
            b_q = _operand(query, batch, query_block, operands, (0, 1, 0))
            for key_block in key_blocks:
                b_k = _operand(key, batch, key_block, operands, (1, 0, 0))
                product = ring.view(images, key_block.pixels, query_block.pixels)
                _multiply(b_k, b_q.mT, product, operands)
                box_max(product, scale, best, first, query_block, key_block, tile)


def _blocks(height: int, width: int, pixels: int) -> list[Block]:
    """Blocks of one size that cover a grid, of about `pixels` pixels.

    The last ones overlap those before them: all products then have one shape and run in one kernel
    of the vendor's, so that equal patches have equal scores in whatever blocks they lie.
    """
    columns = triton.cdiv(width, triton.cdiv(width, WIDTH))
    rows = min(height, max(1, pixels // (columns + 2) - 2))
    rows = triton.cdiv(height, triton.cdiv(height, rows))
    return [
        Block(min(y, height - rows), min(x, width - columns), rows, columns)
        for y in range(0, height, rows)
        for x in range(0, width, columns)
    ]


def _operand(
    packed: Packed, batch: slice, block: Block, operands: Operands, parts: tuple[int, int, int]
) -> Tensor:  # [images or 1, block.pixels, C or 3*C]
    """The pixels of a block; of two parts the three that meet, the smallest product first."""
    n, c, hp, wp = packed.size
    rows = packed.rows[: n * hp * wp].view(n, hp, wp, -1)
    rows = rows[batch if n > 1 else slice(0, 1)]
    rows = rows[:, block.y : block.y + block.height + 2, block.x : block.x + block.width + 2]
    if operands.multiplied == 1:
        return rows[..., :c].reshape(len(rows), block.pixels, c)
    chosen = torch.cat([rows[..., part * c : (part + 1) * c] for part in parts], dim=3)
    return chosen.view(len(rows), block.pixels, 3 * c)


def _multiply(a: Tensor, b: Tensor, out: Tensor, operands: Operands) -> None:
    a, b = (x.expand(len(out), -1, -1) for x in (a, b))
    if a.dtype == torch.float32:
        with matmul_precision(operands.input_precision):
            torch.bmm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.bmm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.bmm(a.float(), b.float(), out=out)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """PyTorch's setting for products of float32 on GPUs, for a while."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = before


def box_max(
    product: Tensor,  # [images, key_block.pixels, query_block.pixels]
    scale: Tensor,  # [N or 1, HKo, WKo]
    best: Tensor,  # [N, Ho, Wo], merged into
    first_image: int,
    query_block: Block,
    key_block: Block,
    tile: Tile,
) -> None:
    query_tiles = triton.cdiv(query_block.width, tile.block_q)
    key_tiles = triton.cdiv(key_block.width, tile.block_k)
    walks = query_block.height + key_block.height - 1
    box_max_kernel[(walks * product.shape[0] * query_tiles * key_tiles,)](
        product,
        scale,
        best,
        product.shape[0],
        first_image,
        image_stride(len(scale), 1),
        *best.shape[1:],
        *scale.shape[1:],
        query_block.y,
        query_block.x,
        key_block.y,
        key_block.x,
        query_block.height,
        query_block.width,
        key_block.height,
        key_block.width,
        query_tiles,
        key_tiles,
        BLOCK_Q=tile.block_q,
        BLOCK_K=tile.block_k,
        **tile.options,
    )


@triton.jit(
    do_not_specialize=[
        "N",
        "FIRST",
        "stride_scale",
        "HO",
        "WO",
        "HKO",
        "WKO",
        "Y",
        "X",
        "YK",
        "XK",
        "H",
        "W",
        "HK",
        "WK",
        "QUERY_TILES",
        "KEY_TILES",
    ]
)
def box_max_kernel(
    p_product,  # [N, (HK + 2) * (WK + 2), (H + 2) * (W + 2)]
    p_scale,  # [* or 1, HKO, WKO]
    p_best,  # [*, HO, WO]
    N,
    FIRST,  # image of the product
    stride_scale,  # of images: 0 if one serves all, else 1
    HO,
    WO,
    HKO,
    WKO,
    Y,  # the block of queries: its first position and its size
    X,
    YK,  # the block of keys
    XK,
    H,
    W,
    HK,
    WK,
    QUERY_TILES,
    KEY_TILES,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_k, i_q = i_p % KEY_TILES, i_p // KEY_TILES % QUERY_TILES
    i_p = i_p // (KEY_TILES * QUERY_TILES)
    i_n = (i_p % N).to(tl.int64)
    offset, y_q, length = walk(i_p // N, H, HK)
    y_k = y_q + offset

    WP, WKP = W + 2, WK + 2
    PIXELS, PIXELS_K = (H + 2) * WP, (HK + 2) * WKP
    o_q, o_k = i_q * BLOCK_Q + tl.arange(0, BLOCK_Q), i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_q, m_k = o_q < W, o_k < WK
    mask = m_k[:, None] & m_q[None, :]
    o_kq = (o_k * PIXELS)[:, None] + o_q[None, :]  # [BLOCK_K, BLOCK_Q]
    p_row = p_product + i_n * PIXELS_K * PIXELS + (y_k * WKP * PIXELS + y_q * WP)
    p_out = p_best + ((FIRST + i_n) * HO + Y + y_q) * WO + X + o_q
    first_key = (YK + y_k) * WKO + XK
    p_scale += (FIRST + i_n) * stride_scale * HKO * WKO
    b_last = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    b_pair = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for y in range(length + 2):
        b_row = tl.load(p_row + o_kq, mask=mask, other=0.0)
        b_row += tl.load(p_row + (PIXELS + 1) + o_kq, mask=mask, other=0.0)
        b_row += tl.load(p_row + 2 * (PIXELS + 1) + o_kq, mask=mask, other=0.0)
        p_row += WKP * PIXELS + WP
        b_t = b_pair + b_row
        b_pair = b_last + b_row
        b_last = b_row
        if y >= 2:
            o_i = first_key + (y - 2) * WKO + o_k
            b_scale = load_scale(p_scale + o_i, m_k)
            b_s = b_t * b_scale[:, None]
            merge(p_out + (y - 2) * WO, tl.trans(b_s), o_i, m_q, LAZY=True)
