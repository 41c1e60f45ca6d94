"""What the tests of the two operations go through: literal tables of shapes, layouts and values."""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)
NORMALIZATIONS = ("both", "key", "none")
DIVISORS = ("area", "overlap", "none")

# kernel_size, padding
PATCHES = ((1, 0), (3, 0), (3, 1), (5, 0), (5, 1), (5, 2), (7, 0), (7, 1), (7, 2), (7, 3))

# query [N, C, H, W], key [N or 1, C, HK, WK]
SEARCH_SHAPES = {
    "one_pixel": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "one_key": ((2, 3, 5, 4), (2, 3, 1, 1)),
    "one_query": ((1, 3, 1, 1), (1, 3, 6, 5)),
    "rows": ((1, 3, 1, 17), (1, 3, 1, 9)),
    "columns": ((2, 3, 13, 1), (2, 3, 7, 1)),
    "row_column": ((1, 2, 1, 19), (1, 2, 23, 1)),
    "two_rows": ((1, 4, 2, 31), (1, 4, 2, 33)),
    "primes": ((2, 3, 7, 11), (2, 3, 13, 5)),
    "batch_of_one_key": ((3, 5, 6, 7), (1, 5, 9, 4)),
    "vector_3": ((1, 2, 3, 3), (1, 2, 4, 3)),
    "vector_4": ((1, 2, 3, 4), (1, 2, 5, 4)),
    "vector_5": ((1, 2, 3, 5), (1, 2, 4, 5)),
    "vector_7": ((1, 2, 4, 7), (1, 2, 3, 9)),
    "vector_8": ((1, 3, 4, 8), (1, 3, 5, 8)),
    "vector_15": ((1, 3, 3, 15), (1, 3, 4, 17)),
    "vector_16": ((1, 3, 3, 16), (1, 3, 4, 16)),
    "vector_17": ((1, 3, 5, 17), (1, 3, 4, 15)),
    "tile_127": ((1, 2, 3, 127), (1, 2, 4, 131)),
    "tile_128": ((1, 2, 3, 128), (1, 2, 3, 126)),
    "tile_129": ((1, 1, 2, 129), (1, 1, 3, 128)),
    "tile_130": ((1, 1, 2, 130), (1, 1, 2, 130)),
    "tile_131": ((1, 2, 2, 131), (1, 2, 3, 127)),
    "two_tiles": ((1, 2, 3, 257), (1, 2, 4, 257)),
    "tall": ((1, 2, 131, 3), (1, 2, 127, 4)),
    "square_tiles": ((1, 2, 41, 43), (1, 2, 23, 29)),
    "long_key_row": ((1, 1, 2, 5), (1, 1, 2, 2100)),
    "long_query_row": ((1, 1, 2, 2100), (1, 1, 3, 5)),
    "channels_64": ((1, 64, 9, 10), (1, 64, 8, 11)),
    "channels_256": ((1, 256, 7, 9), (1, 256, 10, 6)),
    "channels_257": ((1, 257, 5, 6), (1, 257, 6, 5)),
    "channels_300": ((2, 300, 6, 5), (1, 300, 7, 8)),
}

# value [N or 1, C, HV, WV], index [N, H, W], stride
TRANSFER_SHAPES = {
    "one_block": ((1, 1, 1, 1), (1, 1, 1), 1),
    "one_block_stride_4": ((2, 3, 4, 4), (2, 2, 1), 4),
    "one_key": ((2, 3, 2, 2), (2, 5, 4), 2),
    "one_query": ((1, 3, 6, 5), (1, 1, 1), 1),
    "rows": ((1, 3, 2, 18), (1, 1, 11), 2),
    "columns": ((2, 2, 28, 4), (2, 13, 1), 4),
    "primes": ((2, 5, 13, 11), (2, 7, 5), 1),
    "primes_stride_2": ((2, 3, 14, 10), (2, 3, 11), 2),
    "stride_3": ((1, 2, 15, 12), (1, 4, 7), 3),
    "ragged_stride_2": ((1, 3, 11, 15), (1, 6, 7), 2),
    "ragged_stride_4": ((2, 3, 23, 25), (2, 5, 6), 4),
    "ragged_rows_only": ((1, 2, 23, 24), (1, 4, 5), 4),
    "batch_of_one_value": ((1, 4, 10, 12), (3, 6, 5), 2),
    "level_3": ((1, 256, 6, 7), (1, 7, 5), 1),
    "level_2": ((1, 128, 12, 14), (1, 7, 5), 2),
    "level_1": ((1, 64, 26, 27), (1, 7, 5), 4),
    "channels_300": ((1, 300, 5, 6), (2, 4, 7), 1),
    "wide": ((1, 2, 3, 131), (1, 2, 257), 1),
    "wide_stride_2": ((1, 1, 6, 258), (1, 3, 127), 2),
}

FEATURES: dict[str, Callable[..., Tensor]] = {
    "signed": torch.randn,
    "after_relu": lambda *size, **kwargs: torch.randn(*size, **kwargs).clamp(min=0),
    "small": lambda *size, **kwargs: 1e-6 * torch.randn(*size, **kwargs),
    "large": lambda *size, **kwargs: 1e6 * torch.randn(*size, **kwargs),
    "negative": lambda *size, **kwargs: -torch.rand(*size, **kwargs) - 0.1,
}


def integers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Whole numbers from -3 to 3: sums of their products are exact, and ties abound."""
    return torch.randint(-3, 4, size).to(dtype)


def random_index(
    value_size: tuple[int, ...],
    size: tuple[int, ...],
    stride: int,
    kernel_size: int = 3,
    padding: int = 1,
) -> Tensor:  # [N, H, W]
    """Positions on the key grid of a value, its four corners among them if there is room."""
    height, width = (n // stride + 2 * padding - kernel_size + 1 for n in value_size[2:])
    corners = torch.tensor([0, width - 1, (height - 1) * width, height * width - 1])
    index = torch.randint(height * width, size)
    index.view(-1)[: len(corners)] = corners[: index.numel()]
    return index


def _surrounded(x: Tensor) -> Tensor:
    """A crop of a larger tensor of NaN: nothing outside it may be read."""
    n, c, h, w = x.shape
    around = x.new_full((n + 1, c + 2, h + 3, w + 5), float("nan"))
    crop = around[1:, 1:-1, 1:-2, 2:-3]
    return crop.copy_(x)


def _strided(x: Tensor) -> Tensor:
    """Every second channel, third row and second column of a tensor of NaN."""
    n, c, h, w = x.shape
    spread = x.new_full((n, 2 * c, 3 * h, 2 * w), float("nan"))[:, 1::2, 2::3, ::2]
    return spread.copy_(x)


# The same values at other places in memory; the expanded ones repeat a part of theirs.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch_inside": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "surrounded": _surrounded,
    "strided": _strided,
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_rows": lambda x: x[:, :, :1].expand_as(x),
}
