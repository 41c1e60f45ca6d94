"""`ttsr-fast upscale`: larger pictures."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ttsr_fast import images, plan
from ttsr_fast.cli.common import (
    BAD_INPUT,
    ERRORS,
    SOME_FAILED,
    Amp,
    Backend,
    Device,
    MaxMemory,
    Method,
    Phases,
    Precision,
    Quiet,
    ReferenceOptions,
    References,
    Weights,
    errors_in_one_line,
    fail,
    memory_limit,
    one_line,
    progress_bar,
    report,
    upscale_options,
)
from ttsr_fast.folders import ENDINGS, check_result, pictures_in, result_path
from ttsr_fast.images import SUFFIXES
from ttsr_fast.upscale import upscale


def upscale_command(
    lr: Annotated[
        Path, typer.Argument(metavar="LR", help="Picture to enlarge, or a folder of them.")
    ],
    ref: References = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Instead of --ref: a folder with a reference of each picture's name."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File or folder.", show_default="beside LR, by --suffix"
        ),
    ] = None,
    weights: Weights = None,
    method: Method = None,
    phases: Phases = None,
    device: Device = None,
    amp: Amp = None,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile", help="For ttsr: fuse operations, a minute once for many small pictures."
        ),
    ] = False,
    max_memory: MaxMemory = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For ttsr: pixels of LR in a window, whose size does not change the result.",
            show_default="what fits",
        ),
    ] = None,
    show_plan: Annotated[
        bool, typer.Option("--plan", help="Show what memory it will take, and stop.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="For ttsr: folder that keeps features of references.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out pictures whose result is there.")
    ] = False,
    suffix: Annotated[str, typer.Option(help="Added to the names of results.")] = "_x4",
    ext: Annotated[
        str, typer.Option(help="png, jpg, ...; auto: as LR, or png where that cannot hold it.")
    ] = "auto",
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Enlarge a picture, or every picture of a folder, four times.

    All references serve every picture, each of its patches with the best of them.

    Existing files are replaced, each when its successor is complete.

    A folder is worked through to its end even if some pictures fail; they are listed then.

    Exit codes: 0 all done, 1 some pictures of a folder failed, 2 bad input.
    """
    with errors_in_one_line():
        sources = pictures_in(lr)
        if ext != "auto" and f".{ext}" not in SUFFIXES:
            raise ValueError(f"--ext must be auto or one of {ENDINGS}, got {ext}")
        options = upscale_options(weights, method, phases, device, backend, precision)
        if cache is not None and weights is None:
            raise ValueError("--cache is for --method ttsr, with --weights")
        if compiled and weights is None:
            raise ValueError("--compile is for --method ttsr, with --weights")
        if compiled:
            options["model"].MainNet.compile()  # at the first picture; windows go without
        options |= {"amp": amp, "max_memory": memory_limit(max_memory), "tile": tile}
        references = ReferenceOptions(ref, pairs, cache)
        if max_memory is None:
            plan.keep_freed_memory()
        if show_plan:
            return _show_plans(sources, references, options)
        if lr.is_dir():
            output = output or lr.with_name(lr.name + suffix)
            output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    results: list[Path] = []
    with progress_bar("enlarging", len(sources), quiet) as (step, tell):
        for source in sources:
            start = time.perf_counter()
            try:
                low = images.read_image(source)
                path = result_path(source, low, output, suffix, ext)
                if not (resume and path.is_file()):
                    check_result(path, low, [source, *references.files(source)], results)
                    bank = references.bank(source)
                    image = upscale(low, bank, progress=tell(source.name), **options).image
                    image.save(path)
                    report(path, image, start, quiet)
                results.append(path)
            except ERRORS as error:
                failures.append(one_line(error))
            step()
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures and lr.is_dir():
        fail(f"{len(failures)} of {len(sources)} pictures failed", SOME_FAILED)
    if failures:
        raise typer.Exit(BAD_INPUT)


def _show_plans(sources: list[Path], references: ReferenceOptions, options: dict[str, Any]) -> None:
    """A plan for every size among the pictures."""
    shown = set()
    for source in sources:
        size = images.read_image(source).size
        pictures = references.bank(source).pictures(grey=False)
        sizes = [picture.size for picture in pictures]
        if (size, *sizes) in shown:
            continue
        shown.add((size, *sizes))
        lines = plan.describe(size, sizes, **options)
        typer.echo(f"{source} ({size[1]} x {size[0]})")
        for name, value in lines:
            typer.echo(f"  {name:<22} {value}")
