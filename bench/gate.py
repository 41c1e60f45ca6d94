"""The correctness gate: results are held against float64 ground truth before anything is timed."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_BYTES = 256 << 20  # float64 keys and scores held at a time


class WrongResult(Exception):
    """A contender's result is not the right one; the message says how far off it is."""


class SearchTruth:
    """Float64 ground truth of a 3x3 cosine search for a random subset of the queries.

    The computation of `ttsr_fast.reference.search` on some of its columns, in strips of keys, so
    that it fits at any size.
    """

    def __init__(
        self,
        query: Tensor,  # [1, C, H, W]
        key: Tensor,  # [1, C, HK, WK]
        limit: int = 2048,
    ) -> None:
        self.query_shape, self.key_shape = query.shape, key.shape
        width, n_q = query.shape[3], query.shape[2] * query.shape[3]
        chosen = torch.randperm(n_q, generator=torch.Generator().manual_seed(1))[:limit]
        self.positions = chosen.sort().values  # [n]
        self._key = F.pad(key[0], [1] * 4)
        self._patches = _patches_at(F.pad(query[0], [1] * 4), self.positions, width)  # [n, C*9]
        self.best = torch.full(self.positions.shape, -math.inf, dtype=torch.float64)
        self.index = torch.zeros_like(self.positions)
        columns = key.shape[3]
        rows = max(1, STRIP_BYTES // (8 * columns * (9 * key.shape[1] + len(self.positions))))
        for y in range(0, key.shape[2], rows):
            strip = self._key[None, :, y : y + rows + 2].double()
            keys = F.normalize(F.unfold(strip, 3)[0], dim=0)  # [C*9, nk]
            value, where = (self._patches @ keys).max(dim=1)
            better = value > self.best
            self.best[better] = value[better]
            self.index[better] = where[better] + y * columns

    def check(
        self,
        result: tuple[Tensor, Tensor],  # [1, H, W], [1, H, W]
        tolerance: float = 1e-6,
    ) -> dict[str, float]:
        """Hold a search's score and index against the truth.

        Args:
            result: score and index of every query.
            tolerance: by how much the chosen key may score below the maximum.

        Returns:
            `max_abs_error` of the scores, `max_loss` (how far the true score of a chosen key lies
            below the maximum), `index_agreement` and `checked_queries`.

        Raises:
            WrongResult: the shape, a chosen key or a score is wrong.
        """
        grid = (1, *self.query_shape[2:])
        if any(tuple(x.shape) != grid for x in result):
            raise WrongResult(f"shapes {[list(x.shape) for x in result]}, expected {list(grid)}")
        score, index = (x.flatten()[self.positions] for x in result)
        n_k = self.key_shape[2] * self.key_shape[3]
        if index.min() < 0 or index.max() >= n_k:
            raise WrongResult(f"an index outside [0, {n_k})")
        keys = _patches_at(self._key, index, self.key_shape[3])
        chosen = torch.linalg.vecdot(keys, self._patches)
        loss = (self.best - chosen).max().item()
        own_error = (score.double() - chosen).abs().max().item()
        if not loss <= tolerance:
            raise WrongResult(f"a chosen key scores {loss:.1e} below the maximum")
        if not own_error <= 1e-6:
            raise WrongResult(f"a score is off by {own_error:.1e} from that of its own key")
        return {
            "max_abs_error": (score.double() - self.best).abs().max().item(),
            "max_loss": max(loss, 0.0),
            "index_agreement": (index == self.index).double().mean().item(),
            "checked_queries": len(index),
        }


def _patches_at(
    padded: Tensor,  # [C, H+2, W+2]
    positions: Tensor,  # [n], row-major in [H, W]
    width: int,
) -> Tensor:  # [n, C*9]
    """Normalised 3x3 patches in float64."""
    offset = torch.arange(3)
    y = (positions // width)[:, None, None] + offset[:, None]
    x = (positions % width)[:, None, None] + offset
    return F.normalize(padded[:, y, x].movedim(1, 0).flatten(1).double(), dim=1)


def check_close(
    names: Iterable[str],
    result: Iterable[Tensor],
    truth: Iterable[Tensor],  # float64
    tolerance: float,
) -> dict[str, float]:
    """Hold tensors against float64 ground truth, relative to its largest value.

    Raises:
        WrongResult: a shape differs or an error exceeds `tolerance`.
    """
    worst = 0.0
    for name, got, want in zip(names, result, truth, strict=True):
        if got.shape != want.shape:
            raise WrongResult(f"{name} has shape {list(got.shape)}, expected {list(want.shape)}")
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            raise WrongResult(f"{name} is off by {error:.1e} of its largest value")
        worst = max(worst, error)
    return {"max_relative_error": worst}
