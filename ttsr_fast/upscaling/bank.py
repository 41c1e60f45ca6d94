"""Reference bank: references for many images, their features made once or read from a cache."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, Image, as_image, to_grey
from ttsr_fast.model import TTSR
from ttsr_fast.model.windowed import empty_map
from ttsr_fast.upscaling.detail import reference_pair
from ttsr_fast.upscaling.execution import Execution
from ttsr_fast.upscaling.feature_cache import FeatureCache, Map
from ttsr_fast.upscaling.plan import LEAST_TILE, Plan
from ttsr_fast.upscaling.ttsr import ReferenceFeatures, reference_features

_FORMAT = "ttsr-fast reference features, version 2"
LEAST_REFERENCE = 3 * SCALE  # pixels along each side: one patch of the search


class ReferenceBank:
    """References for repeated use by `upscale`, for the frames of a video or a folder.

    Features for method "ttsr" are made at the first use and stay in memory: 8 KB (in float32) for
    every 4x4 pixels. With a `cache` they are also written to a safetensors file per reference, and
    read the next time, also by other processes. The cache does not change a bit of any result.

    A file is used only for the same reference image, weights of the texture extractor, type of its
    convolutions, version of PyTorch, kind of processor and number of threads: each of these can
    change the last bit of a feature. The file is read into memory and its digest verified. A
    damaged file is made again and replaced, with a log message; so a cache can be deleted any time.
    If the folder cannot be written to, one log message says so.

    Args:
        refs: a reference, or several in a list or tuple, each of any type that `upscale` accepts.
        cache: a folder for features, made if it does not exist; None keeps them in memory alone.

    Raises:
        TypeError, ValueError: no reference, one that is too small; and as `images.as_image`.
        OSError: the folder cannot be made.
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
            _checked(as_image(ref, name), name) for ref, name in zip(given, names, strict=True)
        ]
        self._grey: list[Image] | None = None
        self._features: dict[tuple[Any, ...], list[ReferenceFeatures]] = {}
        self._cache = None if cache is None else FeatureCache(cache)

    def images(self, *, grey: bool) -> list[Image]:
        """The references, in grey or as given."""
        if not grey:
            return self._colour
        if self._grey is None:
            self._grey = [Image(to_grey(image.pixels)) for image in self._colour]
        return self._grey

    pictures = images  # the former name

    @property
    def has_features(self) -> bool:
        """True if features are in memory."""
        return bool(self._features)

    def features(
        self, model: TTSR, plan: Plan, execution: Execution, *, grey: bool
    ) -> list[ReferenceFeatures]:
        """Features for `model` on `plan.store`; see `reference_features`."""
        made_from = {
            "format": _FORMAT,
            "weights": _digest(model.LTE.state_dict().items()),
            "convolutions": str(execution.amp),
            "computed": _numerics(model, plan, self.images(grey=grey)),
        }
        key = (grey, *made_from.values())
        if key not in self._features:
            self._features[key] = [
                self._features_of(image, model, plan, execution, made_from)
                for image in self.images(grey=grey)
            ]
        found = self._features[key]
        if found[0].key.device != plan.store:
            found = [
                ReferenceFeatures(_on(plan.store, key), tuple(_on(plan.store, v) for v in values))
                for key, values in found
            ]
            self._features[key] = found
        return found

    def _features_of(
        self,
        image: Image,
        model: TTSR,
        plan: Plan,
        execution: Execution,
        made_from: dict[str, str],
    ) -> ReferenceFeatures:
        """Features of one reference, from the cache if it has them."""
        dtype = model.dtype
        ref, refsr = (x.to(dtype) for x in reference_pair(image, (0, 0), torch.device("cpu")))
        if self._cache is None:
            return reference_features(model, ref, refsr, plan, execution)
        made_from = {**made_from, "image": _digest([("ref", ref), ("refsr", refsr)])}
        expected = _maps(image, dtype, execution.amp)
        maps = self._cache.read(made_from, expected)
        if maps is not None:
            key, *values = (_on(plan.store, x) for x in maps)
            return ReferenceFeatures(key, tuple(values))
        features = reference_features(model, ref, refsr, plan, execution)
        made = (features.key, *features.values)
        self._cache.write(made_from, dict(zip(expected, made, strict=True)))
        return features


def _checked(image: Image, name: str) -> Image:
    if min(image.size) < LEAST_REFERENCE:
        raise ValueError(
            f"{shown(name)} must have at least one patch of {LEAST_REFERENCE}x{LEAST_REFERENCE} "
            f"pixels, got {image.size[1]}x{image.size[0]}"
        )
    return image


def _maps(image: Image, dtype: torch.dtype, amp: torch.dtype | None) -> dict[str, Map]:
    """The features of a reference, in the order of `ReferenceFeatures`."""
    rows, columns = (size // SCALE for size in image.size)
    values = amp or dtype
    return {
        "key": Map(dtype, 256, rows, columns),
        "lv1": Map(values, 64, 4 * rows, 4 * columns),
        "lv2": Map(values, 128, 2 * rows, 2 * columns),
        "lv3": Map(values, 256, rows, columns),
    }


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, types, shapes and values."""
    hasher = hashlib.sha256()
    for name, x in tensors:
        hasher.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        hasher.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _numerics(model: TTSR, plan: Plan, references: list[Image]) -> str:
    """Other facts that can change the last bit of a feature.

    Windows count only where they are small on the CPU, as `plan.LEAST_TILE` explains. A GPU may
    round otherwise in other windows, with a cache and without.
    """
    device = model.device
    facts = [torch.__version__, device.type]
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), str(torch.backends.cudnn.version())]
        facts.append(_precision(torch.backends.cudnn))
    if device.type == "cpu":
        facts.append(torch.backends.cpu.get_cpu_capability())
        facts.append(f"{torch.get_num_threads()} threads")
        facts.append(_precision(torch.backends.mkldnn))
        largest = max(max(image.size) for image in references) // SCALE
        if plan.tiles["LTE"] < min(LEAST_TILE, largest):
            facts.append(f"windows of {plan.tiles['LTE']}")
    return ", ".join(facts)


def _precision(library: Any) -> str:
    """Precision of float32 convolutions in a library."""
    if hasattr(library, "conv"):  # from torch 2.9 on
        return library.conv.fp32_precision
    return f"{torch.get_float32_matmul_precision()} {torch.backends.cudnn.allow_tf32}"


def _on(store: torch.device, x: Tensor) -> Tensor:
    """A map on `store`, with the layout of one made there: rounding depends on the layout."""
    return x if x.device == store else empty_map(tuple(x.shape), x.dtype, store).copy_(x)
