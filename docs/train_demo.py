"""Train a small TTSR from scratch on photographs, and show what it has learnt.

    python docs/train_demo.py                      15 minutes on two CPU cores
    python docs/train_demo.py --photos FOLDER      on photographs of your own
    python docs/train_demo.py --set num_epochs=80  as `ttsr-fast train --set`

Without --photos the photographs are those of `photographs.py`, fetched once.
Every sixth of your own is held out. The training is the preset `tiny`; its
result, checkpoints and TensorBoard's logs go to `train` in the folder `--out`,
and the demonstration, run again, goes on where it was stopped.

Writes `train-demo.json` and `train-demo.png` into `--out`: PSNR (RGB) on
held-out photographs after every epoch, beside bicubic upscaling, and
some of their parts. Exits with status 1 if the model is not better than bicubic
in the end.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import photographs
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ttsr_fast.images import from_tensor
from ttsr_fast.model import load_model
from ttsr_fast.training.config import Config, load_config
from ttsr_fast.training.monitor import psnr, upscaled
from ttsr_fast.training.photographs import Photographs, held_out
from ttsr_fast.training.trainer import MODELS, State, train

sys.path.insert(0, str(Path(__file__).resolve().parent / "draw"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import machine
import plots

EVERY = 6  # of one's own photographs is held out
SIDE, SEED = 128, 5  # of the parts that are drawn
PANELS = ("bicubic", "TTSR", "reference", "truth")


def split(args: argparse.Namespace, console: Console) -> tuple[list[Path], list[Path], list[Path]]:
    """Photographs to train with, to validate with, and of these the ones to draw."""
    if args.photos is not None:
        training, validation = held_out(args.photos, EVERY)
        return training, validation, validation[:3]
    with console.status("fetching photographs"):
        files = photographs.collect(args.out / "photographs")
    validation = [file for file in files if file.name in photographs.HELD_OUT]
    shown = [file for file in files if file.name in photographs.SHOWN]
    return [file for file in files if file not in validation], validation, shown


def linked(files: Sequence[Path], folder: Path) -> str:
    """A folder of these files alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for file in files:
        (folder / file.name).symlink_to(file.resolve())
    return str(folder)


def trained(config: Config, console: Console) -> State:
    """Train or resume; the bar shows losses and time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("training", total=None)

        def on_progress(state: State) -> None:
            text = f"training  loss {state.losses['total']:.4f}"
            bar.update(task, total=state.total, completed=state.step, description=text)

        return train(config, resume=True, progress=on_progress)


def history(logs: Path) -> dict[str, Any]:
    """PSNR of every epoch, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logs))
    events.Reload()
    scalars = {name: events.Scalars(f"psnr/{name}") for name in ("psnr", "bicubic")}
    return {
        "steps": [point.step for point in scalars["psnr"]],
        "psnr": [point.value for point in scalars["psnr"]],
        "bicubic": scalars["bicubic"][-1].value,
    }


def parts(model: torch.nn.Module, files: Sequence[Path]) -> list[dict[str, Any]]:
    """One of every photograph: the images of `PANELS`, and PSNR for the first two."""
    items = Photographs(
        files, size=SIDE, crops_per_photo=1, unrelated=0, augment=False, seed=SEED, longest=1000
    )
    found = []
    for number in range(len(items)):
        batch = {name: x[None] for name, x in items[number].items()}
        images = (batch["lrsr"], upscaled(model, batch), batch["ref"], batch["hr"])
        qualities = [psnr(x[0], images[3][0]) for x in images[:2]]
        found.append({"images": dict(zip(PANELS, images, strict=True)), "psnr": qualities})
    return found


def draw(data: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    """The curve, and beside it a row for every part."""
    plt = plots.pyplot()
    figure = plt.figure(figsize=(13, 2.15 * len(rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.5])
    axis = left.subplots()
    axis.plot(data["steps"], data["psnr"], color="#0072B2", marker="o", markersize=3)
    axis.axhline(data["bicubic"], color="#D55E00")
    axis.set_title("PSNR on held-out photographs, dB", loc="left")
    axis.set_xlabel("steps")
    last = data["psnr"][-1]
    for y, text, colour in (
        (last, f"TTSR, narrow: {last:.2f}", "#0072B2"),
        (data["bicubic"], f"bicubic: {data['bicubic']:.2f}", "#D55E00"),
    ):
        axis.annotate(
            text, (1, y), (0, 4), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", color=colour,
        )  # fmt: skip
    like = torch.zeros(0, 0, 3, dtype=torch.uint8).numpy()
    for row, axes in zip(rows, right.subplots(len(rows), len(PANELS), squeeze=False), strict=True):
        for column, (name, panel) in enumerate(zip(PANELS, axes, strict=True)):
            panel.imshow(from_tensor(row["images"][name], like))
            quality = f" {row['psnr'][column]:.1f} dB" if column < 2 else ""
            panel.set_title(name + quality, fontsize=9)
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
            panel.spines[:].set_visible(False)
    plots.save(figure, path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Train, show; 1 if bicubic is as good."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="photographs of your own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    args = parser.parse_args(argv)
    console = Console()
    start = time.perf_counter()
    try:
        training, validation, shown = split(args, console)
        config = load_config("tiny", args.settings)
        config.data.root = linked(training, args.out / "train-photographs" / "training")
        config.data.validation = linked(validation, args.out / "train-photographs" / "held-out")
        config.run.out = str(args.out / "train")
        state = trained(config, console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    if state.signal:
        console.print(f"stopped after step {state.step}; run it again to go on")
        return 128 + state.signal
    data: dict[str, Any] = {
        "kind": "train-demo",
        "machine": machine.facts(),
        "photographs": {"training": len(training), "held out": len(validation)},
        "seconds": time.perf_counter() - start,
        **history(args.out / "train" / "logs"),
    }
    model = load_model(args.out / "train" / MODELS[1])  # the average
    draw(data, parts(model, shown), args.out / "train-demo.png")
    machine.write_json(args.out / "train-demo.json", data)
    last, bicubic = data["psnr"][-1], data["bicubic"]
    console.print(
        f"{state.step} steps in {data['seconds'] / 60:.1f} minutes: {last:.2f} dB on held-out "
        f"photographs, bicubic {bicubic:.2f} dB\n{args.out / 'train-demo.png'}"
    )
    return int(last <= bicubic)


if __name__ == "__main__":
    sys.exit(main())
