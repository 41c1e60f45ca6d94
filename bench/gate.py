"""The correctness gate: results are held against float64 ground truth before they are timed."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP_BYTES = 256 << 20  # float64 keys and scores held at a time


class WrongResult(Exception):
    """A result outside its tolerance; the message gives the error."""


class SearchTruth:
    """Float64 ground truth of a 3x3 cosine search for a random subset of the queries.

    The keys of their images come in strips, which fit at any size. The queries are the same on
    every device.
    """

    def __init__(
        self,
        query: Tensor,  # [N, C, H, W]
        key: Tensor,  # [N, C, HK, WK]
        limit: int = 2048,
    ) -> None:
        self.query_shape, self.key_shape = query.shape, key.shape
        n_q = query.shape[2] * query.shape[3]
        generator = torch.Generator("cpu").manual_seed(1)
        chosen = torch.randperm(query.shape[0] * n_q, generator=generator, device="cpu")[:limit]
        self.positions = chosen.sort().values.to(query.device)  # [n], row-major in [N, H, W]
        images, self._image = (self.positions // n_q).unique(return_inverse=True)
        self.checked_images = len(images)
        self._key, padded = (F.pad(x[images], [1] * 4) for x in (key, query))
        places = self.positions % n_q
        self._patches = _patches_at(padded, self._image, places, query.shape[3])
        found = [self._search_image(n) for n in range(len(images))]
        self.best, self.index = (torch.cat(parts) for parts in zip(*found, strict=True))

    def _search_image(self, n: int) -> tuple[Tensor, Tensor]:  # [m], [m]
        """Maximum and its key, of the chosen queries of the n-th of their images."""
        patches = self._patches[self._image == n]  # [m, C*9]
        best = torch.full(patches.shape[:1], -math.inf, dtype=torch.float64, device=patches.device)
        index = torch.zeros_like(best, dtype=torch.int64)
        _, channels, height, columns = self.key_shape
        rows = max(1, STRIP_BYTES // (8 * columns * (9 * channels + len(patches))))
        for y in range(0, height, rows):
            strip = self._key[n : n + 1, :, y : y + rows + 2].double()
            keys = F.normalize(F.unfold(strip, 3)[0], dim=0)  # [C*9, nk]
            value, where = (patches @ keys).max(dim=1)
            better = value > best
            best[better] = value[better]
            index[better] = where[better] + y * columns
        return best, index

    def check(
        self,
        result: tuple[Tensor, Tensor],  # [N, H, W], [N, H, W]
        tolerance: float = 1e-6,
        score_tolerance: float = 1e-6,
    ) -> dict[str, float]:
        """Errors of a search.

        A chosen key may score below the maximum by `tolerance`; a score may differ from the score
        of its own key by `score_tolerance`. Beyond, and for a wrong shape, `WrongResult` is raised.
        """
        grid = (self.query_shape[0], *self.query_shape[2:])
        if any(tuple(x.shape) != grid for x in result):
            raise WrongResult(f"shapes {[list(x.shape) for x in result]}, expected {list(grid)}")
        score, index = (x.flatten()[self.positions] for x in result)
        n_k = self.key_shape[2] * self.key_shape[3]
        if index.min() < 0 or index.max() >= n_k:
            raise WrongResult(f"an index outside [0, {n_k})")
        keys = _patches_at(self._key, self._image, index, self.key_shape[3])
        chosen = torch.linalg.vecdot(keys, self._patches)
        loss = (self.best - chosen).max().item()
        own_error = (score.double() - chosen).abs().max().item()
        if not loss <= tolerance:
            raise WrongResult(f"a chosen key scores {loss:.1e} below the maximum")
        if not own_error <= score_tolerance:
            raise WrongResult(f"a score is off by {own_error:.1e} from that of its own key")
        return {
            "max_abs_error": (score.double() - self.best).abs().max().item(),
            "max_loss": max(loss, 0.0),
            "index_agreement": (index == self.index).double().mean().item(),
            "checked_queries": len(index),
        }


def _patches_at(
    padded: Tensor,  # [N, C, H+2, W+2]
    image: Tensor,  # [n], in [0, N)
    positions: Tensor,  # [n], row-major in [H, W]
    width: int,
) -> Tensor:  # [n, C*9]
    """Normalised 3x3 patches in float64."""
    offset = torch.arange(3, device=padded.device)
    y = (positions // width)[:, None, None] + offset[:, None]
    x = (positions % width)[:, None, None] + offset
    # indices apart from the slice of channels: [n, 3, 3, C]
    patches = padded[image[:, None, None], :, y, x].movedim(3, 1)
    return F.normalize(patches.flatten(1).double(), dim=1)


def check_close(
    names: Iterable[str],
    result: Iterable[Tensor],
    truth: Iterable[Tensor],  # float64
    tolerance: float,
) -> dict[str, float]:
    """Errors relative to the largest true value; `WrongResult` where one exceeds `tolerance`."""
    worst = 0.0
    for name, got, want in zip(names, result, truth, strict=True):
        if got.shape != want.shape:
            raise WrongResult(f"{name} has shape {list(got.shape)}, expected {list(want.shape)}")
        error = ((got.double() - want).abs().max() / want.abs().max()).item()
        if not error <= tolerance:
            raise WrongResult(f"{name} is off by {error:.1e} of its largest value")
        worst = max(worst, error)
    return {"max_relative_error": worst}
