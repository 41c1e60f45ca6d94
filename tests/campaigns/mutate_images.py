"""Image files with random damage: each gives an image, or one error line that names the file.

    python -m tests.campaigns.mutate_images --tries 1500 --seed 0

A try is a valid file with a few changes: flipped bits, cut or inserted bytes, extreme numbers in
its fields, chunks and tags that change places. `read_image` and the command line get every file,
but the command line none that has become large. Both run in a process of its own, with limited
memory, that is started again after a hang or a crash. A fault is printed with its number;
`--first NUMBER --tries 1` repeats it.
"""

import argparse
import io
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.image_samples import noise, png, tiff

ROOT = Path(__file__).parents[2]
LIMIT = 20  # seconds for a file
MEMORY = 16 * 2**30  # bytes of addresses, most of which the libraries only reserve
SMALL = 64 * 64  # pixels of an image that is upscaled
EXTREMES = [0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1]


def samples() -> dict[str, bytes]:
    """Valid files of every format, by name."""
    import tifffile
    from PIL import Image

    colour, grey = noise(13, 17, 3), noise(13, 17, 1)
    deep, profile = noise(13, 17, 3, dtype=np.uint16), bytes(range(128))
    found = {
        "grey.png": png(grey, 0),
        "colour.png": png(colour, 2, (b"gAMA", b"\0\0\xb1\x8f"), (b"tEXt", b"a\0b")),
        "palette.png": png(grey % 3, 3, (b"PLTE", bytes(9)), (b"tRNS", b"\0\x7f")),
        "deep.png": png(deep, 2, (b"iCCP", b"icc\0\0" + zlib.compress(profile))),
        "deepgrey.png": png(deep[..., :1], 0, (b"tRNS", b"\0\7")),
        "deepalpha.png": png(noise(13, 17, 4, dtype=np.uint16), 6),
        "grey.tif": tiff(grey, 8, 1),
        "white.tif": tiff(deep[..., :1], 16, 0, order=">"),
        "twelve.tif": tiff(deep >> 4, 12, 2, compressed=True),
        "alpha.tif": tiff(deep[..., :2], 16, 1, (338, 3, (2,)), (274, 3, (6,))),
    }

    def save(name: str, array: np.ndarray, mode: str | None = None, **options: Any) -> None:
        buffer = io.BytesIO()
        image = Image.fromarray(array if array.shape[2] > 1 else array[..., 0])
        image = image.convert(mode) if mode else image
        image.save(buffer, **options)
        found[name] = buffer.getvalue()

    exif = Image.Exif()
    exif[274] = 6
    save("colour.jpg", colour, format="JPEG", exif=exif, icc_profile=profile)
    save("progressive.jpg", colour, format="JPEG", progressive=True, restart_marker_blocks=1)
    save("grey.jpg", grey, format="JPEG")
    save("ink.jpg", colour, "CMYK", format="JPEG")
    save(
        "frames.jpg", colour, format="MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    save("lossy.webp", colour, format="WEBP", exif=exif, icc_profile=profile)
    save("alpha.webp", noise(13, 17, 4), format="WEBP", lossless=True)
    save("colour.bmp", colour, format="BMP")
    save("bits.bmp", grey, "1", format="BMP")
    save("palette.bmp", grey, "P", format="BMP")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        save(f"{compression}.tif", colour, format="TIFF", compression=compression)
    save("group4.tif", grey, "1", format="TIFF", compression="group4")
    for name, options in (
        ("strips", {"compression": "lzw", "predictor": True, "rowsperstrip": 4}),
        ("tiles", {"compression": "zlib", "tile": (16, 16)}),
        ("big", {"bigtiff": True}),
        ("planes", {"planarconfig": "separate"}),
    ):
        buffer = io.BytesIO()
        pixels = np.moveaxis(deep, 2, 0) if name == "planes" else deep
        tifffile.imwrite(buffer, pixels, photometric="rgb", **options)  # type: ignore[arg-type]
        found[f"{name}.tif"] = buffer.getvalue()
    return found


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes; most hit the first bytes, where formats have their fields."""
    changes = (_flip, _cut, _insert, _extreme, _extreme, _swap, _repeat)
    for _ in range(rng.integers(1, 4)):
        if len(content) > 8:
            content = changes[rng.integers(len(changes))](content, rng)
    return _checksums(content) if content[:4] == b"\x89PNG" and rng.random() < 0.7 else content


def _place(content: bytes, rng: np.random.Generator) -> int:
    reach = len(content) if rng.random() < 0.4 else min(len(content), 320)
    start = len(content) - reach if rng.random() < 0.2 else 0  # a directory may come last
    return start + int(rng.integers(reach))


def _flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        changed[_place(content, rng)] ^= 1 << rng.integers(8)
    return bytes(changed)


def _cut(content: bytes, rng: np.random.Generator) -> bytes:
    at = _place(content, rng)
    return (
        content[:at] if rng.random() < 0.5 else content[:at] + content[at + rng.integers(1, 40) :]
    )


def _insert(content: bytes, rng: np.random.Generator) -> bytes:
    at, count = _place(content, rng), int(rng.integers(1, 40))
    middle = bytes(count) if rng.random() < 0.3 else rng.bytes(count)
    return content[:at] + middle + content[at:]


def _extreme(content: bytes, rng: np.random.Generator) -> bytes:
    """A number of 1, 2, 4 or 8 bytes in either order."""
    size = int(rng.choice([1, 2, 4, 8]))
    number = EXTREMES[rng.integers(len(EXTREMES))] & (256**size - 1)
    order = ("little", "big")[rng.integers(2)]
    at = _place(content, rng)
    return content[:at] + number.to_bytes(size, order) + content[at + size :]


def _swap(content: bytes, rng: np.random.Generator) -> bytes:
    """Two parts change places: chunks of PNG, or 12 bytes each, as tags of TIFF have."""
    parts = _chunks(content) if content[:4] == b"\x89PNG" else []
    if len(parts) > 2:
        a, b = rng.integers(len(parts), size=2)
        parts[a], parts[b] = parts[b], parts[a]
        return content[:8] + b"".join(parts)
    a, b = sorted(_place(content, rng) for _ in range(2))
    if b - a < 12:
        return content
    left, right = content[a : a + 12], content[b : b + 12]
    return content[:a] + right + content[a + 12 : b] + left + content[b + 12 :]


def _repeat(content: bytes, rng: np.random.Generator) -> bytes:
    parts = _chunks(content) if content[:4] == b"\x89PNG" else []
    if parts:
        at = rng.integers(len(parts))
        return content[:8] + b"".join((*parts[:at], parts[at] * 2, *parts[at + 1 :]))
    at, count = _place(content, rng), int(rng.integers(1, 64))
    return content[: at + count] + content[at:]


def _chunks(content: bytes) -> list[bytes]:
    parts, at = [], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        parts.append(content[at:end])
        at = end
    return parts


def _checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the right checksum, so that their content is looked at."""
    parts = [
        part[:-4] + zlib.crc32(part[4:-4]).to_bytes(4, "big") if len(part) >= 12 else part
        for part in _chunks(content)
    ]
    return content[:8] + b"".join(parts)


# --- in the process that reads --------------------------------------------------------------------


def serve() -> None:
    """For every path on the standard input, one line: what became of it."""
    from ttsr_fast.images import decode

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.filterwarnings("ignore", module=r"PIL\.")  # the program decides whether to show them
    decode.pillow()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where the other process looks for it
    for line in sys.stdin:
        number, name = line.split()
        try:
            outcome = _outcome(Path(name), int(number))
        except BaseException:  # any is a fault, and is reported as one
            outcome = f"FAULT {traceback.format_exc(limit=-2)}"
        answers.write(outcome.replace("\n", "\\n") + "\n")
        answers.flush()


def _outcome(path: Path, number: int) -> str:
    from ttsr_fast.images import Image, read_image

    size, outcome = 0, "image"
    try:
        image = read_image(path)
    except (ValueError, OSError) as error:
        outcome, message = "error", str(error)
        if not message.startswith(f"cannot read {path}: ") or not message.isprintable():
            return f"FAULT message {message!r}"
    else:
        size = image.size[0] * image.size[1]
        assert isinstance(image, Image)
        assert image.pixels.dtype in (np.uint8, np.uint16)
        assert image.pixels.shape[2] in (1, 3)
        assert size > 0
        assert image.alpha is None or image.alpha.shape == image.size
    if size <= SMALL:
        fault = _fault_of_command(path, number % 4, outcome == "image")
        return f"FAULT {fault}" if fault else f"{outcome}, command"
    return outcome


def _fault_of_command(path: Path, kind: int, good: bool) -> str | None:
    """What is wrong with the command's outcome, None if nothing is."""
    from typer.testing import CliRunner

    from ttsr_fast.cli.commands import app

    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        folder = Path(name)
        sound, out = path.parent / "sound.png", folder / "out.png"
        (folder / "in").mkdir()
        for image in (sound, path):
            (folder / "in" / image.name).symlink_to(image)
        command = (
            ("upscale", path, "--ref", sound, "--phases", "1", "-o", out),
            ("match", sound, "--ref", path, "--phases", "1", "-o", out),
            ("upscale", folder / "in", "--ref", sound, "--phases", "1", "-o", folder / "out"),
            ("eval", folder / "in", "--layout", "urban100", "--method", "bicubic", "--skip"),
        )[kind]
        result = CliRunner().invoke(app, list(map(str, command)))
        if not (result.exception is None or isinstance(result.exception, SystemExit)):
            return f"{command[0]}: traceback, {result.exception!r}"
        errors = result.stderr.splitlines()
        if not all(line.startswith("error: ") and line.isprintable() for line in errors):
            return f"{command[0]}: printed {result.stderr!r}"
        if (result.exit_code != 0) != bool(errors) or result.exit_code not in (0, 1, 2):
            return f"{command[0]}: exit code {result.exit_code} with {errors}"
        if not good and not any(path.name in line for line in errors):
            return f"{command[0]}: {errors} without the name"
        if kind < 2 and out.exists() != (result.exit_code == 0):
            return f"{command[0]}: exit code {result.exit_code}, result {out.exists()}"
        left = [str(file) for file in folder.rglob("*.part")]
        return f"{command[0]}: left {left}" if left else None


# --- in the process that looks on -----------------------------------------------------------------


class _Reader:
    """A process that reads files, started when it is needed."""

    def __init__(self, folder: Path) -> None:
        self._printed = folder / "printed"
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def outcome(self, number: int, path: Path) -> str:
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(f"{number} {path}\n")
        process.stdin.flush()
        try:
            answer = self._answers.get(timeout=LIMIT)
        except queue.Empty:
            self.end()
            return f"FAULT no answer in {LIMIT} s"
        if not answer:
            code = process.wait()
            self._process = None
            return f"FAULT the process ended with {code}: {self._printed.read_text()[-200:]!r}"
        printed = self._printed.read_text()
        if printed:
            os.truncate(self._printed, 0)
            return f"FAULT it printed {printed!r}"
        return answer.strip()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._answers = queue.Queue()
            with open(self._printed, "a+") as printed:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.campaigns.mutate_images", "--serve"],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            arguments = (self._process.stdout, self._answers)
            threading.Thread(target=_pass_on, args=arguments, daemon=True).start()
        return self._process

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _pass_on(stream: io.TextIOBase, answers: "queue.Queue[str]") -> None:
    for line in stream:
        answers.put(line)
    answers.put("")  # the end


def campaign(folder: Path, tries: int, seed: int = 0, first: int = 0) -> Iterator[tuple[int, str]]:
    """Number and outcome of every try: image, error or a text that begins with FAULT."""
    valid = samples()
    (folder / "sound.png").write_bytes(png(noise(48, 48, 3), 2))
    reader = _Reader(folder)
    try:
        for number in range(first, first + tries):
            rng = np.random.default_rng([seed, number])
            name = sorted(valid)[rng.integers(len(valid))]
            path = folder / f"{number}-{name}"
            path.write_bytes(mutated(valid[name], rng))
            yield number, f"{reader.outcome(number, path)} ({name})"
            path.unlink()
    finally:
        reader.end()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tries", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, outcome in campaign(Path(folder), options.tries, options.seed, options.first):
            counts[outcome.partition(" (")[0] if not outcome.startswith("FAULT") else "FAULT"] += 1
            if outcome.startswith("FAULT"):
                print(number, outcome, flush=True)
    print(dict(counts))
    return 1 if counts["FAULT"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
