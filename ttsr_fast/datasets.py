"""Image files and folders, and the layouts of the field's data sets.

Shared by commands, training and evaluation: names of inputs and results, 8-bit RGB of a file, and
TTSR's degradation.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ttsr_fast import images
from ttsr_fast.choices import LAYOUTS
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, SUFFIXES, Image

_LONGEST_LIST = 2**24  # bytes


class Pair(NamedTuple):
    """A high-resolution image and its references.

    Attributes:
        name: unique in its data set, for tables.
        hr: the ground truth.
        references: best first where the data set orders them. Without any the LR image itself, at
            LR size, is the reference.
    """

    name: str
    hr: Path
    references: tuple[Path, ...]


# Returns the references of an image.
_Finder = Callable[[Path], tuple[Path, ...]]


def find_pairs(
    root: str | os.PathLike[str],
    layout: str,
    *,
    references: int | Sequence[int] | str | os.PathLike[str] | None = None,
) -> list[Pair]:
    """Pairs of a data set on disk, image 10 after image 9; no image is opened.

    | layout | images | references |
    | --- | --- | --- |
    | `cufed` | `train/input` | of the same name in `train/ref` |
    | `cufed5` | `test/CUFED5/NNN_0.png` | `NNN_1.png`, most similar, to `NNN_5.png` |
    | `sun80` | `Sun_Hays_SR_groundtruth` | `Sun_Hays_SR_scenematches/NAME.jpg/`, about 20 each |
    | `urban100` | `image_SRF_4/*_HR.png`, `HR`, or the folder itself | none, or a list |
    | `manga109` | as `urban100` | as `urban100` |
    | `folders` | the folder itself | an image, or a folder of several, of the same name |

    Names match with their suffix or without. The first folder of `train/input` and `test/CUFED5`,
    or both, may be left out: `root` is then the folder inside.

    Args:
        root: the folder of the data set.
        layout: one of the above.
        references: for `cufed5` and `sun80` the number of the reference, or several, from 1 on in
            natural order (defaults: 1, and all of them). For `urban100` and `manga109` a text file
            in UTF-8; each line holds the name of an image and the names of its references in the
            same folder, separated by blanks or tabs. The default is none, as in the paper. For
            `folders` the folder of references, which is required. `cufed` takes none.

    Raises:
        FileNotFoundError, NotADirectoryError: `root`, or a folder of references.
        TypeError, ValueError: an unknown layout, `references` it does not take, a folder without
            images; images without their references: the message names the first and counts the
            others.
    """
    finders = {"cufed": _cufed, "cufed5": _cufed5, "sun80": _sun80, "folders": _folders}
    finders |= dict.fromkeys(("urban100", "manga109"), _alone)
    if layout not in finders:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    sources, find = finders[layout](_existing(Path(root)), references)
    stems = Counter(hr.stem for hr in sources)
    pairs, faults = [], []
    for hr in sources:
        name = hr.stem if stems[hr.stem] == 1 else hr.name
        try:
            pairs.append(Pair(name.removesuffix("_0" * (layout == "cufed5")), hr, find(hr)))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        others = f" (the first of {len(faults)} such images)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{others}")
    return pairs


def read_rgb(path: Path) -> np.ndarray:  # [H, W, 3] uint8
    """Pixels of a file in the form of TTSR's training: grey repeated, 8 bits, without alpha.

    Raises: all errors of `images.read_image`.
    """
    pixels = images.read_image(path).pixels
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def degrade(
    pixels: np.ndarray,  # [H, W, 3] uint8
) -> tuple[np.ndarray, np.ndarray]:  # [H // 4, W // 4, 3], [H, W, 3] uint8
    """`lr`, the image reduced four times, and `lrsr`, upscaled to the original size."""
    height, width = pixels.shape[:2]
    low = images.resize(pixels, (height // SCALE, width // SCALE))
    return low, images.resize(low, (height, width))


def _cufed(root: Path, references: object) -> tuple[list[Path], _Finder]:
    if references is not None:
        raise TypeError(f"references is not for layout 'cufed', got {references!r}")
    folder = _inside(root, "train/input", "input")
    return images_in(folder), partial(_of_that_name, _existing(folder.parent / "ref"))


def _cufed5(root: Path, references: object) -> tuple[list[Path], _Finder]:
    numbers = _numbers(1 if references is None else references)
    folder = _inside(root, "test/CUFED5", "CUFED5", ".")
    sources = [path for path in images_in(folder) if path.stem.endswith("_0")]
    if not sources:
        raise ValueError(f"{shown(folder)} holds no images named NNN_0")
    if max(numbers) > 5:
        raise ValueError(f"references must be among 1 to 5, got {max(numbers)}")

    def numbered(hr: Path, number: int) -> Path:
        name = f"{hr.stem.removesuffix('0')}{number}"
        try:
            return namesake(hr.with_name(name + hr.suffix), folder)
        except ValueError:
            raise ValueError(
                f"{shown(hr)} has no reference {shown(name)}, or several of that name"
            ) from None

    def find(hr: Path) -> tuple[Path, ...]:
        return tuple(numbered(hr, number) for number in numbers)

    return sources, find


def _sun80(root: Path, references: object) -> tuple[list[Path], _Finder]:
    numbers = None if references is None else _numbers(references)
    folder = _existing(root / "Sun_Hays_SR_scenematches")

    def find(hr: Path) -> tuple[Path, ...]:
        found = _of_that_name(folder, hr)
        if numbers is not None and max(numbers) > len(found):
            raise ValueError(
                f"{shown(hr)} has {len(found)} references, and no number {max(numbers)}"
            )
        return found if numbers is None else tuple(found[n - 1] for n in numbers)

    return images_in(_existing(root / "Sun_Hays_SR_groundtruth")), find


def _alone(root: Path, references: object) -> tuple[list[Path], _Finder]:
    folder = _inside(root, "image_SRF_4", "HR", ".")
    sources = images_in(folder)
    sources = [path for path in sources if path.stem.endswith("_HR")] or sources
    if references is None:
        return sources, lambda hr: ()
    if not isinstance(references, str | os.PathLike):
        raise TypeError(f"references must be a text file or None, got {references!r}")
    listed = _listed(Path(references))

    def find(hr: Path) -> tuple[Path, ...]:
        found = tuple(folder / name for name in listed.get(hr.name, ()))
        if not found:
            raise ValueError(f"{shown(hr)} has no reference in {shown(references)}")
        for path in found:
            if not path.is_file():
                raise ValueError(f"{shown(hr)} has a reference that is not there: {shown(path)}")
        return found

    return sources, find


def _listed(path: Path) -> dict[str, list[str]]:
    """Lines of a list: the first word of each, and the others.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or not in UTF-8, a name leads out of the folder, or an image has
            two lines.
    """
    if not path.is_file():
        missing = FileNotFoundError if not path.exists() else OSError
        raise missing(f"cannot read {shown(path)}: no such file, or no regular one")
    with open(path, "rb") as file:
        content = file.read(_LONGEST_LIST + 1)
    if len(content) > _LONGEST_LIST:
        raise ValueError(f"{shown(path)} must have at most {_LONGEST_LIST} bytes as a list")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = len(re.findall(b"\r\n|\r|\n", content[: error.start])) + 1
        raise ValueError(f"{shown(path)} must be a text in UTF-8, line {number} is not") from error
    listed = {}
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        words = re.findall(r"[^ \t]+", line)
        for name in words:
            if Path(name).anchor or ".." in Path(name).parts:
                raise ValueError(
                    f"{shown(path)}, line {number}: {shown(name)} leads out of the folder"
                )
        if words and words[0] in listed:
            raise ValueError(f"{shown(path)}, line {number}: {shown(words[0])} has a line before")
        if words:
            listed[words[0]] = words[1:]
    return listed


def _folders(root: Path, references: object) -> tuple[list[Path], _Finder]:
    if not isinstance(references, str | os.PathLike):
        raise TypeError(f"references must be the folder of references, got {references!r}")
    return images_in(root), partial(_of_that_name, _existing(Path(references)))


def _of_that_name(folder: Path, hr: Path) -> tuple[Path, ...]:
    """The image of that name in `folder`, or all images of the folder of that name."""
    for name in (hr.name, hr.stem):
        if (folder / name).is_dir():
            return tuple(images_in(folder / name))
    return (namesake(hr, folder),)


def _existing(folder: Path) -> Path:
    if not folder.exists():
        raise FileNotFoundError(f"cannot read {shown(folder)}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"cannot read {shown(folder)}: it is no folder")
    return folder


def _inside(root: Path, *names: str) -> Path:
    """The first of these folders that exists."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{shown(root)} holds no folder {' or '.join(names)}")


def _numbers(references: object) -> tuple[int, ...]:
    numbers = tuple(references) if isinstance(references, list | tuple | range) else (references,)
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"references must be numbers from 1 on, got {references!r}")
    return numbers


# --- files and folders ---


ENDINGS = ", ".join(suffix[1:] for suffix in SUFFIXES)


def images_in(path: Path) -> list[Path]:
    """An image by itself, or the images of a folder, frame 10 after frame 9.

    In a folder, names that begin with a dot are skipped, and everything but regular files.

    Raises:
        FileNotFoundError: nothing has this name.
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
    """True for a file with the name of an image, and no dot in front, as macOS has beside files."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sort key with runs of decimal digits, of any script, as numbers; unique for a name."""
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
    """Path of the result for `source`: `output`, or a file in it or beside `source`."""
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
