"""`ttsr-fast upscale --cache --resume`, killed at random moments: same results as without kills.

    python -m tests.campaigns.kill_and_resume --kills 40 --seed 0

In each round a folder is upscaled into a new folder. The program is killed at random moments and
started again, until a last run finishes. After some of the kills a file of the cache, a result or
the record is truncated or gets one bit flipped. Then every result must equal, byte for byte, the
result of a run without kill and cache; every file of the cache must be whole; no other file may be
left; and another run must keep all results. The moments of the kills depend on the machine, so a
seed repeats the choices only.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ttsr_fast.images import Image
from ttsr_fast.model import TTSR, save_model

RECORD = ".ttsr-fast.jsonl"
EARLY = 0.1  # share of the kills before the first file
DAMAGED = 0.3  # share of the kills after which a file is damaged
ROUND = 8  # maximum number of kills in a round
LIMIT = 120  # seconds of a run


class Folder:
    """Inputs of the program, and runs of it.

    Args:
        path: an empty folder.
        count: images to upscale.
        seed: of their pixels.
    """

    def __init__(self, path: Path, count: int, seed: int) -> None:
        self.path, self.count = path, count
        rng = np.random.default_rng(seed)
        for name, number, size in (("lows", count, (18, 22)), ("refs", 3, (60, 64))):
            (path / name).mkdir()
            for n in range(number):
                rough = rng.integers(0, 256, (*(-(-side // 4) for side in size), 3), np.uint8)
                pixels = rough.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]]
                Image(pixels).save(path / name / f"{n}.png")
        torch.manual_seed(seed)
        save_model(TTSR((1, 1, 1, 1), 4), path / "tiny.pt")

    def start(self, output: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ttsr_fast", "upscale", "lows", "--ref", "refs"]
        command += ["--weights", "tiny.pt", "--output", output, *options]
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def finish(self, output: str, *options: str) -> tuple[str, str]:
        """Output and errors of an undisturbed run."""
        process = self.start(output, *options)
        printed, errors = process.communicate(timeout=LIMIT)
        check(process.returncode == 0, f"exit code {process.returncode}: {errors}")
        return printed, errors

    def has_begun(self, process: subprocess.Popen, output: str) -> bool:
        """Wait until a run has written a file; False if it ends before."""
        known = set(self.written(output))
        while process.poll() is None:
            if set(self.written(output)) - known:
                return True
            time.sleep(0.001)
        return False

    def written(self, output: str) -> list[Path]:
        folders = (self.path / output, self.path / "cache")
        return [file for folder in folders if folder.is_dir() for file in folder.iterdir()]

    def check_results(self, output: str, expected: str) -> None:
        names = {f"{n}_x4.png" for n in range(self.count)}
        found = {path.name for path in (self.path / output).iterdir()}
        check(found == names | {RECORD}, f"the output holds {sorted(found)}")
        for name in sorted(names):
            same = (self.path / output / name).read_bytes() == (
                self.path / expected / name
            ).read_bytes()
            check(same, f"{output}/{name} differs from an unkilled run")

    def check_cache(self) -> None:
        files = list((self.path / "cache").iterdir())
        check(len(files) == 3, f"the cache holds {sorted(path.name for path in files)}")
        for path in files:
            content = path.read_bytes()
            digest = hashlib.sha256(content[:-32]).digest()
            check(content[-32:] == digest, f"{path.name} is damaged")


def campaign(kills: int, seed: int, count: int = 24) -> Counter[str]:
    """Rounds until the program was killed `kills` times; counts of all events.

    Raises:
        AssertionError: a result differs, or a file is left behind.
    """
    rng, happened = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(Path(name), count, seed)
        begin = time.monotonic()
        process = folder.start("expected")
        begun = folder.has_begun(process, "expected")
        startup = time.monotonic() - begin
        _, errors = process.communicate(timeout=LIMIT)
        check(begun and process.returncode == 0, f"the program says {errors}")
        working = time.monotonic() - begin - startup
        while happened["kills"] < kills:
            happened["rounds"] += 1
            output = f"out{happened['rounds']}"
            if rng.random() < 0.5:
                for path in (folder.path / "cache").glob("*"):
                    path.unlink()
            for _ in range(min(ROUND, kills - happened["kills"])):
                early = rng.random() < EARLY
                left = folder.count - len(list((folder.path / output).glob("*_x4.png")))
                longest = startup if early else working * max(left, 1) / folder.count
                wait = rng.uniform(0, 0.7 * longest)  # a run that ends before is no kill
                if not _killed(folder, output, early, wait, happened):
                    happened["runs that ended before their kill"] += 1
                    break
                happened["kills"] += 1
                happened["kills before the first file"] += early
                if rng.random() < DAMAGED:
                    happened[_damage(rng, folder.written(output))] += 1
            # A run that keeps all results would not read the cache, which may be damaged.
            (folder.path / output / "0_x4.png").unlink(missing_ok=True)
            _, errors = folder.finish(output, "--cache", "cache", "--resume")
            happened["files of the cache that were made again"] += errors.count(" is made again: ")
            folder.check_results(output, "expected")
            folder.check_cache()
            again = folder.finish(output, "--cache", "cache", "--resume")
            kept = f"kept {count} of {count} results, which are up to date\n"
            check(again == (kept, ""), f"one more run says {again}")
    return happened


def _killed(folder: Folder, output: str, early: bool, wait: float, happened: Counter[str]) -> bool:
    """Kill a run after a time; False if it ends before."""
    process = folder.start(output, "--cache", "cache", "--resume")
    if early or folder.has_begun(process, output):
        time.sleep(wait)
    process.kill()
    _, errors = process.communicate()
    happened["files of the cache that were made again"] += errors.count(" is made again: ")
    check(process.returncode in (0, -signal.SIGKILL), f"the program says {errors}")
    return process.returncode != 0


def _damage(rng: random.Random, files: list[Path]) -> str:
    """Damage a file; description of the damage."""
    files = [path for path in files if path.suffix != ".part" and path.stat().st_size > 0]
    if not files:
        return "no file to damage"
    kind = rng.choice(sorted({path.suffix for path in files}))
    path = rng.choice([path for path in files if path.suffix == kind])
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if rng.random() < 0.5:
        content[at] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        return f"bits flipped in {kind}"
    path.write_bytes(content[:at])
    return f"ends cut from {kind}"


def check(right: bool, fault: str) -> None:
    if not right:
        raise AssertionError(fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for what, number in campaign(arguments.kills, arguments.seed).items():
        print(f"{number:4} {what}")


if __name__ == "__main__":
    main()
