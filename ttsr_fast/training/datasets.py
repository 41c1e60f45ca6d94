"""What TTSR is trained on: items that depend on a seed and a number, and on nothing else.

`dataset[draw]` is item `draw % len(dataset)` of epoch `draw // len(dataset)`, with its own random
numbers. So any number of workers and processes, and a run that is resumed, see the same data.
"""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ttsr_fast import images
from ttsr_fast.datasets import Pair, degrade, read_rgb
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE

CACHE = 2**29  # bytes of decoded pictures that a process keeps
_LEAST = 3 * SCALE  # pixels: one patch of the search

_logger = logging.getLogger(__name__)


class UnusablePicture(ValueError):
    """A file that cannot be read, or holds too small a picture. The message names it."""

    def __init__(self, message: str) -> None:
        # A loader raises what its worker raised anew, with a traceback before the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class Pictures:
    """Decoded pictures, of which those used last are kept, up to a limit.

    Every process has its own: what the limit allows is taken once for each worker of a loader.

    Args:
        limit: bytes to keep.
        longest: pictures with a longer side are reduced to it, None keeps all as they are.
    """

    def __init__(self, limit: int, longest: int | None = None) -> None:
        self._limit, self._longest = limit, longest
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._size = 0

    def __reduce__(self) -> tuple[type["Pictures"], tuple[int, int | None]]:
        """A copy for another process starts empty."""
        return type(self), (self._limit, self._longest)

    def read(self, path: Path, least: int) -> np.ndarray:  # [H, W, 3] uint8, not to be written to
        """The picture in a file, whose sides must have `least` pixels.

        Raises:
            UnusablePicture: it cannot be read or is too small.
        """
        try:
            pixels = self._decoded(path)
        except (OSError, ValueError) as error:
            raise UnusablePicture(str(error)) from error
        height, width = pixels.shape[:2]
        if min(height, width) < least:
            reduced = "" if self._longest is None else f" with longest {self._longest}"
            raise UnusablePicture(
                f"{shown(path)} must have at least {least}x{least} pixels, "
                f"got {width}x{height}{reduced}"
            )
        return pixels

    def _decoded(self, path: Path) -> np.ndarray:
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        pixels = read_rgb(path)
        if self._longest is not None and max(pixels.shape) > self._longest:
            share = self._longest / max(pixels.shape)
            height, width = (max(1, round(share * side)) for side in pixels.shape[:2])
            pixels = images.resize(pixels, (height, width))
        if pixels.nbytes <= self._limit:
            self._kept[path] = pixels
            self._size += pixels.nbytes
        while self._size > self._limit:
            self._size -= self._kept.popitem(last=False)[1].nbytes
        return pixels


class DrawnItems(Dataset[dict[str, Tensor]], ABC):
    """What the data sets share: draws, errors, and the item that two pictures make.

    Args:
        size: side of the HR picture, a multiple of 4.
        augment: whether both groups, (lr, lrsr, hr) and (ref, refsr), are flipped and turned.
        seed: of all random numbers.
        pad_references: whether references are made `size` x `size`.
        on_error: "raise", or "skip" for the next item whose pictures can be used.
        pictures: where pictures are read.
    """

    def __init__(
        self,
        size: int,
        augment: bool,
        seed: int,
        pad_references: bool,
        on_error: str,
        pictures: Pictures,
    ) -> None:
        if size < _LEAST or size % SCALE:
            raise ValueError(f"size must be a multiple of {SCALE}, {_LEAST} or more, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self._size, self._augment, self._seed = size, augment, seed
        self._pad, self._on_error, self._pictures = pad_references, on_error, pictures
        self._told: set[str] = set()

    @abstractmethod
    def __len__(self) -> int:
        """Items of an epoch."""

    @abstractmethod
    def _draw(
        self, number: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:  # [size, size, 3], [H, W, 3]
        """The HR picture of an item and its reference, None for the LR picture."""

    def __getitem__(self, draw: int) -> dict[str, Tensor]:
        """Item `draw % len(self)` of epoch `draw // len(self)`.

        Raises:
            IndexError: a negative draw.
            UnusablePicture (a ValueError): a picture of this item, or with "skip" of all items.
        """
        if draw < 0:
            raise IndexError(f"draw must be 0 or more, got {draw}")
        epoch, first = divmod(draw, len(self))
        for number in (*range(first, len(self)), *range(first)):
            seeds = np.random.SeedSequence(self._seed, spawn_key=(epoch, number))
            rng = np.random.default_rng(seeds)
            try:
                return self._item(*self._draw(number, rng), rng)
            except UnusablePicture as error:
                if self._on_error == "raise":
                    raise
                if str(error) not in self._told:
                    _logger.warning("left out: %s", error)
                    self._told.add(str(error))
                last = error
        raise UnusablePicture(f"no item can be used; the last: {last}")

    def _item(
        self, hr: np.ndarray, ref: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Degraded, then padded, then flipped and turned, in the order of the official code."""
        lr, lrsr = degrade(hr)
        ref = lr if ref is None else ref
        if not self._pad:
            ref = ref[: ref.shape[0] // SCALE * SCALE, : ref.shape[1] // SCALE * SCALE]
        refsr = degrade(ref)[1]
        height, width = ref.shape[:2]
        mask = np.ones((-(-height // SCALE), -(-width // SCALE)), bool)
        if self._pad:
            ref, refsr = (_padded(x, self._size) for x in (ref, refsr))
            mask = _padded(mask, self._size // SCALE)
        ours, theirs = (
            rng.integers(0, (2, 2, 4)) if self._augment else (0, 0, 0) for _ in range(2)
        )
        item = {"lr": (lr, ours), "lrsr": (lrsr, ours), "hr": (hr, ours)}
        item |= {"ref": (ref, theirs), "refsr": (refsr, theirs)}
        tensors = {name: images.to_tensor(turned(*x))[0].contiguous() for name, x in item.items()}
        return {**tensors, "key_mask": torch.from_numpy(turned(mask, theirs))}


class PairDataset(DrawnItems):
    """Pairs of pictures as a `torch` data set, items as TTSR is trained on them.

    An item is a dict of float32 tensors in [-1, 1] and a mask:

        lr        [3, size/4, size/4]    hr reduced
        lrsr      [3, size, size]        lr enlarged
        hr        [3, size, size]
        ref       [3, size, size]        the reference, black at the right and below if smaller
        refsr     [3, size, size]        the reference reduced and enlarged, and then padded
        key_mask  [size/4, size/4]       bool, False where 4x4 pixels are nothing but padding

    Of larger pictures a part is drawn, and of a larger reference the part at the same share of the
    way across and down, which shows about the same of one scene. Of several references one is
    drawn. Flips and quarter turns are drawn for the reference apart from the rest; they come after
    the padding, which may so lie at any side.

    Args:
        pairs: what `find_pairs` gives.
        size: side of the HR picture, a multiple of 4; smaller ones are errors.
        augment: False leaves out flips and turns. Parts of larger pictures are drawn all the same.
        seed: of all random numbers, 0 or more.
        pad_references: False leaves references as large as they are, cut to a multiple of 4, for
            batches of one; tensors and mask have their size.
        on_error: "raise", or "skip" to replace an item, one of whose files cannot be read or is too
            small, with the next one that can be used; a warning is logged once for each file in
            every process.
        cache: bytes of decoded pictures that every worker keeps.

    Attributes:
        pairs: as they were given.

    Raises:
        ValueError: no pairs, or an argument as above. Items raise one that names the file.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        size: int = 160,
        augment: bool = True,
        seed: int = 0,
        pad_references: bool = True,
        on_error: str = "raise",
        cache: int = CACHE,
    ) -> None:
        super().__init__(size, augment, seed, pad_references, on_error, Pictures(cache))
        if not pairs:
            raise ValueError("pairs must be at least one, got none")
        if size < SCALE * _LEAST and not all(pair.references for pair in pairs):
            raise ValueError(
                f"size must be {SCALE * _LEAST} or more where the LR picture is the reference, "
                f"got {size}"
            )
        self.pairs = list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def _draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        pair = self.pairs[number]
        place = rng.random(2)
        hr = part(self._pictures.read(pair.hr, self._size), self._size, place)
        if not pair.references:
            return hr, None
        chosen = pair.references[rng.integers(len(pair.references))]
        ref = self._pictures.read(chosen, _LEAST)
        return hr, part(ref, self._size, place) if self._pad else ref


class Draws(Sampler[int]):
    """The draws of an epoch, in an order shuffled by seed and epoch alone.

    Args:
        length: of the data set.
        seed: of the order, 0 or more.
        epoch: the epoch to begin with.
    """

    def __init__(self, length: int, *, seed: int = 0, epoch: int = 0) -> None:
        if length < 1 or seed < 0 or epoch < 0:
            raise ValueError(
                "length must be 1 or more, seed and epoch 0 or more, "
                f"got {length}, {seed} and {epoch}"
            )
        self._length, self._seed, self._epoch = length, seed, epoch

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        seeds = np.random.SeedSequence(self._seed, spawn_key=(self._epoch,))
        order = np.random.default_rng(seeds).permutation(self._length)
        return iter((self._epoch * self._length + order).tolist())


def part(
    pixels: np.ndarray,  # [H, W, 3]
    size: int,
    place: Sequence[float] | np.ndarray,
) -> np.ndarray:  # [min(H, size), min(W, size), 3]
    """The part at these shares, in [0, 1), of the way down and across."""
    top, left = (
        int(share * (max(side - size, 0) + 1))
        for share, side in zip(place, pixels.shape[:2], strict=True)
    )
    return pixels[top : top + size, left : left + size]


def turned(x: np.ndarray, how: Sequence[int] | np.ndarray) -> np.ndarray:
    """`[H, W, ...]` flipped left to right, flipped upside down, and so many quarter turns."""
    across, down, turns = how
    return np.rot90(x[:: -1 if down else 1, :: -1 if across else 1], turns).copy()


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """`[H, W, ...]` with zeros at the right and below."""
    height, width = x.shape[:2]
    return np.pad(x, [(0, size - height), (0, size - width), (0, 0)][: x.ndim])
