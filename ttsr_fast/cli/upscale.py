"""`ttsr-fast upscale`: larger images."""

from pathlib import Path
from typing import Annotated

import typer

from ttsr_fast.cli.common import (
    Amp,
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
    flag,
    loading,
)


def upscale_command(
    lr: Annotated[
        list[Path], typer.Argument(metavar="LR", help="Images to upscale, or folders of them.")
    ],
    ref: References = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Instead of --ref: a folder with a reference of each image's name.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File for one image; a folder for several.",
            show_default="beside LR, by --suffix",
        ),
    ] = None,
    weights: Weights = None,
    method: Method = None,
    phases: Phases = None,
    device: Device = None,
    amp: Amp = None,
    compiled: Annotated[
        bool,
        flag("--compile", help="For ttsr: fuse operations, a minute once for many small images."),
    ] = False,
    max_memory: MaxMemory = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="PIXELS",
            help="For ttsr: side of a window on LR, which does not change the result.",
            show_default="what fits",
        ),
    ] = None,
    show_plan: Annotated[bool, flag("--plan", help="Show the memory plan, and stop.")] = False,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For ttsr: keeps features of references."),
    ] = None,
    resume: Annotated[
        bool,
        flag("--resume", help="Skip images with a result that is up to date."),
    ] = False,
    suffix: Annotated[
        str, typer.Option(metavar="TEXT", help="Added to the names of results.")
    ] = "_x4",
    ext: Annotated[
        str,
        typer.Option(
            metavar="png|jpg|...|auto",
            help="auto: as LR, or png where that cannot hold it.",
        ),
    ] = "auto",
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Upscale images, or all images of folders, four times.

    Every patch of an image takes the best of all references. Existing files are replaced when their
    successors are complete; inputs are never replaced.

    A failure of one of several images does not stop the others; all failures are listed at the end.
    A hidden file .ttsr-fast.jsonl beside the results records the sources of each. Later runs into
    that folder do not take these results as inputs.

    --resume keeps a whole result of the same LR, references, weights, options and version. Compared
    options: --method, --phases, --amp and --precision. Every other result is made again, with a
    line that says why.

    Exit codes: 0 all done, 1 some of several images failed, 2 bad input, 130 Ctrl-C.
    """
    with errors_in_one_line(_before_all):
        with loading(_before_all):
            from ttsr_fast.cli.batch import Batch, made_from, show_plans
            from ttsr_fast.cli.inputs import ReferenceOptions, memory_limit, upscale_options
            from ttsr_fast.upscaling import memory

        references = ReferenceOptions(ref, pairs, cache)
        batch = Batch(lr, output, references, suffix, ext, resume, quiet)
        common = made_from(weights, phases, amp, precision)  # before the weights are read
        options = upscale_options(weights, method, phases, device, backend, precision)
        if cache is not None and weights is None:
            raise ValueError("--cache is for --method ttsr, with --weights")
        if compiled and weights is None:
            raise ValueError("--compile is for --method ttsr, with --weights")
        if compiled:
            options["model"].MainNet.compile()  # at the first image; windows go without
        options |= {"amp": amp, "max_memory": memory_limit(max_memory), "tile": tile}
        if max_memory is None:
            memory.keep_freed_memory()
        if show_plan:
            return show_plans(batch.sources, references, options)
        batch.prepare(weights, common)
    batch.run(options)


def _before_all() -> str:
    return " before the first image"
