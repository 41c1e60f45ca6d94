"""Data of the diagrams of the user guide: small runs of this package, each checked here."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttsr_fast import gather_fold, search
from ttsr_fast.images import Image, downscale, upscale_bicubic
from ttsr_fast.model import LTE
from ttsr_fast.operators import pytorch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo import make_pair


class Products(NamedTuple):
    """The search of maps of one row, step by step; keys go down, queries across."""

    pixels: Tensor  # [WK, W], M
    patches: Tensor  # [WK, W], its sums along diagonals
    cosines: Tensor  # [WK, W]
    index: Tensor  # [W]


def products() -> Products:
    generator = torch.Generator().manual_seed(5)
    query, key = (torch.randint(0, 4, (1, 3, 1, n), generator=generator).float() for n in (7, 8))
    pixels = key[0, :, 0].T @ query[0, :, 0]
    patches = _diagonal_sums(pixels)
    k, q = (F.unfold(x, 3, padding=1)[0] for x in (key, query))
    torch.testing.assert_close(patches, k.T @ q, rtol=0, atol=0)
    cosines = patches / k.norm(dim=0)[:, None] / q.norm(dim=0)
    index = search(query, key).index.flatten()
    assert torch.equal(index, cosines.argmax(0))
    return Products(pixels, patches, cosines, index)


class Walk(NamedTuple):
    """Three steps down two images, and windows of 48 columns of both."""

    query: Tensor  # [1, 3, 3, 48]
    key: Tensor  # [1, 3, 3, 48]
    steps: list[Tensor]  # [48, 48] each: products of two rows, three pixels along them added
    patches: Tensor  # [48, 48], the sum of the steps


def walk() -> Walk:
    """The stereo pair, of which a pixel is the texture of 4x4 pixels, at length 1."""
    row, first, shift, width = 76, 104, 9, 48
    views = [Image(x.pixels[:496, :736]).to_tensor() for x in reversed(make_pair()[1:])]
    q, k = (F.normalize(F.pixel_unshuffle(_texture(x), 4), dim=1)[0] for x in views)
    columns = slice(first, first + width), slice(first - shift, first - shift + width)
    products = [_diagonal_sums(q[:, y].T @ k[:, y]) for y in (row - 1, row, row + 1)]
    patches = products[0] + products[1] + products[2]
    a, b = (F.unfold(x[None], 3, padding=1)[0].unflatten(1, x.shape[1:])[:, row] for x in (q, k))
    torch.testing.assert_close(patches, a.T @ b)
    windows = [
        F.avg_pool2d(x, 4)[:, :, row - 1 : row + 2, where]
        for x, where in zip(views, columns, strict=True)
    ]
    return Walk(*windows, [x[columns] for x in products], patches[columns])


def _texture(x: Tensor) -> Tensor:
    return x - F.avg_pool2d(x, 9, stride=1, padding=4, count_include_pad=False)


def _diagonal_sums(products: Tensor) -> Tensor:
    height, width = products.shape
    padded = F.pad(products, [1] * 4)
    taps = [padded[d : d + height, d : d + width] for d in range(3)]
    return taps[0] + taps[1] + taps[2]


class Blocks(NamedTuple):
    """The block of the value under each of the nine patches over an output block."""

    grid: tuple[int, int]
    key_grid: tuple[int, int]
    at: tuple[int, int]  # the output block
    read: list[tuple[int, int]]  # row and column in the value, patch by patch


def blocks() -> Blocks:
    """A match that is coherent, but for two queries."""
    grid, key_grid, at = (6, 6), (6, 8), (2, 2)
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    index = row * key_grid[1] + column + 2
    index[1, 3], index[3, 1] = 4 * key_grid[1] + 1, key_grid[1] + 6
    read = []
    for d in ((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)):
        chosen = divmod(int(index[at[0] + d[0], at[1] + d[1]]), key_grid[1])
        read.append((chosen[0] - d[0], chosen[1] - d[1]))
    value = torch.arange(48.0).view(1, 1, *key_grid)
    expected = sum(float(value[0, 0, y, x]) for y, x in read) / 9
    assert abs(float(gather_fold(value, index[None])[0, 0][at]) - expected) < 1e-5
    return Blocks(grid, key_grid, at, read)


def overlaps() -> dict[str, Tensor]:  # [5, 7] each
    """The transfer of ones, by divisor; all patches come from the middle of the key grid."""
    value, index = torch.ones(1, 1, 5, 5), torch.full((1, 5, 7), 12)
    found = {
        divisor: gather_fold(value, index, divisor=divisor)[0, 0]
        for divisor in ("none", "area", "overlap")
    }
    torch.testing.assert_close(found["none"] / 9, found["area"])
    torch.testing.assert_close(found["overlap"], torch.ones(5, 7))
    return found


class Gaps(NamedTuple):
    """The lead of the best key over the second best, and the effect of rounding on a search."""

    lead: Tensor  # [Nq], cosine of the best key minus that of the second best
    moved: dict[str, float]  # the largest change of a best score, by kind of search
    same: dict[str, float]  # share of the queries that keep their key


@torch.no_grad()
def gaps() -> Gaps:
    """TTSR's features of the stereo pair, with random weights; the truth is float64.

    The types of 16 bits round the features, and are exact from there on.
    """
    lr, ref, _ = make_pair()
    torch.manual_seed(0)
    extractor = LTE()
    blurred = (upscale_bicubic(x) for x in (lr.pixels, downscale(ref.pixels[:, :740])))
    query, key = (extractor((Image(x).to_tensor() + 1) / 2)[2] for x in blurred)
    truth, second = search(query.double(), key.double()), torch.empty(1, *query.shape[2:]).double()
    options = (3, 1, "both", 1e-12, "fp64")
    where = torch.empty_like(truth.index)
    pytorch.search(query.double(), key.double(), None, second, where, *options, barred=truth.index)
    runs = {
        "search,\nfloat32": search(query, key),
        "unfold + matmul,\nfloat32": _plain(query, key),
    }
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        runs[name] = search(*(x.to(dtype).float() for x in (query, key)))
    return Gaps(
        (truth.score - second).flatten(),
        {name: float((score - truth.score).abs().max()) for name, (score, _) in runs.items()},
        {name: float((i == truth.index).double().mean()) for name, (_, i) in runs.items()},
    )


def _plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle, for a row of queries at a time."""
    padded = F.pad(query, [1] * 4)
    k = F.normalize(F.unfold(key, 3, padding=1)[0], dim=0).T.contiguous()
    best = []
    for y in range(query.shape[2]):
        q = F.normalize(F.unfold(padded[:, :, y : y + 3], 3)[0], dim=0)
        best.append((k @ q).max(dim=0))
    scores, indices = zip(*best, strict=True)
    return torch.stack(scores)[None], torch.stack(indices)[None]
