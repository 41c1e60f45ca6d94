"""Which files a command reads, and where it writes: pictures, folders of them, names of results."""

import re
from collections.abc import Sequence
from pathlib import Path

from ttsr_fast import images
from ttsr_fast.images import SUFFIXES, Image

ENDINGS = ", ".join(suffix[1:] for suffix in SUFFIXES)


def pictures_in(path: Path) -> list[Path]:
    """A picture by itself, or those of a folder, frame 10 after frame 9.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder without pictures.
    """
    if not path.exists():
        raise FileNotFoundError(f"cannot read {path}: no such file or folder")
    if not path.is_dir():
        return [path]
    found = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
    if not found:
        raise ValueError(f"{path} holds no pictures ({ENDINGS})")
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """A key that compares runs of digits as numbers."""
    parts = re.split(r"(\d+)", path.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def namesake(source: Path, folder: Path) -> Path:
    """The picture in a folder with the name of `source`, at least without its suffix.

    Raises:
        ValueError: there is none, or there are several.
    """
    if (folder / source.name).is_file():
        return folder / source.name
    found = [folder / (source.stem + suffix) for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"{source} has {len(found)} references in {folder}, one is expected")
    return found[0]


def result_path(source: Path, low: Image, output: Path | None, suffix: str, ext: str) -> Path:
    """Where the result for `source` goes: `output`, or a file in it or beside `source`."""
    if output is not None and not output.is_dir():
        return output
    ending = f".{ext}"
    if ext == "auto":
        ending = ".png" if images.why_not_in(source.suffix, low) else source.suffix
    return (output or source.parent) / (source.stem + suffix + ending)


def check_result(path: Path, low: Image, read: Sequence[Path], written: Sequence[Path]) -> None:
    """Raise before the work is done if a result cannot be written, or is a file of this run."""
    if path.resolve() in {other.resolve() for other in (*read, *written)}:
        raise ValueError(f"cannot write {path}: it is an input or another result")
    images.check_output(path, low)
