"""References for many pictures: read once, and what a model makes of them once, or never again."""

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import torch

from ttsr_fast import images
from ttsr_fast.detail import reference_pair
from ttsr_fast.images import SCALE, Image
from ttsr_fast.inference import Progress, ReferenceFeatures, reference_features
from ttsr_fast.model import TTSR
from ttsr_fast.plan import Plan

_FORMAT = "ttsr-fast reference features, version 1"
_LEAST = 3 * SCALE  # pixels: one patch of the search
_NAMES = ("key", "lv1", "lv2", "lv3")

_logger = logging.getLogger(__name__)


class ReferenceBank:
    """References to give to `upscale` again and again, for the frames of a video or a folder.

    Features for method "ttsr" are made at the first use and kept: 8 KB (in float32) for every 4x4
    pixels. With a `cache` they are written there and read the next time, also by other processes: a
    safetensors file for each reference, whose name says what it was made from, picture and weights
    of the texture extractor. Files that are torn, or not what their name says, are made anew, which
    a log message says.

    Args:
        refs: a reference, or several in a list or tuple: whatever `upscale` takes as one.
        cache: a folder for features, made if it is not there; None keeps them in memory alone.

    Raises:
        TypeError, ValueError: no reference, one that is too small; and as `images.as_image`.
        OSError: the folder cannot be made.
        ImportError: a cache without safetensors.
    """

    def __init__(self, refs: Any, *, cache: str | os.PathLike[str] | None = None) -> None:
        several = isinstance(refs, list | tuple)
        given = list(refs) if several else [refs]
        if not given:
            raise ValueError("ref must be at least one reference, got none")
        names = [
            os.fspath(ref) if isinstance(ref, str | os.PathLike) else f"ref[{n}]" * several or "ref"
            for n, ref in enumerate(given)
        ]
        self._colour = [
            _checked(images.as_image(ref, name), name)
            for ref, name in zip(given, names, strict=True)
        ]
        self._grey: list[Image] | None = None
        self._features: dict[tuple[Any, ...], list[ReferenceFeatures]] = {}
        self._cache = None if cache is None else Path(cache)
        if self._cache is not None:
            _safetensors()
            self._cache.mkdir(parents=True, exist_ok=True)

    def pictures(self, *, grey: bool) -> list[Image]:
        """The references, made grey if that is asked for."""
        if not grey:
            return self._colour
        if self._grey is None:
            self._grey = [Image(images.to_grey(image.pixels)) for image in self._colour]
        return self._grey

    @property
    def made(self) -> bool:
        """Whether features have been made, and are in memory."""
        return bool(self._features)

    def features(
        self,
        model: TTSR,
        plan: Plan,
        *,
        grey: bool,
        amp: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> list[ReferenceFeatures]:
        """What `model` searches and transfers, on `plan.store`; see `reference_features`."""
        digest = _digest_of_weights(model)
        made_from = (grey, amp, digest)
        if made_from not in self._features:
            self._features[made_from] = [
                self._features_of(image, model, digest, plan, amp, progress)
                for image in self.pictures(grey=grey)
            ]
        found = self._features[made_from]
        if found[0].key.device != plan.store:
            moved = [
                ReferenceFeatures(key.to(plan.store), tuple(v.to(plan.store) for v in values))
                for key, values in found
            ]
            self._features[made_from] = found = moved
        return found

    def _features_of(
        self,
        image: Image,
        model: TTSR,
        digest: str,
        plan: Plan,
        amp: torch.dtype | None,
        progress: Progress | None,
    ) -> ReferenceFeatures:
        if self._cache is None:
            return _make(image, model, plan, amp, progress)
        told = {
            "format": _FORMAT,
            "picture": _digest_of_picture(image),
            "weights": digest,
            "textures": str(amp),
        }
        name = hashlib.sha256("".join(told.values()).encode()).hexdigest()[:32]
        path = self._cache / f"{name}.safetensors"
        if path.is_file():
            features = _read(path, told, image, plan)
            if features is not None:
                return features
        features = _make(image, model, plan, amp, progress)
        _write(path, told, features)
        return features


def _checked(image: Image, name: str) -> Image:
    if min(image.size) < _LEAST:
        raise ValueError(
            f"{name} must have at least one patch of {_LEAST}x{_LEAST} pixels, "
            f"got {image.size[1]}x{image.size[0]}"
        )
    return image


def _make(
    image: Image,
    model: TTSR,
    plan: Plan,
    amp: torch.dtype | None,
    progress: Progress | None,
) -> ReferenceFeatures:
    weight = model.MainNet.SFE.conv_head.weight
    ref, refsr = (x.to(weight.dtype) for x in reference_pair(image, (0, 0), torch.device("cpu")))
    return reference_features(model, ref, refsr, plan, amp, progress)


def _digest_of_picture(image: Image) -> str:
    pixels = image.pixels
    told = hashlib.sha256(f"{pixels.dtype} {pixels.shape} ".encode())
    told.update(pixels.tobytes())
    return told.hexdigest()


def _digest_of_weights(model: TTSR) -> str:
    """Of the texture extractor, on which alone the features of a reference depend."""
    told = hashlib.sha256()
    for name, x in model.LTE.state_dict().items():
        told.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        told.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def _read(path: Path, told: dict[str, str], image: Image, plan: Plan) -> ReferenceFeatures | None:
    """Features from a file, None (and a message) if it does not hold them."""
    grid = [size // SCALE for size in image.size]
    try:
        with _safetensors().safe_open(path, "pt") as file:
            if file.metadata() != told:
                raise ValueError("it is of another picture or model")
            tensors = [file.get_tensor(name) for name in _NAMES]
        for x, scale in zip(tensors, (1, 4, 2, 1), strict=True):
            if list(x.shape[2:]) != [scale * size for size in grid]:
                raise ValueError("it holds maps of another size")
    except Exception as error:  # what safetensors raises is no subclass of anything else
        _logger.warning("the cache file %s is made anew: %s", path, error)
        return None
    key, *values = (x.to(plan.store) for x in tensors)
    return ReferenceFeatures(key, tuple(values))


def _write(path: Path, told: dict[str, str], features: ReferenceFeatures) -> None:
    """The file appears whole or not at all; features are of use without it, too."""
    maps = (features.key, *features.values)
    tensors = {name: x.cpu().contiguous() for name, x in zip(_NAMES, maps, strict=True)}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _safetensors().torch.save_file(tensors, unfinished, metadata=told)
        os.replace(unfinished, path)
    except Exception as error:  # as above; a full disk, for one
        _logger.warning("the cache file %s could not be written: %s", path, error)
    finally:
        unfinished.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("a cache needs safetensors: pip install 'ttsr-fast[cli]'") from error
    return safetensors
