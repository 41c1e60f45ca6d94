"""`ttsr-fast match`: the origin of every patch."""

import time
from pathlib import Path
from typing import Annotated

import typer

from ttsr_fast.cli.common import (
    Backend,
    Device,
    MaxMemory,
    Method,
    Phases,
    Precision,
    Quiet,
    References,
    Weights,
    errors_in_one_line,
    loading,
    progress_bar,
    report,
)


def match_command(
    lr: Annotated[Path, typer.Argument(metavar="LR", help="Image to upscale.")],
    ref: References,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File for the sheet.")
    ],
    weights: Weights = None,
    method: Method = None,
    phases: Phases = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Show the origin of each patch of an image.

    The sheet shows the image, its references, the position of every match and its similarity.
    """
    start = time.perf_counter()
    with errors_in_one_line():
        with loading():
            import numpy as np

            from ttsr_fast import images
            from ttsr_fast.cli.inputs import ReferenceOptions, memory_limit, upscale_options
            from ttsr_fast.datasets import check_other_file
            from ttsr_fast.upscaling import upscale
            from ttsr_fast.visualize import draw_match

        references = ReferenceOptions(ref, None, None)
        check_other_file(output, [lr, *references.files(lr), *([weights] if weights else [])])
        images.check_output(output, images.Image(np.empty((1, 1, 3), np.uint8)))
        options = upscale_options(weights, method, phases, device, backend, precision)
        low, bank = images.read_image(lr), references.bank(lr)
        with progress_bar("matching", 1, quiet) as (_, progress_of):
            result = upscale(
                low,
                bank,
                max_memory=memory_limit(max_memory),
                progress=progress_of(lr.name),
                **options,
            )
            sheet = draw_match(low, bank.images(grey=False), *result)
        sheet.save(output)
    report(output, sheet, start, quiet)
