"""Files of tensors, `.safetensors` or of `torch.save`: damage is detected, no code is run.

`torch.load` does not verify the checksums of a file, and safetensors has none. Here checksums are
written to both, and verified where a file has them.
"""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttsr_fast.files import refusal, replacing, shown
from ttsr_fast.optional import optional

_DIGEST = "ttsr_fast.sha256"  # in the metadata of a .safetensors file


def load(path: str | os.PathLike[str]) -> Any:
    """The content of a file, on the CPU: tensors, numbers, strings, and containers of them.

    Args:
        path: `.safetensors`, or any other suffix for a file written by `torch.save`.

    Raises:
        RuntimeError: the file cannot be read, is damaged or holds other Python objects, or
            safetensors is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise RuntimeError(f"cannot read {path}: no such file")
    safetensors = _safetensors() if path.suffix == ".safetensors" else None
    try:
        content = _load_safetensors(path, safetensors) if safetensors else _load_pickled(path)
    except Damaged as error:
        raise RuntimeError(f"cannot read {path}: it is damaged ({error})") from error
    except Exception as error:  # damaged files raise errors of almost any type
        if isinstance(error, OSError) and (reason := refusal(error)) is not None:
            raise RuntimeError(f"cannot read {path}: {reason}") from error
        raise RuntimeError(
            f"cannot read {path}: it is damaged, is no checkpoint, or holds Python objects beside "
            "tensors, which are not loaded because they can run code"
        ) from error
    return content


def save(content: Mapping[str, Any], path: Path) -> None:
    """Write a file, whole or not at all.

    Args:
        content: for `.safetensors` contiguous tensors by name; otherwise containers of tensors,
            numbers and strings.
        path: in a folder that exists; the suffix is as for `load`.

    Raises:
        OSError: the file cannot be written.
        RuntimeError: safetensors is not installed.
    """
    if path.suffix == ".safetensors":  # safetensors' save_file hides the file from others
        # One entry of metadata alone: safetensors writes several in a random order.
        data = _safetensors().save(content, {_DIGEST: _digest(content)})
        with replacing(path) as file:
            file.write(data)
    else:
        with replacing(path) as file:
            torch.save(content, file)


class Damaged(Exception):
    """Wrong checksum or size."""


def _load_safetensors(path: Path, safetensors: Any) -> dict[str, Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    if metadata.get(_DIGEST, digest := _digest(tensors)) != digest:
        raise Damaged("the checksum of its tensors is wrong")
    return tensors


def _load_pickled(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(path: Path) -> None:
    """Verify the checksums of the records, and that they need no more memory than the file."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise Damaged("its records are larger than the file")
        if any(record.CRC for record in records):  # torch can be set to write zeros
            try:
                bad = archive.testzip()
            except RuntimeError as error:  # such as an encrypted record
                raise Damaged(str(error)) from error
            if bad is not None:
                raise Damaged(f"the checksum of {shown(bad)} is wrong")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, types, shapes and values, independent of their order."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode("utf-8", "surrogatepass"))
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _safetensors() -> Any:
    message = "a .safetensors file needs the package safetensors: pip install safetensors"
    return optional("safetensors.torch", message, RuntimeError)
