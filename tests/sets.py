"""A data set in small, of a stereo pair: what tests of an evaluation read."""

from pathlib import Path

from skimage.data import stereo_motorcycle

from ttsr_fast.images import Image

_left, _right, _ = stereo_motorcycle()
LEFT, RIGHT = _left[150:350, 250:550], _right[140:360, 190:530]


def save_cufed5(folder: Path, count: int = 3, references: int = 2) -> Path:
    """As CUFED5, with that many pictures and references of each."""
    folder.mkdir(exist_ok=True)
    for n in range(count):
        Image(LEFT[8 * n :, 12 * n :][:48, :60]).save(folder / f"{n:03}_0.png")
        for k in range(1, references + 1):
            Image(RIGHT[8 * n + k :, 12 * n :][:52, :64]).save(folder / f"{n:03}_{k}.png")
    return folder
