"""Checkpoints, model files and configurations, damaged at random: noticed, or the same values.

    python -m tests.campaigns.damage_checkpoints --tries 300 --seed 0

In each try one file is damaged in one of several ways. Reading it must end soon: with one error of
one line that names the file, or with exactly the tensors and numbers of the file before. A YAML
file has no checksum: there the result must be an error of one line or a configuration that can be
written and read again.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.trainings import configuration, photographs
from ttsr_fast.model import load_model, save_model
from ttsr_fast.model.checkpoint import read_tensors
from ttsr_fast.training.checkpoints import LAST, load_checkpoint
from ttsr_fast.training.config import SETTINGS, load_config, to_yaml
from ttsr_fast.training.trainer import train

LIMIT = 20.0  # seconds to read a file of 3 MB
Read = Callable[[Path], Any]


def flip(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: rng.choice((rng.randrange(len(content)), len(content) - 1))])


def lose(content: bytearray, rng: random.Random) -> bytes:
    """A sector is zero, or left out."""
    start = rng.randrange(len(content))
    return bytes(content[:start] + bytes(rng.choice((0, 512))) + content[start + 512 :])


def append(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content) + rng.randbytes(rng.choice((1, 100)))


def headed(content: bytearray, rng: random.Random) -> bytes:
    """A flipped bit where formats describe themselves: in the first or the last kilobyte."""
    size = min(len(content), 1024)
    place = rng.choice((rng.randrange(size), len(content) - 1 - rng.randrange(size)))
    content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


DAMAGES = (flip, flip, headed, cut, lose, append)


def same(x: Any, y: Any) -> bool:
    """Equal to the bit, however deep."""
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return type(x) is type(y) and bool(x == y)


def readers(folder: Path) -> list[tuple[Path, Read]]:
    """Files of a small training in this folder, and functions that read each of them."""
    data = photographs(folder / "photographs")
    config = configuration(data, folder / "out", "crops_per_photo=1")
    train(config)
    save_model(load_model(folder / "out" / LAST), folder / "model.pt")

    def model(path: Path) -> dict[str, torch.Tensor]:
        return dict(load_model(path).state_dict())

    return [
        (folder / "out" / LAST, lambda path: load_checkpoint(path, config)),
        (folder / "out" / LAST, model),
        (folder / "model.pt", model),
        (folder / "model.pt", read_tensors),
        (folder / "out" / "model.safetensors", model),
        (folder / "out" / "model.safetensors", read_tensors),
        (folder / "out" / SETTINGS, load_config),
    ]


def outcome(path: Path, read: Read, right: Any) -> str:
    """What reading a damaged file ends with; AssertionError if it may not end so."""
    start = time.monotonic()
    try:
        found = read(path)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        assert "\n" not in message, message
        if path.suffix != ".yaml":  # where a key may be named instead
            assert str(path) in message, message
        result = "noticed"
    else:
        if path.suffix == ".yaml":
            (path.with_name("again.yaml")).write_text(to_yaml(found))
            assert load_config(path.with_name("again.yaml")) == found
            result = "same" if found == right else "another configuration"
        else:
            assert same(found, right), f"{path} has changed, and nothing is said"
            result = "same"
    assert time.monotonic() - start < LIMIT, f"{time.monotonic() - start:.0f} s"
    return result


def campaign(tries: int, seed: int) -> Counter[str]:
    """How often each file ended how; AssertionError at the first that ends in another way."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        whole = [(path, read, read(path)) for path, read in readers(Path(name))]
        (Path(name) / "damaged").mkdir()
        for number in range(tries):
            path, read, right = whole[number % len(whole)]
            damage = rng.choice(DAMAGES)
            damaged = Path(name) / "damaged" / path.name
            damaged.write_bytes(damage(bytearray(path.read_bytes()), rng))
            try:
                counts[f"{path.name}: {outcome(damaged, read, right)}"] += 1
            except Exception as error:
                which = f"try {number} of seed {seed}, {damage.__name__} of {path.name}"
                raise AssertionError(f"{which}: {error}") from error
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for ending, count in sorted(campaign(arguments.tries, arguments.seed).items()):
        print(f"{count:5} {ending}")
