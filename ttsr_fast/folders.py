"""Which files a command reads, and where it writes: images, folders of them, names of results."""

import re
from collections.abc import Iterable
from pathlib import Path

from ttsr_fast import images
from ttsr_fast.files import shown
from ttsr_fast.images import SUFFIXES, Image

ENDINGS = ", ".join(suffix[1:] for suffix in SUFFIXES)


def pictures_in(path: Path) -> list[Path]:
    """An image by itself, or the images of a folder, frame 10 after frame 9.

    Of a folder, names that begin with a dot are left out, and what is no regular file.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder without images.
    """
    if not path.exists():
        raise FileNotFoundError(f"cannot read {shown(path)}: no such file or folder")
    if not path.is_dir():
        return [path]
    found = [file for file in path.iterdir() if _is_image(file)]
    if not found:
        raise ValueError(f"{shown(path)} holds no images ({ENDINGS})")
    return sorted(found, key=_natural)


def _is_image(path: Path) -> bool:
    """By its name alone. What begins with a dot is hidden, or what macOS leaves beside a file."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that compares runs of decimal digits, of any script, as numbers; unique for a name."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part) if n % 2 else 0, part) for n, part in enumerate(parts)]


def namesake(source: Path, folder: Path) -> Path:
    """The image in a folder with the name of `source`, at least without its suffix.

    Raises:
        ValueError: there is none, or there are several.
    """
    if (folder / source.name).is_file():
        return folder / source.name
    cases = (str.lower, str.upper, lambda suffix: f".{suffix[1:].capitalize()}")
    endings = [case(suffix) for suffix in SUFFIXES for case in cases]
    paths = [folder / (source.stem + ending) for ending in endings]
    found = [path for path in paths if path.is_file()]
    count = len(identities(found))  # some file systems take both cases for one name
    if count != 1:
        raise ValueError(
            f"{shown(source)} has {count} references in {shown(folder)}, one is expected"
        )
    return found[0]


def result_path(source: Path, low: Image, output: Path | None, suffix: str, ext: str) -> Path:
    """Where the result for `source` goes: `output`, or a file in it or beside `source`."""
    if output is not None and not output.is_dir():
        return output
    ending = f".{ext}"
    if ext == "auto":
        ending = ".png" if images.why_not_in(source.suffix, low) else source.suffix
    return (output or source.parent) / (source.stem + suffix + ending)


def check_other_file(path: Path, files: Iterable[Path]) -> None:
    """Raise ValueError if `path` is one of these files, also by another name or a link to it."""
    if path.exists() and identity(path) in identities(files):
        raise ValueError(f"cannot write {shown(path)}: it is an input")


def identities(files: Iterable[Path]) -> set[tuple[int, int]]:
    """`identity` of the files that exist."""
    return {identity(file) for file in files if file.exists()}


def identity(path: Path) -> tuple[int, int]:
    """Device and number of a file, equal for all its names."""
    status = path.stat()
    return status.st_dev, status.st_ino
