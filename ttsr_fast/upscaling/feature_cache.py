"""Features of references on disk, verified when they are read.

Files are safetensors files. They are written and read here, so that no byte is used unchecked and
none is mapped: changes to a file meanwhile must not change an image.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ttsr_fast import files

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DIGEST = hashlib.sha256().digest_size

_logger = logging.getLogger(__name__)
_unwritable: set[Path] = set()  # folders that a message has named


class Map(NamedTuple):
    """Type and size of a map `[1, channels, rows, columns]`."""

    dtype: torch.dtype
    channels: int
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.channels * self.rows * self.columns


class FeatureCache:
    """A folder of files, one for each reference.

    The name of a file is a digest of everything that determines its features. The file holds these
    facts too, then maps `[1, rows, columns, channels]`, and the SHA-256 digest of all before.
    Several processes may use a folder at a time.

    Args:
        folder: made if it does not exist.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        with files.named_errors("make the cache folder", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def read(self, made_from: Mapping[str, str], maps: Mapping[str, Map]) -> list[Tensor] | None:
        """The maps, channels last on the CPU; None without a file that holds them.

        A log message names a file that cannot be used.

        Args:
            made_from: facts that determine the features.
            maps: name, type and size of each.
        """
        path = self._path(made_from)
        try:
            if not path.is_file():
                return None
            with open(path, "rb") as file:
                return _read(file, made_from, maps)
        except (OSError, ValueError) as error:
            reason = files.refusal(error) or error
            _logger.warning("the cache file %s is made again: %s", files.shown(path), reason)
        return None

    def write(self, made_from: Mapping[str, str], maps: Mapping[str, Tensor]) -> None:
        """Write a file. If that fails, one log message for the folder says so."""
        header = _header(made_from, {name: Map(x.dtype, *x.shape[1:]) for name, x in maps.items()})
        hasher = hashlib.sha256(header)
        try:
            with files.replacing(self._path(made_from)) as file:
                file.write(header)
                for x in maps.values():
                    pixels = _bytes(x.permute(0, 2, 3, 1).cpu().contiguous())
                    hasher.update(pixels)
                    file.write(pixels)
                file.write(hasher.digest())
        except OSError as error:
            if self.folder not in _unwritable:
                _unwritable.add(self.folder)
                folder = files.shown(self.folder)
                _logger.warning("features are not kept in %s: %s", folder, error)

    def _path(self, made_from: Mapping[str, str]) -> Path:
        name = hashlib.sha256(json.dumps(dict(made_from)).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"


def _read(file: BinaryIO, made_from: Mapping[str, str], maps: Mapping[str, Map]) -> list[Tensor]:
    """The maps of a file; ValueError for any difference from the expected contents."""
    header = _header(made_from, maps)
    size = len(header) + sum(form.nbytes for form in maps.values()) + _DIGEST
    if os.fstat(file.fileno()).st_size != size:
        raise ValueError(f"it must have {size} bytes, got {os.fstat(file.fileno()).st_size}")
    if file.read(len(header)) != header:
        raise ValueError("it holds no features of this image and model")
    hasher = hashlib.sha256(header)
    pixels = [torch.empty(1, m.rows, m.columns, m.channels, dtype=m.dtype) for m in maps.values()]
    for x in pixels:
        file.readinto(_bytes(x))  # type: ignore[attr-defined]
        hasher.update(_bytes(x))
    if file.read() != hasher.digest():
        raise ValueError("its contents have changed since it was written")
    return [x.permute(0, 3, 1, 2) for x in pixels]


def _header(made_from: Mapping[str, str], maps: Mapping[str, Map]) -> bytes:
    """Bytes in front of the values of a safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(made_from)}
    end = 0

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes

    for name, m in maps.items():
        add(name, _DTYPES[m.dtype], [1, m.rows, m.columns, m.channels], m.nbytes)
    add("sha256", "U8", [1, _DIGEST], _DIGEST)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values are aligned
    return len(text).to_bytes(8, "little") + text


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return x.view(torch.uint8).numpy().data.cast("B")
