"""`evaluate`: PSNR and SSIM of a method over pairs of images, in any number of processes."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ttsr_fast import images, metrics
from ttsr_fast.choices import EVALUATED, REFERENCES
from ttsr_fast.datasets import Pair, degrade, identities, identity, read_rgb
from ttsr_fast.evaluation.share import Share
from ttsr_fast.evaluation.table import Failure, Row, Table
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, Image
from ttsr_fast.model import TTSR
from ttsr_fast.upscaling import upscale
from ttsr_fast.upscaling.bank import LEAST_REFERENCE
from ttsr_fast.upscaling.finite import check_finite
from ttsr_fast.upscaling.plan import plan_upscale
from ttsr_fast.visualize import draw_comparison

CANVAS = 500  # pixels along each side of a reference in the authors' stack
_SKIPPED = (OSError, ValueError, RuntimeError)


@torch.no_grad()
def evaluate(
    model: TTSR | str,
    pairs: Sequence[Pair],
    *,
    protocol: str = "ttsr",
    references: str = "first",
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    precision: str | None = None,
    backend: str | None = None,
    on_error: str = "raise",
    pictures: str | os.PathLike[str] | None = None,
    together: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """Reduce every image four times, upscale it again, and compare.

    Images are cut to a multiple of 4 and reduced by Pillow's bicubic on 8 bits; a grey one counts
    as three equal channels. Where torch.distributed is initialised, its processes share the pairs,
    one to each in turn: all make this call, and all get the table, which is the same for any number
    of them but for the seconds.

    Args:
        model: a TTSR, on the device that computes; or "detail", as in `upscale`; or "bicubic". The
            last, and a TTSR without hard attention, take no references.
        pairs: pairs to evaluate, as `datasets.find_pairs` lists them. The reference of a pair
            without any is its own low-resolution image, at its size.
        protocol: "ttsr", "mmagic" or "c2", see `metrics.PROTOCOLS`.
        references: "first": only the first of each pair; "all": every patch takes the best of all;
            "stack": all in one image, each in the upper left of a black one of 500x500 pixels, one
            below the other, as the paper's authors report to have done for CUFED5. There black
            areas can be matched, and patches can cross the seams.
        device: device of "detail", by default the CPU.
        max_memory: bytes that each process may take; None for four fifths of the free memory.
        precision: as for `ttsr_fast.search`; None takes the model's.
        backend: as for `ttsr_fast.search`; None takes the model's.
        on_error: "raise", or "skip" for a table that lists the pairs that failed, with the reason.
        pictures: a folder, made if it does not exist, for a comparison image `<name>.png` of each
            pair.
        together: whether the processes of torch.distributed share the pairs; False makes it the
            call of one process.
        progress: called with the name of a pair that is done, the number of pairs that are done,
            and of all.

    Raises:
        TypeError, ValueError: arguments that do not fit; a file that is no image, is damaged or too
            small, with its name; NaN or infinity in weights or a result, with the likely reason;
            no pair that could be evaluated; processes that do not agree.
        OSError: a file is missing, or a comparison image cannot be written.
        RuntimeError: the chosen backend cannot run here; another process raised an error, which
            the message quotes, or has ended.
        ImportError: Pillow or scikit-image is not installed.
    """
    options: dict[str, Any] = {"device": device, "max_memory": max_memory}
    options |= {"precision": precision, "backend": backend}
    options |= {"model": model} if isinstance(model, TTSR) else {}
    folder = None if pictures is None else Path(pictures)
    job = _Job(model, protocol, references, on_error, folder, options)
    rows: list[Row] = []
    failures: list[Failure] = []
    with Share(together) as share:
        share.check_all_equal(partial(_check, job, pairs))
        for first in range(0, len(pairs), share.size):
            mine = pairs[first + share.rank : first + share.rank + 1]
            for found in share.run_on_all(partial(_evaluate, job, mine)):
                if isinstance(found, Row):
                    rows.append(found)
                elif found is not None:
                    failures.append(found)
                if progress is not None and found is not None:
                    progress(found.name, len(rows) + len(failures), len(pairs))
    if not rows:
        raise ValueError(f"none of {len(pairs)} pairs can be evaluated: {failures[0].message}")
    return Table(job.method, protocol, references, rows, failures)


class _Job(NamedTuple):
    """Method, protocol and options of all pairs."""

    model: TTSR | str
    protocol: str
    references: str
    on_error: str
    folder: Path | None  # of comparison images
    options: dict[str, Any]  # of `upscale`

    @property
    def method(self) -> str:
        return self.model if isinstance(self.model, str) else "ttsr"

    @property
    def takes_references(self) -> bool:
        return self.model.hard_attention if isinstance(self.model, TTSR) else self.model == "detail"

    def files(self, pair: Pair) -> Sequence[Path]:
        """The references of a pair that are used."""
        files = pair.references if self.takes_references else ()
        return files[:1] if self.references == "first" else files

    def comparison(self, name: str) -> Path | None:
        """File of the comparison image of a pair."""
        return None if self.folder is None else self.folder / f"{name}.png"


class _Outcome(NamedTuple):
    """Row of a pair, and the images of its comparison."""

    row: Row
    hr: np.ndarray  # [H, W, 3] uint8
    sr: np.ndarray  # [H, W, 3] uint8
    bicubic: np.ndarray  # [H, W, 3] uint8
    refs: list[Image]
    origin: np.ndarray | None  # [h, w] number of the reference of each patch


# --- checks ---


def _check(job: _Job, pairs: Sequence[Pair]) -> object:
    """Raise early errors; return the facts that processes have to agree on."""
    _check_options(job, pairs)
    names = [pair.name for pair in pairs]
    files = [path for pair in pairs for path in (pair.hr, *pair.references)]
    if job.on_error == "raise":
        missing = [path for path in files if not path.is_file()]
        if missing:
            others = f" (the first of {len(missing)} that are missing)" if len(missing) > 1 else ""
            raise FileNotFoundError(f"cannot read {shown(missing[0])}: no such file{others}")
        for pair in pairs:
            _check_pair(job, pair)
    if job.folder is not None:
        if len(set(names)) < len(names):
            raise ValueError("pairs must have different names for images of them")
        inputs = identities(files)
        for path in map(job.comparison, names):
            if path is not None and path.exists() and identity(path) in inputs:
                raise ValueError(f"cannot write {shown(path)}: it is an input; take another folder")
        job.folder.mkdir(parents=True, exist_ok=True)
    return (job.protocol, job.references, job.on_error, names)


def _check_options(job: _Job, pairs: Sequence[Pair]) -> None:
    model, max_memory = job.model, job.options["max_memory"]
    if isinstance(model, str) and model not in EVALUATED:
        raise ValueError(f"model must be a TTSR or one of {EVALUATED}, got {model!r}")
    if not isinstance(model, TTSR | str):
        raise TypeError(f"model must be a TTSR or one of {EVALUATED}, got {type(model).__name__}")
    if isinstance(model, TTSR) and job.options["device"] is not None:
        raise ValueError("device is for 'detail'; with a TTSR move the model")
    metrics.check_protocol(job.protocol)
    metrics.check_installed()
    if job.references not in REFERENCES:
        raise ValueError(f"references must be one of {REFERENCES}, got {job.references!r}")
    if job.on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {job.on_error!r}")
    if max_memory is not None and max_memory < 1:
        raise ValueError(f"max_memory must be a positive number of bytes, got {max_memory}")
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")


def _check_pair(job: _Job, pair: Pair) -> None:
    """Raise errors that the headers of the files show."""
    height, width = images.size_of(pair.hr)
    size = height // SCALE, width // SCALE
    if 0 in size:
        raise ValueError(f"{shown(pair.hr)} must be at least {SCALE}x{SCALE} pixels")
    refs = [(path.name, images.size_of(path)) for path in job.files(pair)]
    stacked = job.references == "stack" and len(refs) > 0
    if job.takes_references and not refs:
        refs = [("LR", size)]
    for name, (height, width) in refs:
        if stacked and max(height, width) > CANVAS:
            raise ValueError(
                f"{shown(pair.name)}: reference {shown(name)} must fit into {CANVAS}x{CANVAS} "
                f"pixels to be stacked, got {width}x{height}"
            )
        if not stacked and min(height, width) < LEAST_REFERENCE:
            raise ValueError(
                f"{shown(pair.name)}: reference {shown(name)} must be at least "
                f"{LEAST_REFERENCE}x{LEAST_REFERENCE} pixels, got {width}x{height}"
            )
    try:
        metrics.check_size(SCALE * size[0], SCALE * size[1], job.protocol)
        if job.takes_references and job.options["max_memory"] is not None:
            sizes = [(CANVAS * len(refs), CANVAS)] if stacked else [ref for _, ref in refs]
            model, device = job.options.get("model"), job.options["device"]
            plan_upscale(
                size, sizes, model=model, device=device, max_memory=job.options["max_memory"]
            )
    except ValueError as error:
        raise ValueError(f"{shown(pair.name)}: {error}") from error


# --- one pair ---


def _evaluate(job: _Job, mine: Sequence[Pair]) -> Row | Failure | None:
    """Result of this process's pair; None where other processes have taken the last ones."""
    if not mine:
        return None
    (pair,) = mine
    try:
        outcome = _measure(job, pair)
    except _SKIPPED as error:
        if job.on_error == "raise":
            raise
        return Failure(pair.name, (str(error) or type(error).__name__).splitlines()[0])
    path = job.comparison(pair.name)
    if path is not None:
        _comparison(job, outcome).save(path)
    return outcome.row


def _measure(job: _Job, pair: Pair) -> _Outcome:
    _check_pair(job, pair)
    hr = read_rgb(pair.hr)
    height, width = (n // SCALE * SCALE for n in hr.shape[:2])
    hr = hr[:height, :width]
    low, bicubic = degrade(hr)
    files = job.files(pair)
    refs = [Image(read_rgb(path)) for path in files]
    names = tuple(path.name for path in files)
    if job.takes_references and not files:
        refs, names = [Image(low)], ("LR",)
    elif job.references == "stack" and files:
        refs = [_stacked(refs)]
    start = time.perf_counter()
    try:
        sr, origin = _upscale(job, low, bicubic, refs)
        seconds = time.perf_counter() - start
        psnr, ssim = (f(sr, hr, job.protocol) for f in (metrics.psnr, metrics.ssim))
    except ValueError as error:
        raise ValueError(f"{shown(pair.name)}: {error}") from error
    row = Row(pair.name, psnr, ssim, seconds, names)
    return _Outcome(row, hr, sr, bicubic, refs, origin)


def _upscale(
    job: _Job,
    low: np.ndarray,  # [h, w, 3] uint8
    bicubic: np.ndarray,  # [4*h, 4*w, 3] uint8
    refs: list[Image],
) -> tuple[np.ndarray, np.ndarray | None]:
    """The result, as `bicubic`, and for each pixel of `low` the number of its reference."""
    if job.takes_references:
        result = upscale(low, refs, **job.options)
        return result.image.pixels, result.reference.numpy()
    if isinstance(job.model, TTSR):
        lr = images.to_tensor(low).to(job.model.device, job.model.dtype)
        (sr,) = job.model(lr)
        check_finite("the result holds", sr, model=job.model)
        return images.from_tensor(sr, low), None
    return bicubic, None


def _stacked(refs: list[Image]) -> Image:
    canvas = np.zeros((len(refs), CANVAS, CANVAS, 3), np.uint8)
    for square, ref in zip(canvas, refs, strict=True):
        height, width = ref.size
        square[:height, :width] = ref.pixels
    return Image(canvas.reshape(-1, CANVAS, 3))


def _comparison(job: _Job, outcome: _Outcome) -> Image:
    row, title = outcome.row, job.model if isinstance(job.model, str) else "TTSR"
    start = metrics.psnr(outcome.bicubic, outcome.hr, job.protocol)
    panels = [
        (f"bicubic, {start:.2f} dB", Image(outcome.bicubic)),
        (f"{title}, {row.psnr:.2f} dB, SSIM {row.ssim:.4f}", Image(outcome.sr)),
        (f"{row.name}, the truth", Image(outcome.hr)),
    ]
    return draw_comparison(panels, outcome.refs, outcome.origin)
