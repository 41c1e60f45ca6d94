"""Training items, which depend on a seed and an index alone.

`dataset[index]` is item `index % len(dataset)` of epoch `index // len(dataset)`, with its own
random numbers. Any number of workers and processes, and a resumed run, therefore see the same data.
"""

import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ttsr_fast import images
from ttsr_fast.datasets import Pair, degrade, read_rgb
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE

CACHE = 2**29  # bytes of decoded images per process
_LEAST = 3 * SCALE  # pixels: one patch of the search
Batch = Mapping[str, Tensor]

_logger = logging.getLogger(__name__)


class UnusableImage(ValueError):
    """A file that cannot be read, or too small an image. The message names the file."""

    def __init__(self, message: str) -> None:
        # A loader constructs the error of its worker again, from a traceback and the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class ImageCache:
    """Decoded images, the most recently used ones, up to a limit.

    Every process has its own: each worker of a loader takes the limit once.

    Args:
        limit: bytes to keep.
        longest: images with a longer side are reduced to it; None for no reduction.
    """

    def __init__(self, limit: int, longest: int | None = None) -> None:
        self._limit, self._longest = limit, longest
        self._images: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._size = 0

    def __reduce__(self) -> tuple[type["ImageCache"], tuple[int, int | None]]:
        """A copy for another process is empty."""
        return type(self), (self._limit, self._longest)

    def read(self, path: Path, least: int) -> np.ndarray:  # [H, W, 3] uint8, read-only
        """The image in a file, with at least `least` pixels on both sides.

        Raises:
            UnusableImage: it cannot be read or is too small.
        """
        try:
            pixels = self._decoded(path)
        except (OSError, ValueError) as error:
            raise UnusableImage(str(error)) from error
        height, width = pixels.shape[:2]
        if min(height, width) < least:
            reduced = "" if self._longest is None else f" with longest {self._longest}"
            raise UnusableImage(
                f"{shown(path)} must have at least {least}x{least} pixels, "
                f"got {width}x{height}{reduced}"
            )
        return pixels

    def _decoded(self, path: Path) -> np.ndarray:
        if path in self._images:
            self._images.move_to_end(path)
            return self._images[path]
        pixels = read_rgb(path)
        if self._longest is not None and max(pixels.shape) > self._longest:
            share = self._longest / max(pixels.shape)
            height, width = (max(1, round(share * side)) for side in pixels.shape[:2])
            pixels = images.resize(pixels, (height, width))
        if pixels.nbytes <= self._limit:
            self._images[path] = pixels
            self._size += pixels.nbytes
        while self._size > self._limit:
            self._size -= self._images.popitem(last=False)[1].nbytes
        return pixels


class PairDatasetBase(Dataset[dict[str, Tensor]], ABC):
    """Base of the data sets: random numbers, errors, and the item of an image and its reference.

    Args:
        size: side of the HR image, a multiple of 4.
        augment: random flips and rotations of both groups, (lr, lrsr, hr) and (ref, refsr).
        seed: of all random numbers.
        pad_references: pad references to `size` x `size`.
        on_error: "raise", or "skip" for the next usable item.
        cache: reader of the images.
    """

    def __init__(
        self,
        size: int,
        augment: bool,
        seed: int,
        pad_references: bool,
        on_error: str,
        cache: ImageCache,
    ) -> None:
        if size < _LEAST or size % SCALE:
            raise ValueError(f"size must be a multiple of {SCALE}, {_LEAST} or more, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        self._size, self._augment, self._seed = size, augment, seed
        self._pad, self._on_error, self._cache = pad_references, on_error, cache
        self._warned: set[str] = set()

    @abstractmethod
    def __len__(self) -> int:
        """Items of an epoch."""

    @abstractmethod
    def _sample(
        self, number: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:  # [size, size, 3], [H, W, 3]
        """The HR image of an item and its reference, None for the LR image."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Item `index % len(self)` of epoch `index // len(self)`.

        Raises:
            IndexError: a negative index.
            UnusableImage (a ValueError): an image of this item, or with "skip" of all items.
        """
        if index < 0:
            raise IndexError(f"index must be 0 or more, got {index}")
        epoch, first = divmod(index, len(self))
        for number in (*range(first, len(self)), *range(first)):
            seeds = np.random.SeedSequence(self._seed, spawn_key=(epoch, number))
            rng = np.random.default_rng(seeds)
            try:
                return self._item(*self._sample(number, rng), rng)
            except UnusableImage as error:
                if self._on_error == "raise":
                    raise
                if str(error) not in self._warned:
                    _logger.warning("left out: %s", error)
                    self._warned.add(str(error))
                last = error
        raise UnusableImage(f"no item can be used; the last: {last}")

    def _item(
        self, hr: np.ndarray, ref: np.ndarray | None, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Degradation, padding, flips and rotations, in the order of the official code."""
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
        of_hr, of_ref = (
            rng.integers(0, (2, 2, 4)) if self._augment else (0, 0, 0) for _ in range(2)
        )
        item = {"lr": (lr, of_hr), "lrsr": (lrsr, of_hr), "hr": (hr, of_hr)}
        item |= {"ref": (ref, of_ref), "refsr": (refsr, of_ref)}
        tensors = {
            name: images.to_tensor(flip_rotate(*x))[0].contiguous() for name, x in item.items()
        }
        return {**tensors, "key_mask": torch.from_numpy(flip_rotate(mask, of_ref))}


class PairDataset(PairDatasetBase):
    """Pairs of images as a `torch` data set for TTSR's training.

    An item is a dict of float32 tensors in [-1, 1] and a mask:

        lr        [3, size/4, size/4]    hr reduced
        lrsr      [3, size, size]        lr upscaled
        hr        [3, size, size]
        ref       [3, size, size]        the reference, black at the right and below if smaller
        refsr     [3, size, size]        the reference reduced, upscaled and then padded
        key_mask  [size/4, size/4]       bool, False where 4x4 pixels are nothing but padding

    Larger images are cropped at random. A larger reference is cropped at the same relative
    position, which shows about the same part of the scene. One of several references is sampled.
    Flips and quarter rotations are sampled for the reference independently of the rest. They follow
    the padding, which can therefore be at any side.

    Args:
        pairs: result of `find_pairs`.
        size: side of the HR image, a multiple of 4; smaller images are errors.
        augment: False for no flips and rotations. Crops of larger images stay random.
        seed: of all random numbers, 0 or more.
        pad_references: False keeps the size of references, cut to a multiple of 4, for batches of
            one; tensors and mask have that size.
        on_error: "raise", or "skip" to replace an item with an unreadable or too small file by the
            next usable one; every process logs one warning per file.
        cache: bytes of decoded images that every worker keeps.

    Attributes:
        pairs: the argument.

    Raises:
        ValueError: no pairs, or an invalid argument. Items raise one that names the file.
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
        super().__init__(size, augment, seed, pad_references, on_error, ImageCache(cache))
        if not pairs:
            raise ValueError("pairs must be at least one, got none")
        if size < SCALE * _LEAST and not all(pair.references for pair in pairs):
            raise ValueError(
                f"size must be {SCALE * _LEAST} or more where the LR image is the reference, "
                f"got {size}"
            )
        self.pairs = list(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def _sample(
        self, number: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        pair = self.pairs[number]
        position = rng.random(2)
        hr = _crop(self._cache.read(pair.hr, self._size), self._size, position)
        if not pair.references:
            return hr, None
        chosen = pair.references[rng.integers(len(pair.references))]
        ref = self._cache.read(chosen, _LEAST)
        return hr, _crop(ref, self._size, position) if self._pad else ref


class EpochSampler(Sampler[int]):
    """Indices of an epoch, in an order that depends on seed and epoch alone.

    Args:
        length: of the data set.
        seed: of the order, 0 or more.
        epoch: first epoch.
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


class DistributedBatchSampler(Sampler[list[int]]):
    """One process's part of every batch of an epoch. An incomplete batch is left out.

    Args:
        sampler: of the epoch, for all processes.
        batch_size: of all processes together, a multiple of `world_size`.
        start: batches to leave out at the beginning.
        rank: number of this process.
        world_size: number of processes.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, start: int, rank: int, world_size: int
    ) -> None:
        self._sampler, self._batch_size, self._start = sampler, batch_size, start
        self._own = batch_size // world_size
        self._offset = rank * self._own

    def __len__(self) -> int:
        return len(self._sampler) // self._batch_size - self._start

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self._sampler)
        for batch in range(self._start, len(indices) // self._batch_size):
            first = batch * self._batch_size + self._offset
            yield indices[first : first + self._own]


def model_inputs(batch: Batch, mask_padding: bool) -> dict[str, Tensor | None]:
    """Arguments of `TTSR.forward` from a batch."""
    inputs = {name: batch[name] for name in ("lr", "lrsr", "ref", "refsr")}
    return {**inputs, "key_mask": batch["key_mask"] if mask_padding else None}


def flip_rotate(x: np.ndarray, how: Sequence[int] | np.ndarray) -> np.ndarray:
    """`[H, W, ...]` flipped left to right, flipped upside down, and rotated by quarter turns.

    Args:
        x: image or mask.
        how: 1 or 0 for each flip, and the number of quarter turns.
    """
    across, down, turns = how
    return np.rot90(x[:: -1 if down else 1, :: -1 if across else 1], turns).copy()


def _crop(
    pixels: np.ndarray,  # [H, W, 3]
    size: int,
    position: np.ndarray,  # [2], in [0, 1), down and across
) -> np.ndarray:  # [min(H, size), min(W, size), 3]
    """A crop at a relative position."""
    top, left = (
        int(share * (max(side - size, 0) + 1))
        for share, side in zip(position, pixels.shape[:2], strict=True)
    )
    return pixels[top : top + size, left : left + size]


def _padded(x: np.ndarray, size: int) -> np.ndarray:
    """`[H, W, ...]` with zeros at the right and below."""
    height, width = x.shape[:2]
    return np.pad(x, [(0, size - height), (0, size - width), (0, 0)][: x.ndim])
