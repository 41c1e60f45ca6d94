"""Training pairs from ordinary photographs: a crop, and a synthetic second view of it."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from PIL import Image

from ttsr_fast.datasets import images_in
from ttsr_fast.training.data import CACHE, ImageCache, PairDatasetBase

_STRENGTHS = (1.0, 0.5, 0.25, 0.0)  # of a warp, until the view is inside the photograph
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Warp:
    """Limits of the difference between an image and its reference. Samples are uniform.

    Attributes:
        shift: of the centre, across and down, as a share of the size.
        rotation: in degrees, in both directions.
        perspective: largest relative difference of opposite sides.
        scale: largest factor or divisor of the size, uniform in its logarithm. Reductions are not
            antialiased, so it should stay well below 2.
        brightness: largest offset, as a share of the range from black to white.
        contrast: largest relative change of the difference from middle grey.
    """

    shift: float = 0.25
    rotation: float = 15.0
    perspective: float = 0.1
    scale: float = 1.25
    brightness: float = 0.1
    contrast: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            least, value = float(field.name == "scale"), getattr(self, field.name)
            if not least <= value < math.inf:
                raise ValueError(f"{field.name} must be {least:g} or more, got {value}")
        if self.perspective >= 1:
            raise ValueError(f"perspective must be less than 1, got {self.perspective}")

    def homography(self, sample: np.ndarray, size: int) -> np.ndarray:  # [3, 3]
        """Homography from the pixels of the reference to the pixels of the image.

        Pixel centres are at halves. With T, R, D and P for translation, rotation, scale (as a
        diagonal) and perspective, and c for the centre: T(c + shift) R D P T(-c).

        Args:
            sample: six numbers in [-1, 1]: shift across and down, rotation, scale, perspective
                across and down. Zeros give the identity.
            size: of both, in pixels.
        """
        across, down = self.shift * size * sample[:2]
        angle, scale = math.radians(self.rotation * sample[2]), self.scale ** sample[3]
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        perspective = np.eye(3)
        perspective[2, :2] = self.perspective / size * sample[4:6]
        centre = size / 2
        return (
            _translation(centre + across, centre + down)
            @ rotation
            @ perspective
            @ _translation(-centre, -centre)
        )

    def tones(self, sample: np.ndarray) -> np.ndarray:  # [256] uint8
        """Lookup table of the 8-bit values; `sample` is two numbers in [-1, 1]."""
        contrast, brightness = 1 + self.contrast * sample[0], 255 * self.brightness * sample[1]
        values = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
        return values.round().clip(0, 255).astype(np.uint8)


class Photographs(PairDatasetBase):
    """Photographs as a `torch` data set of pairs, with the items of `PairDataset`.

    The image is a crop of a photograph. The reference is another view of about the same part:
    shifted, rotated, scaled, in perspective, darker or brighter. It is resampled once, directly
    from the photograph, and is inside it. Where there is no room, the warp is halved, at most
    twice, and then left out. A share of references comes from another photograph, so that the model
    learns to ignore them.

    Args:
        source: a folder, or several files and folders.
        size: side of image and reference, a multiple of 4; smaller photographs are errors.
        crops_per_photo: items per photograph and epoch.
        unrelated: share of references from another photograph; None for 0.1, or 0 with a single
            photograph.
        warp: limits of the samples for a reference.
        candidates: number of random crops, of which the one with most detail is taken, because
            skies teach little; 1 for uniform positions.
        augment: False for no flips and rotations.
        seed: of all random numbers. Another seed and `augment=False` give validation data.
        longest: photographs with a longer side are reduced to it: their pixels are often softer
            than the pixels of a small image. None for no reduction.
        on_error: as for `PairDataset`.
        cache: bytes of decoded photographs that every worker keeps, 3 per pixel. If they do not
            hold all photographs, most items decode one again.

    Attributes:
        files: the photographs.

    Raises:
        FileNotFoundError, ValueError: no such folder or no photographs in it, a single one with
            unrelated references, or an argument as above. Items raise an error that names the file.
    """

    def __init__(
        self,
        source: Source,
        *,
        size: int = 160,
        crops_per_photo: int = 16,
        unrelated: float | None = None,
        warp: Warp | None = None,
        candidates: int = 4,
        augment: bool = True,
        seed: int = 0,
        longest: int | None = None,
        on_error: str = "raise",
        cache: int = CACHE,
    ) -> None:
        super().__init__(size, augment, seed, True, on_error, ImageCache(cache, longest))
        self.files = photographs_in(source)
        if crops_per_photo < 1 or candidates < 1:
            raise ValueError(
                "crops_per_photo and candidates must be 1 or more, "
                f"got {crops_per_photo} and {candidates}"
            )
        if unrelated is None:
            unrelated = 0.1 if len(self.files) > 1 else 0.0
        if not 0 <= unrelated <= 1:
            raise ValueError(f"unrelated must be in [0, 1], got {unrelated}")
        if unrelated > 0 and len(self.files) == 1:
            raise ValueError(f"unrelated must be 0 for one photograph alone, got {unrelated}")
        self._crops, self._unrelated = crops_per_photo, unrelated
        self._warp, self._candidates = warp or Warp(), candidates

    def __len__(self) -> int:
        return len(self.files) * self._crops

    def _sample(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        count = len(self.files)
        chosen = number % count
        hr, ref = self._views(self.files[chosen], rng)
        if rng.random() < self._unrelated:
            other = (chosen + rng.integers(1, count)) % count
            ref = self._views(self.files[other], rng)[1]
        return hr, ref

    def _views(self, file: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A crop of a photograph and another view of it, `[size, size, 3]` both."""
        photo, size = self._cache.read(file, self._size), self._size
        sides = np.array(photo.shape[1::-1])
        sample = rng.uniform(-1, 1, 8)
        for strength in _STRENGTHS:
            matrix = self._warp.homography(strength * sample[:6], size)
            # First and last position of the crop in the photograph, for a view inside it.
            corners = mapped(matrix, _corners(size))
            first = np.ceil(-np.minimum(corners.min(0), 0)).astype(int)
            last = np.floor(sides - np.maximum(corners.max(0), size)).astype(int)
            if (first <= last).all():
                break
        positions = rng.integers(first, last + 1, (self._candidates, 2))
        crops = [photo[y : y + size, x : x + size] for x, y in positions]
        best = max(range(len(crops)), key=lambda n: _detail(crops[n])) if len(crops) > 1 else 0
        matrix = _translation(*positions[best]) @ matrix
        return crops[best], self._warp.tones(sample[6:])[resampled(photo, matrix, size)]


def photographs_in(source: Source) -> list[Path]:
    """Files of a folder, or of several files and folders, in natural order.

    Raises:
        FileNotFoundError, ValueError: no such folder, or no photographs in it.
    """
    paths = [source] if isinstance(source, str | os.PathLike) else source
    found = [file for path in paths for file in images_in(Path(path))]
    if not found:
        raise ValueError("source must be at least one photograph, got none")
    return found


def held_out(source: Source, every: int = 8) -> tuple[list[Path], list[Path]]:
    """Photographs for training, and every n-th one for validation, with n = `every`.

    Raises:
        ValueError: `every` is less than 2, or more than the number of photographs.
    """
    files = photographs_in(source)
    if not 2 <= every <= len(files):
        raise ValueError(f"every must be in [2, {len(files)}], the photographs, got {every}")
    validation = files[every - 1 :: every]
    return [file for n, file in enumerate(files, 1) if n % every], validation


def mapped(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:  # [N, 2], [N, 2]
    """Points (x, y) under a homography `[3, 3]`."""
    x, y, w = matrix @ np.column_stack((points, np.ones(len(points)))).T
    return np.column_stack((x / w, y / w))


def resampled(
    photo: np.ndarray,  # [H, W, 3] uint8
    matrix: np.ndarray,  # [3, 3], from the result to `photo`
    size: int,
) -> np.ndarray:  # [size, size, 3] uint8
    """View of a photograph under a homography, which must be inside it.

    Pillow's bicubic transform rounds down and is sharper than its bicubic resize (a is -1 instead
    of -1/2), as a reference should be.
    """
    corners = mapped(matrix, _corners(size))
    left, top = np.floor(corners.min(0)).astype(int) - 2  # bicubic reads two pixels more
    left, top = max(left, 0), max(top, 0)
    right, bottom = np.ceil(corners.max(0)).astype(int) + 2
    coefficients = _translation(-left, -top) @ matrix
    window = Image.fromarray(photo[top:bottom, left:right])
    view = window.transform(
        (size, size),
        Image.Transform.PERSPECTIVE,
        (coefficients / coefficients[2, 2]).ravel()[:8].tolist(),
        Image.Resampling.BICUBIC,
    )
    return np.asarray(view)


def _corners(size: int) -> np.ndarray:  # [4, 2]
    return np.array([(0, 0), (size, 0), (0, size), (size, size)])


def _translation(across: float, down: float) -> np.ndarray:  # [3, 3]
    return np.array([[1.0, 0, across], [0, 1, down], [0, 0, 1]])


def _detail(pixels: np.ndarray) -> float:  # of [H, W, 3]
    """Mean difference of neighbours."""
    green = pixels[..., 1].astype(np.int16)
    return sum(float(np.abs(np.diff(green, axis=axis)).mean()) for axis in (0, 1))
