"""Photographs under free licences to train with, out of packages of Debian and of scikit-image.

Their authors and licences are in the copyright files of the packages (GPL-2+, CC-BY-SA, CC0).
"""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import skimage.data

# Only photographs, and those of them that are not out of focus as a whole.
PACKAGES = {
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk.jpg",
        "Dragonfly_by_Bolly.jpg",
        "Picture_0B_by_freespace.jpg",
        "Picture_1A_by_freespace.jpg",
        "Wine_by_Jakkub_Mede.jpg",
        "aitzgorri_by_Aitzol_Berasategi.jpg",
        "friends_by_Aitzol_Berasategi.jpg",
        "greentock_by_Peter_Nerlich.jpg",
        "life_by_Aitzol_Berasategi.jpg",
        "picosdeeuropa_by_Aitzol_Berasategi.jpg",
        "seeding_by_Clements_Engelhardt.jpg",
        "sunset_by_Aitzol_Berasategi.jpg",
    ),
    "mate-backgrounds": (
        "Blinds.jpg",
        "Dune.jpg",
        "FreshFlower.jpg",
        "Garden.jpg",
        "GreenMeadow.jpg",
        "LadyBird.jpg",
        "RainDrops.jpg",
        "TwoWings.jpg",
        "Wood.jpg",
        "YellowFlower.jpg",
    ),
}
SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "ihc.png", "motorcycle_left.png")
SHOWN = ("astronaut.png", "chelsea.png", "coffee.png")  # in the public domain
HELD_OUT = (*SHOWN, "LadyBird.jpg", "Picture_1A_by_freespace.jpg", "life_by_Aitzol_Berasategi.jpg")


def collect(folder: Path) -> list[Path]:
    """The photographs as files of `folder`; those that are there already are not fetched again.

    Raises:
        OSError: they cannot be fetched, because this is no Debian or it has no network.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, names in PACKAGES.items():
        if not all((folder / name).is_file() for name in names):
            _unpack(package, names, folder)
    for name in SCIKIT_IMAGE:
        if not (folder / name).is_file():
            shutil.copy(Path(skimage.data.__file__).with_name(name), folder / name)
    wanted = {name for names in PACKAGES.values() for name in names} | set(SCIKIT_IMAGE)
    return sorted(folder / name for name in wanted)


def _unpack(package: str, names: tuple[str, ...], folder: Path) -> None:
    """Extract these files of a package; nothing is installed."""
    with TemporaryDirectory() as scratch:
        try:
            _run("apt-get", "download", package, cwd=scratch)
            _run("dpkg-deb", "-x", *map(str, Path(scratch).glob("*.deb")), ".", cwd=scratch)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise OSError(
                f"cannot fetch {package}: {reason}; name a folder of your own with --photos"
            ) from error
        for name in names:
            found = [path for path in Path(scratch).rglob(name) if not path.is_symlink()]
            if len(found) != 1:
                raise OSError(f"{package} holds {len(found)} files {name}, one is expected")
            shutil.copy(found[0], folder / f".{name}")
            (folder / f".{name}").replace(folder / name)


def _run(*command: str, cwd: str) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
