"""The files that a training learns from: their names and sizes, and what has changed."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ttsr_fast.files import shown, write_bytes
from ttsr_fast.training.items import Items
from ttsr_fast.training.photographs import Photographs

FILES = "training-files.json"  # in the folder of a training
_NAMED = 3


class File(NamedTuple):
    """A file of the data.

    Attributes:
        name: relative to the folder that all of its kind are in, so that data can be moved.
        size: in bytes; None for a file that cannot be looked at.
    """

    name: str
    size: int | None


def data_files(items: Items) -> list[File]:
    """All files in the order in which items take them."""
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
    """Record of the files for a checkpoint: their number and a digest, and no names."""
    return {"count": len(files), "sha256": hashlib.sha256(_encoded(files)).hexdigest()}


def write_list(files: Sequence[File], folder: Path) -> None:
    """Write the list that `difference` reads.

    Raises:
        OSError: it cannot be written.
    """
    write_bytes(folder / FILES, _encoded(files))


def difference(files: Sequence[File], before: dict[str, Any], folder: Path) -> str:
    """Changes since `before`, a summary, in words; empty if there are none.

    Args:
        files: those of now.
        before: of a checkpoint.
        folder: of the checkpoint. Without a list of that time there, no names are given.
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


def _files(paths: Iterable[Path]) -> list[File]:
    absolute = [path.absolute() for path in paths]
    parents = {path.parent for path in absolute}
    common = Path(os.path.commonpath(parents)) if parents else Path()
    sizes = {path: _size(path) for path in set(absolute)}
    return [File(path.relative_to(common).as_posix(), sizes[path]) for path in absolute]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say so
        return None


def _encoded(files: Sequence[File]) -> bytes:
    return json.dumps(files, separators=(",", ":")).replace("],[", "],\n[").encode()


def _some(names: Sequence[str]) -> str:
    return ", ".join([*map(shown, names[:_NAMED]), *["..."] * (len(names) > _NAMED)])
