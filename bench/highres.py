"""Time and peak memory of `ttsr-fast upscale` at high resolution.

    python bench/highres.py           480x270 to 1920x1080, 10 minutes and 10 GB
    python bench/highres.py --quick   60x40 to 240x160, half a minute

The picture is scikit-image's stereo pair, resized: the left view reduced four
times is enlarged with the right view as reference, by the method "detail" and
by TTSR as published with random weights, which take as long as any. Peak memory
is that of the whole process, PyTorch included. Every result of TTSR is held
against that of its networks run at once, without windows: 99.9 % of its values
must be within 1. What the original form would need is said, not run.

Writes `highres.json` into the folder `--out`. Exits with status 1 if a result
was wrong, a process failed, or one took more memory than it was given.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import numpy as np
import tables
import terminal
import torch
from rich.console import Console
from skimage.data import stereo_motorcycle

from ttsr_fast import TTSR
from ttsr_fast.images import Image, downscale, read_image, resize
from ttsr_fast.model import save_model
from ttsr_fast.upscaling.memory import parse_bytes

SIZE, QUICK_SIZE = (1080, 1920), (160, 240)
LIMITS = ("6GiB", "3GiB")  # of TTSR
QUICK_LIMITS = ("700M",)
CLOSE, SHARE = 1, 0.999  # of 255; of all values


def make_files(size: tuple[int, int], folder: Path) -> None:
    """`low.png`, `ref.png` and `random.pth`."""
    left, right, _ = stereo_motorcycle()
    Image(downscale(resize(left, size))).save(folder / "low.png")
    Image(resize(right, size)).save(folder / "ref.png")
    torch.manual_seed(0)
    save_model(TTSR(), folder / "random.pth")


def run_once(folder: Path, options: list[str], threads: int) -> dict[str, Any]:
    """Seconds and peak memory of the command in a process of its own."""
    command = [sys.executable, "-m", "ttsr_fast", "upscale", "low.png", "--ref", "ref.png"]
    command += ["--quiet", "-o", "out.png", *options]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    message = process.stderr.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        return {"status": "failed", "reason": message.splitlines()[-1] if message else str(status)}
    return {"status": "ok", "seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def difference(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The share of values that are equal, and close, of two pictures."""
    off = np.abs(a.astype(int) - b)
    return {"equal": float(np.mean(off == 0)), "close": float(np.mean(off <= CLOSE))}


def original_bytes(size: tuple[int, int]) -> int:
    """The matrix of scores alone, in float32, that the original form makes."""
    return 4 * (size[0] * size[1] // 16) ** 2


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Every run, its row written as soon as it is there."""
    data: dict[str, Any] = {
        "kind": "highres",
        "machine": harness.machine(),
        "size": args.size,
        "original_bytes": original_bytes(args.size),
        "rows": [],
    }
    runs = [("detail", None), ("ttsr", None)] + [("ttsr", limit) for limit in args.limits]
    with TemporaryDirectory() as name, terminal.progress_bar(console) as progress:
        folder = Path(name)
        task = progress.add_task("", total=len(runs))
        make_files(args.size, folder)
        truth = None
        for method, limit in runs:
            progress.update(task, description=f"{method} {limit or ''}")
            options = ["--weights", "random.pth"] if method == "ttsr" else []
            if method == "ttsr":
                options += ["--max-memory", limit] if limit else ["--tile", str(max(args.size))]
            row = {"method": method, "limit": limit, **run_once(folder, options, args.threads)}
            if row["status"] == "ok":
                picture = read_image(folder / "out.png").pixels
                if method == "ttsr":
                    truth = picture if truth is None else truth
                    row |= difference(picture, truth)
                if row.get("close", 1) < SHARE:
                    row |= {"status": "failed", "reason": f"only {row['close']:.2%} are close"}
                elif limit and row["peak_bytes"] > parse_bytes(limit):
                    row |= {"status": "failed", "reason": "it took more than it was given"}
            data["rows"].append(row)
            harness.write_json(args.out / "highres.json", data)
            progress.advance(task)
    return data


def main(argv: list[str] | None = None) -> int:
    """Measure, report; 1 if anything was wrong."""
    parser = terminal.parser(__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a small picture")
    add("--limits", nargs="+", metavar="SIZE", help=f"of TTSR; default: {' '.join(LIMITS)}")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("out"), help="folder for the results")
    args = parser.parse_args(argv)
    args.size = QUICK_SIZE if args.quick else SIZE
    args.limits = args.limits or list(QUICK_LIMITS if args.quick else LIMITS)
    console = terminal.console()
    data = run(args, console)
    console.print(tables.highres_table(data))
    return int(any(row["status"] != "ok" for row in data["rows"]))


if __name__ == "__main__":
    sys.exit(main())
