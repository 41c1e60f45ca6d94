"""Backend `"torch"`: both operations in plain PyTorch, exact and memory-linear, on any device.

The search multiplies pixels, not patches: with M(i, j) the inner product of key pixel i and query
pixel j, the inner product of two patches is the sum of M(i + d, j + d) over the offsets d of a
patch. M is formed for one block of query rows and key rows at a time, its taps are added along the
diagonals, and only the running best is kept. The transfer adds one shifted gather per tap.

Every function fills results that the caller allocates.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast.operators.index import InverseIndex, check_index
from ttsr_fast.operators.patch import Patch, Score, Transfer, patch_norm, sum_dtype

SLAB_BYTES = 64 << 20  # upper bound for one block of M, where one patch per column allows it


def search(
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    match: tuple[Tensor, Tensor],  # [N, Ho, Wo] twice, filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    """Blocks of query rows against blocks of key rows; see the module's docstring.

    Computes in the dtype of the score, which is at least as accurate as any `precision` asks for.
    """
    _search(None, query, key, key_mask, match, patch, scoring)


def score_excluding(
    index: Tensor,  # [N, Ho, Wo]
    query: Tensor,  # [N, C, H, W]
    key: Tensor,  # [N or 1, C, HK, WK]
    key_mask: Tensor | None,  # [N or 1, HKo, WKo]
    score: Tensor,  # [N, Ho, Wo], filled
    patch: Patch,
    scoring: Score,
    precision: str,
) -> None:
    """The score of a `search` in which every query passes over the key in `index`."""
    match = (score, torch.empty_like(index))
    _search(index, query, key, key_mask, match, patch, scoring)


def _search(
    excluded_index: Tensor | None,  # [N, Ho, Wo]
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    match: tuple[Tensor, Tensor],
    patch: Patch,
    scoring: Score,
) -> None:
    if key.dtype != query.dtype:
        raise TypeError(f"key must have the dtype {query.dtype} of query, got {key.dtype}")
    score, index = match
    norm_q, norm_k = (patch_norm(x, patch)[:, 0] for x in (query, key))
    scale = torch.ones_like(norm_k)
    if scoring.of_key:
        scale = scoring.denominator(norm_k).reciprocal()
    scale = scale.masked_fill(~norm_k.isfinite(), float("nan"))
    first = torch.zeros_like(index[:, :1, :1])
    if key_mask is not None:
        first = first + key_mask.flatten(1).int().argmax(1)[:, None, None]
    index.copy_(first.expand_as(index))
    for n in range(query.shape[0]):
        n_k = min(n, key.shape[0] - 1)
        q, k = (F.pad(x.to(score.dtype), [patch.padding] * 4) for x in (query[n], key[n_k]))
        image = _Image(
            q,
            k,
            scale[n_k],
            None if key_mask is None else key_mask[min(n, key_mask.shape[0] - 1)],
            None if excluded_index is None else excluded_index[n],
        )
        with _full_float32():
            _search_image(image, score[n], index[n], patch.kernel_size)
    if scoring.of_query:
        score /= scoring.denominator(norm_q)
    not_finite = ~norm_q.isfinite()
    score.masked_fill_(not_finite, float("nan"))
    index.copy_(torch.where(not_finite, first, index))


class _Image(NamedTuple):
    """One image of a search, its maps padded."""

    query: Tensor  # [C, H+2p, W+2p]
    key: Tensor  # [C, HK+2p, WK+2p]
    scale: Tensor  # [HKo, WKo]
    valid: Tensor | None  # [HKo, WKo]
    excluded_index: Tensor | None  # [Ho, Wo]


def _search_image(
    image: _Image,
    score: Tensor,  # [Ho, Wo], filled with max_i scale_i <q_j, k_i>
    index: Tensor,  # [Ho, Wo], holds the lowest key position allowed, filled
    kernel_size: int,
) -> None:
    q, k, scale, valid, excluded_index = image
    (rows_q, cols_q), (rows_k, cols_k) = score.shape, scale.shape
    halo = kernel_size - 1
    score.fill_(float("-inf"))
    budget = SLAB_BYTES // score.element_size()
    step_x = max(1, min(cols_k, budget // (kernel_size**2 * q.shape[2]) - halo))
    rows = max(kernel_size, int((budget // (q.shape[2] * (step_x + halo))) ** 0.5)) - halo
    for y_q, y_k, x_k in _blocks(rows_q, rows, rows_k, rows, cols_k, step_x):
        n_q, n_k, n_x = min(rows, rows_q - y_q), min(rows, rows_k - y_k), min(step_x, cols_k - x_k)
        block_q = q[:, y_q : y_q + n_q + halo]  # [C, n_q+halo, WQ]
        block_k = k[:, y_k : y_k + n_k + halo, x_k : x_k + n_x + halo]
        product = block_q.flatten(1).T @ block_k.flatten(1)
        product = product.view(*block_q.shape[1:], *block_k.shape[1:])
        taps = [product[a : a + n_q, :, a : a + n_k] for a in range(kernel_size)]
        rows_added = functools.reduce(torch.add, taps)
        taps = [rows_added[:, b : b + cols_q, :, b : b + n_x] for b in range(kernel_size)]
        total = functools.reduce(torch.add, taps)
        window = (slice(y_k, y_k + n_k), slice(x_k, x_k + n_x))
        total = total * scale[window]
        if valid is not None:
            total.masked_fill_(~valid[window], float("-inf"))
        if excluded_index is not None:
            at = excluded_index[y_q : y_q + n_q]
            y, x = at // cols_k - y_k, at % cols_k - x_k
            hit = (y >= 0) & (y < n_k) & (x >= 0) & (x < n_x)
            at_y, at_x = hit.nonzero(as_tuple=True)
            total[at_y, at_x, y[hit], x[hit]] = float("-inf")
        value, where = total.flatten(2).max(dim=2)
        where = (y_k + where // n_x) * cols_k + x_k + where % n_x
        best, best_index = score[y_q : y_q + n_q], index[y_q : y_q + n_q]
        better = (value > best) | (value.isnan() & ~best.isnan())
        better |= ((value == best) | (value.isnan() & best.isnan())) & (where < best_index)
        best.copy_(torch.where(better, value, best))
        best_index.copy_(torch.where(better, where, best_index))


def _blocks(*extents: int) -> Iterator[tuple[int, ...]]:
    """Starts of the blocks of a grid, given as size, step, size, step, ..."""
    ranges = [range(0, size, step) for size, step in zip(extents[::2], extents[1::2], strict=True)]
    return itertools.product(*ranges)


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in float32, whatever the user allows elsewhere."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9: one setting
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def gather_fold(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    index: Tensor,  # [N, Ho, Wo]
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N, C, stride*H, stride*W] each, filled
    transfer: Transfer,
) -> None:
    """One gather of blocks per tap, added at the tap's offset on the query grid."""
    padding, (n, h, w) = transfer.patch.padding, index.shape
    for level, (value, out) in enumerate(zip(values, outs, strict=True)):
        stride = transfer.strides[level]
        blocks, row_of = _value_blocks(value, index, transfer, level)
        grid = [size // stride for size in out.shape[2:]]
        margin = [size + 2 * padding for size in grid]
        total = blocks.new_zeros(n, *margin, blocks.shape[1])  # [N, H+2p, W+2p, C*s*s]
        for a, b in _taps(transfer.patch):
            chosen = blocks[row_of(a, b)]  # [N, Ho, Wo, C*s*s]
            if weight is not None:
                chosen = chosen * weight[..., None].to(blocks.dtype)
            total[:, a : a + h, b : b + w] += chosen
        total = total[:, padding : padding + grid[0], padding : padding + grid[1]]
        total = total * _divisor_scale(index, grid, transfer, total.dtype)
        out.copy_(_from_blocks(total, stride))


def gather_fold_adjoint(
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    inverse: InverseIndex,
    weight: Tensor | None,  # [N, Ho, Wo]
    outs: list[Tensor],  # [N or 1, C, HV, WV] each, filled
    transfer: Transfer,
) -> None:
    """Transpose of `gather_fold` in its values."""
    index, padding = inverse.index, transfer.patch.padding
    h, w = index.shape[1:]
    for level, (grad, out) in enumerate(zip(grads, outs, strict=True)):
        stride = transfer.strides[level]
        # Each of these adds in a fixed order on its devices, and the other one does not.
        add = _index_add if grad.device.type == "cpu" else _index_put
        pulled = _grad_blocks(grad, index, transfer, level)
        blocks, row_of = _value_blocks(torch.zeros_like(out), index, transfer, level)
        for a, b in _taps(transfer.patch):
            pull = pulled[:, a : a + h, b : b + w]
            if weight is not None:
                pull = pull * weight[..., None].to(pull.dtype)
            add(blocks, row_of(a, b).flatten(), pull.flatten(0, 2))
        grid = [size + 2 * padding for size in _block_grid(out, stride)]
        total = blocks.view(out.shape[0], *grid, -1)
        total = total[:, padding : grid[0] - padding, padding : grid[1] - padding]
        out.copy_(_from_blocks(total, stride)[:, :, : out.shape[2], : out.shape[3]])


def _index_add(rows: Tensor, index: Tensor, source: Tensor) -> None:
    rows.index_add_(0, index, source)


def _index_put(rows: Tensor, index: Tensor, source: Tensor) -> None:
    rows.index_put_((index,), source, accumulate=True)


def gather_dot(
    values: list[Tensor],  # [N or 1, C, HV, WV] each
    grads: list[Tensor],  # [N, C, stride*H, stride*W] each
    index: Tensor,  # [N, Ho, Wo]
    out: Tensor,  # [N, Ho, Wo], filled
    transfer: Transfer,
) -> None:
    """Inner product of every output patch with the value patch at its index, over all levels."""
    h, w = index.shape[1:]
    out.zero_()
    for level, (value, grad) in enumerate(zip(values, grads, strict=True)):
        pulled = _grad_blocks(grad, index, transfer, level)
        blocks, row_of = _value_blocks(value, index, transfer, level)
        for a, b in _taps(transfer.patch):
            out += (blocks[row_of(a, b)] * pulled[:, a : a + h, b : b + w]).sum(-1)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """No reason: plain PyTorch runs everywhere."""


def _taps(patch: Patch) -> Iterator[tuple[int, ...]]:
    return itertools.product(range(patch.kernel_size), repeat=2)


def _block_grid(x: Tensor, stride: int) -> list[int]:
    return [-(-size // stride) for size in x.shape[2:]]


def _value_blocks(
    value: Tensor, index: Tensor, transfer: Transfer, level: int
) -> tuple[Tensor, Callable[[int, int], Tensor]]:
    """The value as rows of one block each, and the row that every patch reads for a tap.

    Blocks are padded by `padding` on all sides, so that a patch begins at its own grid position.
    """
    stride, padding = transfer.strides[level], transfer.patch.padding
    height, width = _block_grid(value, stride)
    ragged = [height * stride - value.shape[2], width * stride - value.shape[3]]
    margin = padding * stride
    padded = F.pad(
        value.to(sum_dtype(value.dtype)), [margin, margin + ragged[1], margin, margin + ragged[0]]
    )
    height, width = height + 2 * padding, width + 2 * padding
    blocks = padded.unflatten(3, (width, stride)).unflatten(2, (height, stride))
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).reshape(value.shape[0] * height * width, -1)
    rows, columns = transfer.key_grid(value.shape, level)
    check_index(index, rows * columns)
    row = index // columns * width + index % columns
    if value.shape[0] > 1:
        image = torch.arange(value.shape[0], device=index.device)
        row = row + image[:, None, None] * (height * width)
    return blocks, lambda a, b: row + (a * width + b)


def _grad_blocks(
    grad: Tensor, index: Tensor, transfer: Transfer, level: int
) -> Tensor:  # [N, H+2p, W+2p, C*s*s]
    """The gradient as one row per block, divided as the output was, with a margin of zeros."""
    stride, dtype = transfer.strides[level], sum_dtype(grad.dtype)
    grid = _block_grid(grad, stride)
    blocks = grad.to(dtype).unflatten(3, (grid[1], stride)).unflatten(2, (grid[0], stride))
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)
    blocks = blocks * _divisor_scale(index, grid, transfer, dtype)
    return F.pad(blocks, [0, 0, *[transfer.patch.padding] * 4])


def _from_blocks(blocks: Tensor, stride: int) -> Tensor:  # [N, H, W, C*s*s] -> [N, C, s*H, s*W]
    n, h, w, _ = blocks.shape
    x = blocks.unflatten(3, (-1, stride, stride)).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(n, -1, h * stride, w * stride)


def _divisor_scale(
    index: Tensor, grid: list[int], transfer: Transfer, dtype: torch.dtype
) -> Tensor:  # [H or 1, W or 1, 1]
    """The factor of every output block."""
    patch, divisor = transfer.patch, transfer.divisor
    if divisor == "overlap":
        count_y, count_x = (
            _overlap(size, patches, patch, index.device)
            for size, patches in zip(grid, index.shape[1:], strict=True)
        )
        return (count_y[:, None, None] * count_x[:, None]).to(dtype).reciprocal()
    scale = 1 / patch.kernel_size**2 if divisor == "area" else 1.0
    return torch.full((1, 1, 1), scale, dtype=dtype, device=index.device)


def _overlap(size: int, patches: int, patch: Patch, device: torch.device) -> Tensor:
    """The number of patches along one axis that cover each of `size` blocks."""
    position = torch.arange(size, device=device)
    first = (position + patch.padding - patch.kernel_size + 1).clamp(min=0)
    last = (position + patch.padding).clamp(max=patches - 1)
    return last - first + 1
