"""`ttsr-fast env`: what runs here, and what not and why."""

from typing import Annotated

import torch
import typer

from ttsr_fast import environment
from ttsr_fast.cli.common import errors_in_one_line, say


def env_command(
    build: Annotated[
        bool, typer.Option("--build", help="First compile the kernels, in CUDA if torch has it.")
    ] = False,
) -> None:
    """Show versions, devices, and which backends run here and why others do not."""
    with errors_in_one_line():
        if build:
            _build()
        for name, value in environment.describe():
            say(f"{name:<20} {value}")


def _build() -> None:
    from ttsr_fast import build

    say(f"compiled {build.build_library()}")
    if torch.version.cuda is None:
        return
    reason = build.why_not(cuda=True)
    if reason is None:
        say(f"compiled {build.build_library(cuda=True)}")
    else:
        say(f"left out the kernels in CUDA: {reason}")
