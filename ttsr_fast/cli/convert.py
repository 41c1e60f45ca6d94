"""`ttsr-fast convert`: a checkpoint under another project's names."""

from pathlib import Path
from typing import Annotated

import typer

from ttsr_fast.choices import CHECKPOINTS
from ttsr_fast.cli.common import Quiet, errors_in_one_line, flag, loading, one_of, say
from ttsr_fast.files import shown


def convert_command(
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A TTSR checkpoint of any of these kinds.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write: .pt, .pth or .safetensors.")
    ],
    to: Annotated[
        str | None, one_of(CHECKPOINTS, "Whose names the tensors get.", "official")
    ] = None,
    half: Annotated[
        bool, flag("--half", help="Round to float16; otherwise no bit changes.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint to other names or another format.

    The authors' names to mmagic's, .pt to .safetensors, and back. From a file of a whole training
    only the generator and its texture extractor are kept.
    """
    with errors_in_one_line():
        with loading():
            from ttsr_fast.model import convert_checkpoint

        left_out = convert_checkpoint(source, target, to=to or "official", half=half)
    if quiet:
        return
    say(f"{shown(target)} ({target.stat().st_size / 1e6:.1f} MB)")
    if left_out:
        kinds = sorted({name.split(".")[0] for name in left_out})
        say(f"left out {len(left_out)} tensors: {', '.join(kinds)}")
