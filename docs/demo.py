"""Super-resolve a photograph from another view, without trained weights.

    python docs/demo.py

The pair is scikit-image's `stereo_motorcycle`: the left view, reduced four
times, is the input; the right view is the reference; the left view itself is
the truth. Prints PSNR and SSIM on Y and the time, draws the images side by
side into `--out`, and saves `lr.png`, `ref.png`, `sr.png` and `truth.png`
beside it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from skimage.data import stereo_motorcycle
from torch import Tensor

from ttsr_fast.images import SCALE, Image, downscale, upscale_bicubic
from ttsr_fast.metrics import psnr, ssim
from ttsr_fast.upscaling import upscale

sys.path.insert(0, str(Path(__file__).resolve().parent / "draw"))

import plots

DETAILS = {"#0072B2": (384, 166), "#E69F00": (328, 292)}  # colour of the frame, left and top
DETAIL_SIZE = (132, 88)  # width and height, in the proportions of the image
METHOD = "detail, no weights"
COLUMN, TITLE = 3.1, 0.42  # inches: the width of an image, the height above the first row
Box = tuple[int, int, int, int]  # left, top, right, bottom


def make_pair() -> tuple[Image, Image, Image]:
    """Low resolution, reference and truth."""
    left, right, _ = stereo_motorcycle()
    height, width = (n // SCALE * SCALE for n in left.shape[:2])
    truth = left[:height, :width]
    return Image(downscale(truth)), Image(right), Image(truth)


def matched_box(
    box: Box,
    index: Tensor,  # [h, w], pixels of the reference
    size: tuple[int, int],
) -> Box:
    """The box of the matches in a reference of that size: the box moved by their median offset."""
    left, top, right, bottom = (n // SCALE for n in box)
    y, x = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
    chosen = index[top:bottom, left:right]
    dy = int((chosen // size[1] - SCALE * y).median())
    dx = int((chosen % size[1] - SCALE * x).median())
    dy = min(max(dy, -box[1]), size[0] - box[3])
    dx = min(max(dx, -box[0]), size[1] - box[2])
    return (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy)


def draw(panels: list[tuple[str, Image, list[Box]]], path: Path) -> None:
    """A column per panel: its name, the whole image, and its details in the order of `DETAILS`."""
    plt = plots.pyplot()
    height, width = panels[-1][1].size
    rows, columns = 1 + len(DETAILS), len(panels)
    size = (COLUMN * columns, COLUMN * rows * height / width + TITLE)
    figure, axes = plt.subplots(rows, columns, figsize=size)
    figure.subplots_adjust(0.004, 0.006, 0.996, 1 - TITLE / size[1], wspace=0.025, hspace=0.04)
    for (name, image, boxes), (whole, *details) in zip(panels, axes.T, strict=True):
        whole.set_title(name, fontsize=12, pad=8)
        whole.imshow(image.pixels)
        whole.set_xlim(0, width)
        whole.spines[:].set_visible(False)
        for axis, colour, box in zip(details, DETAILS, boxes, strict=True):
            frame = {"fill": False, "edgecolor": colour, "linewidth": 1.8}
            whole.add_patch(plt.Rectangle(box[:2], *DETAIL_SIZE, **frame))
            left, top, right, bottom = box
            axis.imshow(image.pixels[top:bottom, left:right], interpolation="nearest")
            axis.spines[:].set(visible=True, color=colour, linewidth=2.5)
        for axis in (whole, *details):
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
    plots.save(figure, path, dpi=125)


def main(argv: list[str] | None = None) -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), metavar="FILE")
    args = parser.parse_args(argv)
    lr, ref, truth = make_pair()
    start = time.perf_counter()
    result = upscale(lr, ref, method="detail")
    seconds = time.perf_counter() - start
    sr, bicubic = result.image, Image(upscale_bicubic(lr.pixels))
    scores = {
        name: (psnr(x.pixels, truth.pixels), ssim(x.pixels, truth.pixels))
        for name, x in (("bicubic", bicubic), (METHOD, sr))
    }

    print(f"{'x'.join(map(str, lr.size))} to {'x'.join(map(str, sr.size))}, measured on Y")
    for name, (decibel, similarity) in scores.items():
        print(f"{name:<18} {decibel:.2f} dB   SSIM {similarity:.4f}")
    print(f"{METHOD:<18} {seconds:.2f} s\n")

    boxes = [(x, y, x + DETAIL_SIZE[0], y + DETAIL_SIZE[1]) for x, y in DETAILS.values()]
    matched = [matched_box(box, result.index, ref.size) for box in boxes]
    titles = {name: f"{name}: {decibel:.1f} dB" for name, (decibel, _) in scores.items()}
    panels = [
        (titles["bicubic"], bicubic, boxes),
        (titles[METHOD], sr, boxes),
        ("reference, another view", ref, matched),
        ("truth", truth, boxes),
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, image in (("lr", lr), ("ref", ref), ("sr", sr), ("truth", truth)):
        image.save(args.out.with_name(f"{name}.png"))
    draw(panels, args.out)
    print(f"{args.out}, and beside it lr.png, ref.png, sr.png and truth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
