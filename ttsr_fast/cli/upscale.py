"""`ttsr-fast upscale`: larger images."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import ttsr_fast
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
    say,
    upscale_options,
)
from ttsr_fast.cli.record import Record, digest_of
from ttsr_fast.files import shown
from ttsr_fast.folders import ENDINGS, identities, identity, pictures_in, result_path
from ttsr_fast.images import SCALE, SUFFIXES, Image
from ttsr_fast.inference import Progress
from ttsr_fast.upscaling import DEFAULT_PHASES, upscale


def upscale_command(
    lr: Annotated[
        Path, typer.Argument(metavar="LR", help="Image to upscale, or a folder of them.")
    ],
    ref: References = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="Instead of --ref: a folder with a reference of each image's name."),
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
            "--compile", help="For ttsr: fuse operations, a minute once for many small images."
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
        bool,
        typer.Option(
            "--resume",
            help="Keep results that are whole and right, as said above; make the others.",
        ),
    ] = False,
    suffix: Annotated[str, typer.Option(help="Added to the names of results.")] = "_x4",
    ext: Annotated[
        str, typer.Option(help="png, jpg, ...; auto: as LR, or png where that cannot hold it.")
    ] = "auto",
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Upscale an image, or every image of a folder, four times.

    Every patch of an image takes the best of all references.

    Existing files are replaced, each when its successor is complete. Inputs are never replaced.

    A folder is finished even if some images fail; they are listed then.

    A hidden file .ttsr-fast.jsonl beside the results records what each was made from.

    --resume keeps a whole result of the same LR, references, weights, options and version.

    Options count that decide what is computed: --method, --phases, --amp and --precision.

    Every other result is made again, with a line that says why.

    Exit codes: 0 all done, 1 some images of a folder failed, 2 bad input, 130 Ctrl-C.
    """
    with errors_in_one_line(lambda: " before the first image"):
        sources = pictures_in(lr)
        if ext != "auto" and f".{ext}" not in SUFFIXES:
            raise ValueError(f"--ext must be auto or one of {ENDINGS}, got {ext}")
        made_from = _shared(weights, phases, amp, precision)  # before the weights are read
        options = upscale_options(weights, method, phases, device, backend, precision)
        if cache is not None and weights is None:
            raise ValueError("--cache is for --method ttsr, with --weights")
        if compiled and weights is None:
            raise ValueError("--compile is for --method ttsr, with --weights")
        if compiled:
            options["model"].MainNet.compile()  # at the first image; windows go without
        options |= {"amp": amp, "max_memory": memory_limit(max_memory), "tile": tile}
        references = ReferenceOptions(ref, pairs, cache)
        if max_memory is None:
            plan.keep_freed_memory()
        if show_plan:
            return _show_plans(sources, references, options)
        if lr.is_dir():
            named = lr.resolve() if lr.name in ("", "..") else lr
            output = output or named.with_name(named.name + suffix)
            output.mkdir(parents=True, exist_ok=True)
        folder = output if output is not None and output.is_dir() else (output or lr).parent
        record = Record(folder) if (lr.is_dir() or resume) and folder.is_dir() else None
        if record is not None and lr.is_dir() and folder.samefile(lr):
            sources = [source for source in sources if not record.holds(source)]
            if not sources:
                raise ValueError(f"{shown(lr)} holds no images but results")
        if record is not None:
            references.leave_out(record.holds)
        read = [*sources, *(pictures_in(pairs) if pairs is not None else references.files(lr))]
        read += [] if weights is None else [weights]
        naming = partial(result_path, output=output, suffix=suffix, ext=ext)
        run = _Run(references, options, naming, record, resume, quiet)
        run.taken |= identities(read)
        run.inputs |= {path.resolve() for path in read}
        run.made_from |= made_from
        if pairs is None:
            references.bank(sources[0])  # an error in a reference is one of the command
    run.upscale_all(sources, lr.is_dir())


@dataclass
class _Run:
    """Images to upscale with the same options."""

    references: ReferenceOptions
    options: dict[str, Any]
    naming: Callable[[Path, Image], Path]
    record: Record | None
    resume: bool
    quiet: bool
    taken: set[tuple[int, int]] = field(default_factory=set)  # inputs, and results of this run
    inputs: set[Path] = field(default_factory=set)  # which other programs may replace meanwhile
    made_from: dict[str, str] = field(default_factory=dict)  # what all results have in common
    digests: dict[tuple[Path, ...], str] = field(default_factory=dict)  # of references

    def upscale_all(self, sources: Sequence[Path], of_folder: bool) -> None:
        """All images, in spite of failures, which are printed at the end."""
        failures: list[str] = []
        done = 0
        how = "; the same command with --resume goes on" if of_folder else ""
        with errors_in_one_line(lambda: f" after {done} of {len(sources)} images{how}"):
            try:
                with progress_bar("upscaling", len(sources), self.quiet) as (step, tell):
                    for source in sources:
                        try:
                            self._upscale(source, tell(source.name))
                            done += 1
                        except ERRORS as error:
                            failures.append(one_line(error))
                        step()
            finally:
                for failure in failures:
                    say(f"error: {failure}", err=True)
        if failures and of_folder:
            fail(f"{len(failures)} of {len(sources)} images failed", SOME_FAILED)
        if failures:
            raise typer.Exit(BAD_INPUT)

    def _upscale(self, source: Path, on_progress: Progress) -> None:
        start = time.perf_counter()
        made_from = self._made_from(source)
        low = images.read_image(source)
        path = self.naming(source, low)
        taken = path.exists() and identity(path) in self.taken
        if taken or path.resolve() in self.inputs:
            raise ValueError(f"cannot write {shown(path)}: it is an input or another result")
        if not self._is_kept(path, made_from):
            images.check_output(path, low, SCALE)
            if self.record is not None:
                self.record.check_writable()
            bank = self.references.bank(source)
            image = upscale(low, bank, progress=on_progress, **self.options).image
            image.save(path)
            if self.record is not None:
                self.record.add(path, made_from)
            report(path, image, start, self.quiet)
        self.taken.add(identity(path))

    def _made_from(self, source: Path) -> dict[str, str]:
        """What a result depends on. Digests come before reading, in case a file changes."""
        if self.record is None:
            return {}
        references = tuple(self.references.files(source))
        if references not in self.digests:
            digests = " ".join(digest_of(path) for path in references)
            self.digests[references] = hashlib.sha256(digests.encode()).hexdigest()
        image = {"image": digest_of(source), "references": self.digests[references]}
        return self.made_from | image

    def _is_kept(self, path: Path, made_from: dict[str, str]) -> bool:
        if self.record is None or not self.resume or not os.path.isfile(path):
            return False
        reason = self.record.why_again(path, made_from)
        if reason is not None and not self.quiet:
            say(f"{shown(path)} is made again: {reason}")
        return reason is None


def _shared(
    weights: Path | None, phases: int | None, amp: str | None, precision: str | None
) -> dict[str, str]:
    """What all results of a run are made from: what is computed, and not where or in what steps."""
    if weights is None:
        facts = {"method": "detail", "phases": phases or DEFAULT_PHASES}
    else:
        facts = {"method": "ttsr", "weights": digest_of(weights), "amp": amp}
    facts |= {"precision": precision or "fp32", "version": ttsr_fast.__version__}
    return {name: str(value).lower() for name, value in facts.items()}


def _show_plans(sources: list[Path], references: ReferenceOptions, options: dict[str, Any]) -> None:
    """A plan for every size among the images."""
    seen = set()
    for source in sources:
        size = images.read_image(source).size
        pictures = references.bank(source).pictures(grey=False)
        sizes = [picture.size for picture in pictures]
        if (size, *sizes) in seen:
            continue
        seen.add((size, *sizes))
        lines = plan.describe(size, sizes, **options)
        say(f"{source} ({size[1]} x {size[0]})")
        for name, value in lines:
            say(f"  {name:<22} {value}")
