"""Data sets of a configuration, and the record of their files: names, sizes, later changes."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttsr_fast.datasets import find_pairs
from ttsr_fast.files import shown, write_bytes
from ttsr_fast.training.config import Config
from ttsr_fast.training.data import PairDataset
from ttsr_fast.training.photographs import Photographs

FILES = "training-files.json"  # in the folder of a training
_NAMED = 3  # files in a message

Items = PairDataset | Photographs

_logger = logging.getLogger(__name__)


class File(NamedTuple):
    """A file of the training data.

    Attributes:
        name: relative to the common folder of its kind, so that data can be moved.
        size: in bytes; None for a missing file.
    """

    name: str
    size: int | None


def training_items(config: Config) -> Items:
    """Data set in `data.root`.

    Raises:
        ValueError: `data.root` is None; and the errors of the data sets.
    """
    data = config.data
    if data.root is None:
        raise ValueError("data.root is needed: the folder of the training images")
    return _items(config, data.root, data.layout, config.run.seed, data.augment, data.unrelated)


def validation_items(config: Config) -> Items | None:
    """Data set in `data.validation`, with the same related pairs in all epochs, or None."""
    data = config.data
    if data.validation is None:
        return None
    layout = data.validation_layout or data.layout
    return _items(config, data.validation, layout, config.run.seed + 1, False, 0.0)


def _items(
    config: Config, root: str, layout: str, seed: int, augment: bool, unrelated: float | None
) -> Items:
    data = config.data
    common: dict[str, Any] = {
        "size": data.size,
        "augment": augment,
        "seed": seed,
        "on_error": data.on_error,
    }
    if layout == "photographs":
        return Photographs(
            root,
            crops_per_photo=data.crops_per_photo,
            unrelated=unrelated,
            candidates=data.candidates,
            longest=data.longest,
            **common,
        )
    references = data.references if layout == data.layout else None
    return PairDataset(find_pairs(root, layout, references=references), **common)


def data_files(items: Items) -> list[File]:
    """All files of a data set, in the order of its items."""
    if isinstance(items, Photographs):
        return _files(items.files)
    images = _files(pair.hr for pair in items.pairs)
    found = _files(path for pair in items.pairs for path in pair.references)
    references = iter([File(f"references/{name}", size) for name, size in found])
    files = []
    for image, pair in zip(images, items.pairs, strict=True):
        files += [image, *(next(references) for _ in pair.references)]
    return files


def summary(files: Sequence[File]) -> dict[str, Any]:
    """Record of the files for a checkpoint: their number and a digest, without names."""
    return {"count": len(files), "sha256": hashlib.sha256(_encoded(files)).hexdigest()}


def write_list(files: Sequence[File], folder: Path) -> None:
    """Write the list for `difference`.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(folder / FILES, _encoded(files))


def difference(files: Sequence[File], before: dict[str, Any], folder: Path) -> str:
    """Changes since a checkpoint, in words; empty if there are none.

    Args:
        files: current files.
        before: `summary` in the checkpoint.
        folder: of the checkpoint. Without the list that belongs to `before`, no names are given.
    """
    if summary(files) == before:
        return ""
    try:
        listed = [File(*entry) for entry in json.loads((folder / FILES).read_bytes())]
    except (OSError, ValueError, TypeError):
        listed = []
    if summary(listed) != before:
        return f"{before.get('count')} files then, {len(files)} now"
    old, new = dict(listed), dict(files)
    kinds = {
        "gone": [name for name in old if name not in new],
        "new": [name for name in new if name not in old],
        "of another size": [name for name in new if name in old and old[name] != new[name]],
    }
    changes = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    return ", ".join(changes) or "the same files in another order"


def check_unchanged(
    files: Sequence[File], before: dict[str, Any] | None, checkpoint: Path, accept: bool
) -> None:
    """Compare the files with the record in a checkpoint.

    Args:
        files: current files.
        before: `summary` in the checkpoint; None in checkpoints of early versions.
        checkpoint: its file.
        accept: log a warning for changes, instead of an error.

    Raises:
        ValueError: the files have changed.
    """
    changes = difference(files, before, checkpoint.parent) if isinstance(before, dict) else ""
    if changes and not accept:
        raise ValueError(
            f"{checkpoint} was saved with other training files: {changes}; put the old ones back, "
            "or accept them with --set on_change=accept"
        )
    if changes:
        _logger.warning("the training files have changed: %s", changes)


def _files(paths: Iterable[Path]) -> list[File]:
    absolute = [path.absolute() for path in paths]
    parents = {path.parent for path in absolute}
    common = Path(os.path.commonpath(parents)) if parents else Path()
    sizes = {path: _size(path) for path in set(absolute)}
    return [File(path.relative_to(common).as_posix(), sizes[path]) for path in absolute]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # reading it raises with its name
        return None


def _encoded(files: Sequence[File]) -> bytes:
    return json.dumps(files, separators=(",", ":")).replace("],[", "],\n[").encode()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(shown, names[:_NAMED]), *["..."] * (len(names) > _NAMED)])
