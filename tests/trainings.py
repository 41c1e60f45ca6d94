"""Small trainings for tests, in this process and in others."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ttsr_fast.images import Image
from ttsr_fast.training.config import Config, load_config
from ttsr_fast.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
# Narrow and on small images, with the code path of the preset.
SMALL = (
    *("num_res_blocks=1+1+1+1", "n_feats=4", "size=16", "batch_size=2", "crops_per_photo=3"),
    *(
        "start=random",
        "lr_rate=1e-3",
        "lr_rate_lte=1e-4",
        "decay=null",
        "gamma=0.5",
        "ema=null",
        "num_epochs=1",
    ),
)
# The adversarial loss needs 32 pixels; with an average and all losses that need no VGG19.
FULL = ("adv_w=1e-3", "tpl_w=1e-2", "size=32", "ema=0.9", "num_init_epochs=1", "decay=1")


def photographs(folder: Path, count: int = 2) -> Path:
    """Images with detail of several sizes."""
    folder.mkdir()
    for number in range(count):
        y, x = np.mgrid[:64, :72]
        waves = [np.sin((x + number) / a) + np.cos((y - number * x / 9) / a) for a in (2, 5, 11)]
        Image((np.stack(waves, 2) * 60 + 127).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def configuration(data: Path, out: Path, *settings: str) -> Config:
    """The preset `tiny`, smaller."""
    return load_config("tiny", [*SMALL, f"data.root={data}", f"run.out={out}", *settings])


def program(data: Path, out: Path, *arguments: str, settings: tuple[str, ...] = ()) -> list[str]:
    """Command of a training with `configuration`."""
    options = [x for setting in (*SMALL, *settings) for x in ("--set", setting)]
    return [
        *(sys.executable, "-m", "ttsr_fast", "train", "tiny"),
        *("--data", str(data), "--out", str(out), *options, *arguments),
    ]


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,  # so that a signal can reach all its processes, and no other
    )


def join_group() -> None:
    """Set the environment of a launcher, in a process that is in a group already."""
    if dist.is_initialized():
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(zip(names, (rank, rank, size, size), strict=True))
        os.environ["OMP_NUM_THREADS"] = "1"


def not_finite_in_the_last(config: Config) -> None:
    """A training with NaN in the images of its last process."""
    join_group()
    trainer = Trainer(config)
    if dist.get_rank() == dist.get_world_size() - 1:
        batches = trainer.batches
        trainer.batches = lambda: ({**x, "hr": x["hr"] * float("nan")} for x in batches())
    trainer.run()


def gradients(config: Config, steps: int = 1) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of both networks in the last step, and its losses, over all processes."""
    join_group()
    trainer = Trainer(config)
    for batch, _ in zip(trainer.batches(), range(steps), strict=False):
        losses = trainer.step(batch, full=True)
    networks = {"G": trainer.networks.ttsr, "D": trainer.networks.discriminator}
    assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    return {
        f"{which}.{name}": x.grad.clone()
        for which, network in networks.items()
        if network is not None
        for name, x in network.named_parameters()
        if x.grad is not None
    }, losses


def run_training(config: Config) -> int:
    """Number of steps of a training, in this process or a group."""
    join_group()
    return Trainer(config).run().step
