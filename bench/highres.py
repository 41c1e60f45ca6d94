"""Time and peak memory of `ttsr-fast upscale` at high resolution.

    python bench/highres.py           480x270 to 1920x1080, 10 minutes and 10 GB
    python bench/highres.py --quick   60x40 to 240x160, half a minute

scikit-image's stereo pair, resized, by the method "detail" and by TTSR as
published with random weights. Peak memory is that of the whole process. 99.9 %
of the values of TTSR must be within 1 of its networks run at once, without
windows. Exits with status 1 if a result was wrong, a process failed, or one took
more memory than its limit.
"""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import runner
import torch
from machine import CPU, ROOT, write_json
from skimage.data import stereo_motorcycle

from ttsr_fast import TTSR
from ttsr_fast.images import Image, downscale, read_image, resize
from ttsr_fast.model import save_model
from ttsr_fast.upscaling.memory import parse_bytes

SIZE, QUICK_SIZE = (1080, 1920), (160, 240)
LIMITS, QUICK_LIMITS = ["6GiB", "3GiB"], ["1100M"]  # of TTSR
CLOSE, SHARE = 1, 0.999  # of 255; of all values


def make_files(size: tuple[int, int], folder: Path) -> None:
    """`low.png`, `ref.png` and `random.pth`."""
    left, right, _ = stereo_motorcycle()
    Image(downscale(resize(left, size))).save(folder / "low.png")
    Image(resize(right, size)).save(folder / "ref.png")
    torch.manual_seed(0)
    save_model(TTSR(), folder / "random.pth")


def run_once(folder: Path, options: list[str]) -> dict[str, Any]:
    """Seconds and peak memory of the command in a process of its own."""
    low, ref, out = (str(folder / name) for name in ("low.png", "ref.png", "out.png"))
    command = [sys.executable, "-m", "ttsr_fast", "upscale", low, "--ref", ref, "-o", out]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--quiet", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    message = process.stderr.read().strip()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status != 0:
        return {"status": "failed", "reason": message.splitlines()[-1] if message else str(status)}
    return {"status": "ok", "median_s": seconds, "peak_bytes": usage.ru_maxrss * 1024}


def judged(row: dict[str, Any], image: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """The row of a run of TTSR with the shares of equal and close values."""
    off = np.abs(image.astype(int) - truth)
    row = {**row, "equal": float(np.mean(off == 0)), "close": float(np.mean(off <= CLOSE))}
    if row["close"] < SHARE:
        return row | {"status": "failed", "reason": f"only {row['close']:.2%} are close"}
    if row["limit"] and row["peak_bytes"] > parse_bytes(row["limit"]):
        return row | {"status": "failed", "reason": "it took more memory than its limit"}
    return row


def rows(size: tuple[int, int], limits: list[str], folder: Path) -> Any:
    """Every run, by name."""
    make_files(size, folder)
    truth = None
    for method, limit in [("detail", None), ("ttsr", None), *(("ttsr", x) for x in limits)]:
        options = ["--weights", str(folder / "random.pth")] if method == "ttsr" else []
        if method == "ttsr":
            options += ["--max-memory", limit] if limit else ["--tile", str(max(size))]
        row = {"method": method, "limit": limit, **run_once(folder, options)}
        if row["status"] == "ok" and method == "ttsr":
            image = read_image(folder / "out.png").pixels
            truth = image if truth is None else truth
            row = judged(row, image, truth)
        yield "-".join(filter(None, (method, limit))), row


def main(argv: list[str] | None = None) -> int:
    """Measure and show; 1 if anything was wrong."""
    args = runner.parser(__doc__).parse_args(argv)
    runner.set_threads(args.threads)  # of the command, too
    size, limits = (QUICK_SIZE, QUICK_LIMITS) if args.quick else (SIZE, LIMITS)
    data = runner.document("highres", CPU, {})
    # The matrix of scores alone, in float32, of the original form.
    case = {"size": size, "original_bytes": 4 * (math.prod(size) // 16) ** 2}
    data["cases"] = [{"operation": "upscale", **case, "rows": {}}]
    with TemporaryDirectory() as folder:
        for name, row in rows(size, limits, Path(folder)):
            data["cases"][0]["rows"][name] = row
            write_json(args.out / "highres.json", data)
    return runner.show(data)


if __name__ == "__main__":
    sys.exit(main())
