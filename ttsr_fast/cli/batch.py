"""Images of `ttsr-fast upscale`, their results, and the record of the results."""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

import ttsr_fast
from ttsr_fast import images
from ttsr_fast.choices import DEFAULT_PHASES
from ttsr_fast.cli.common import (
    BAD_INPUT,
    ERRORS,
    SOME_FAILED,
    errors_in_one_line,
    fail,
    one_line,
    progress_bar,
    report,
    say,
)
from ttsr_fast.cli.inputs import ReferenceOptions
from ttsr_fast.cli.record import Record, digest_of
from ttsr_fast.datasets import ENDINGS, identities, identity, images_in, result_path
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, SUFFIXES
from ttsr_fast.upscaling import plan, upscale
from ttsr_fast.upscaling.execution import Progress


class Batch:
    """Images to upscale with the same options.

    Args:
        given: images and folders of them.
        output: file or folder for the results; None for results beside their images, and a new
            folder for the results of a folder.
        references: of all images.
        suffix: added to the names of results.
        ext: ending of results; "auto" for the ending of the image.
        resume: whether up-to-date results are kept.
        quiet: whether results are not reported.

    Attributes:
        sources: all images, each once.
        several: whether the command was given a folder or several images.

    Raises:
        OSError, ValueError: as `images_in`; `ext` is no format; `output` is a file, or named as
            one, and there are several images.
    """

    def __init__(
        self,
        given: Sequence[Path],
        output: Path | None,
        references: ReferenceOptions,
        suffix: str,
        ext: str,
        resume: bool,
        quiet: bool,
    ) -> None:
        self.several = len(given) > 1 or given[0].is_dir()
        self._output: dict[Path, Path | None] = {}  # where the result of an image goes
        self._named = {path for path in given if not path.is_dir()}
        self._references, self._suffix, self._ext = references, suffix, ext
        self._resume, self._quiet = resume, quiet
        self._records: dict[Path, Record] = {}  # by the resolved folder of the results
        self._taken: set[tuple[int, int]] = set()  # inputs, and results of this run
        self._inputs: set[Path] = set()  # other programs may replace them meanwhile
        self._made_from: dict[str, str] = {}  # common facts of all results
        self._digests: dict[tuple[Path, ...], str] = {}  # of references
        if ext != "auto" and f".{ext}" not in SUFFIXES:
            raise ValueError(f"--ext must be auto or one of {ENDINGS}, got {ext}")
        if self.several and output is not None and _is_file(output):
            raise ValueError(f"--output must be a folder for several images, got {shown(output)}")
        known: dict[Path, Path] = {}  # by folder and name; links are images of their own
        for path in given:
            folder = output
            if path.is_dir() and output is None:
                named = path.resolve() if path.name in ("", "..") else path
                folder = named.with_name(named.name + suffix)
            for source in images_in(path):
                source = known.setdefault(source.parent.resolve() / source.name, source)
                if source not in self._output or path in self._named:  # its result goes beside it
                    self._output[source] = folder
        self.sources = list(self._output)

    def prepare(self, weights: Path | None, made_from: dict[str, str]) -> None:
        """Make folders, open records, skip earlier results, read the references.

        Args:
            weights: file of the model, an input.
            made_from: common facts of all results.

        Raises:
            OSError, ValueError: a folder cannot be made, a record or reference cannot be read; no
                image is left.
        """
        self._open_records()
        if self.several:
            self.sources = [source for source in self.sources if not self._is_left_out(source)]
            if not self.sources:
                raise ValueError("LR must name images, got only results")
            for folder in {self._output[source] for source in self.sources} - {None}:
                assert folder is not None
                if folder.exists() and not folder.is_dir():
                    raise ValueError(f"cannot write into {shown(folder)}: it is no folder")
                folder.mkdir(parents=True, exist_ok=True)
            self._open_records()
        self._references.leave_out(self._is_result)
        read = [*self.sources, *self._references.inputs()]
        read += [] if weights is None else [weights]
        self._taken |= identities(read)
        self._inputs |= {path.resolve() for path in read}
        self._made_from |= made_from
        self._references.check(self.sources[0])  # an error in a reference is one of the command

    def run(self, options: dict[str, Any]) -> None:
        """Upscale all images. Failures of single images are printed at the end.

        Args:
            options: of `upscale`.

        Raises:
            typer.Exit: with the exit code of the command.
        """
        failures: list[str] = []
        done = kept = 0
        how = "; the same command with --resume goes on" if self.several else ""
        with errors_in_one_line(lambda: f" after {done} of {len(self.sources)} images{how}"):
            try:
                with progress_bar("upscaling", len(self.sources), self._quiet) as (
                    step,
                    progress_of,
                ):
                    for source in self.sources:
                        try:
                            kept += self._upscale(source, progress_of(source.name), options)
                            done += 1
                        except ERRORS as error:
                            failures.append(self._with_name(source, one_line(error)))
                        step()
            finally:
                for failure in failures:
                    say(f"error: {failure}", err=True)
        if kept and not self._quiet:
            say(f"kept {kept} of {len(self.sources)} results, which are up to date")
        if failures and self.several:
            fail(f"{len(failures)} of {len(self.sources)} images failed", SOME_FAILED)
        if failures:
            raise typer.Exit(BAD_INPUT)

    def _upscale(self, source: Path, on_progress: Progress, options: dict[str, Any]) -> bool:
        """Make a result; True if an existing one is kept."""
        start = time.perf_counter()
        record = self._records.get(self._folder(source).resolve())
        made_from = {} if record is None else self._made_from | self._digests_of(source)
        low = images.read_image(source)
        path = result_path(source, low, self._output[source], self._suffix, self._ext)
        taken = path.exists() and identity(path) in self._taken
        if taken or path.resolve() in self._inputs:
            raise ValueError(f"cannot write {shown(path)}: it is an input or another result")
        is_kept = self._is_kept(path, record, made_from)
        if not is_kept:
            images.check_output(path, low, SCALE)
            if record is not None:
                record.check_writable()
            bank = self._references.bank(source)
            image = upscale(low, bank, progress=on_progress, **options).image
            image.save(path)
            if record is not None:
                record.add(path, made_from)
            report(path, image, start, self._quiet)
        self._taken.add(identity(path))
        return is_kept

    def _with_name(self, source: Path, error: str) -> str:
        """Prefix the image's path, unless the message already names a file."""
        named = not self.several or error.startswith(("cannot ", shown(source)))
        return error if named else f"{shown(source)}: {error}"

    def _folder(self, source: Path) -> Path:
        """Folder of an image's result, which may not exist yet."""
        output = self._output[source]
        inside = output is not None and (self.several or output.is_dir())
        return output if inside and output is not None else (output or source).parent

    def _open_records(self) -> None:
        """Open the records of all existing folders of results."""
        for source in self.sources if self.several or self._resume else ():
            folder = self._folder(source)
            if folder.resolve() not in self._records and folder.is_dir():
                self._records[folder.resolve()] = Record(folder)

    def _is_left_out(self, source: Path) -> bool:
        """True for a result of an earlier run; one that was named gets a line."""
        found = self._is_result(source)
        if found and source in self._named and not self._quiet:
            say(f"{shown(source)} is left out: it is a result of an earlier run")
        return found

    def _is_result(self, path: Path) -> bool:
        record = self._records.get(path.parent.resolve())
        return record is not None and record.holds(path)

    def _digests_of(self, source: Path) -> dict[str, str]:
        """Digests of an image and its references, before they are read: a file may change."""
        references = tuple(self._references.files(source))
        if references not in self._digests:
            digests = " ".join(digest_of(path) for path in references)
            self._digests[references] = hashlib.sha256(digests.encode()).hexdigest()
        return {"image": digest_of(source), "references": self._digests[references]}

    def _is_kept(self, path: Path, record: Record | None, made_from: dict[str, str]) -> bool:
        if record is None or not self._resume or not os.path.isfile(path):
            return False
        reason = record.why_again(path, made_from)
        if reason is not None and not self._quiet:
            say(f"{shown(path)} is made again: {reason}")
        return reason is None


def _is_file(output: Path) -> bool:
    """True for a path of a file, or one with the ending of an image."""
    return not output.is_dir() and (output.exists() or output.suffix.lower() in SUFFIXES)


def made_from(
    weights: Path | None, phases: int | None, amp: str | None, precision: str | None
) -> dict[str, str]:
    """Facts that determine all results of a run: the computation, without device or windows."""
    if weights is None:
        facts = {"method": "detail", "phases": phases or DEFAULT_PHASES}
    else:
        facts = {"method": "ttsr", "weights": digest_of(weights), "amp": amp}
    facts |= {"precision": precision or "fp32", "version": ttsr_fast.__version__}
    return {name: str(value).lower() for name, value in facts.items()}


def show_plans(
    sources: Sequence[Path], references: ReferenceOptions, options: dict[str, Any]
) -> None:
    """Print a plan for every size among the images.

    Raises:
        NotEnoughMemory: error of the largest plan, after all plans are shown.
    """
    seen = set()
    refusals: list[plan.NotEnoughMemory] = []
    for source in sources:
        size = images.read_image(source).size
        sizes = [image.size for image in references.bank(source).images(grey=False)]
        if (size, *sizes) in seen:
            continue
        seen.add((size, *sizes))
        lines, refusal = plan.describe(size, sizes, **options)
        refusals += [] if refusal is None else [refusal]
        say(f"{source} ({size[1]} x {size[0]})")
        for name, value in lines:
            say(f"  {name:<22} {value}")
    if refusals:
        raise max(refusals, key=lambda error: error.needed)
