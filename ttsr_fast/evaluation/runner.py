"""How good a model is: PSNR and SSIM over pairs of pictures, in any number of processes."""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ttsr_fast import images, metrics
from ttsr_fast.choices import DEFAULT_PHASES, EVALUATED, REFERENCES
from ttsr_fast.datasets import Pair, degrade, identities, identity, read_rgb
from ttsr_fast.distributed.ranks import rank_and_size
from ttsr_fast.evaluation.table import Failure, Row, Table
from ttsr_fast.files import shown
from ttsr_fast.images import SCALE, Image
from ttsr_fast.model import TTSR
from ttsr_fast.upscaling.bank import ReferenceBank
from ttsr_fast.upscaling.detail import detail
from ttsr_fast.upscaling.finite import check_finite
from ttsr_fast.upscaling.plan import check_detail, plan_ttsr
from ttsr_fast.upscaling.ttsr import super_resolve
from ttsr_fast.visualize import draw_comparison

CANVAS = 500  # pixels along each side of a reference in the authors' stack
_LEAST = 3 * SCALE  # pixels along each side of a reference, one patch of the search
_SKIPPED = (OSError, ValueError, RuntimeError)

T = TypeVar("T")


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
    """Reduce every picture four times, enlarge it again, and compare.

    Pictures are cut to a multiple of 4 and reduced by Pillow's bicubic on 8 bits; a grey one counts
    as three equal channels. Where torch.distributed is initialised, the pairs are shared out among
    its processes, one to each in turn: all make this call, and all get the table, which is the same
    for any number of them but for the seconds.

    Args:
        model: a TTSR, on the device that is to compute; or "detail", as `upscale` has it; or
            "bicubic". This, and a TTSR without hard attention, take no references.
        pairs: what to evaluate, as `pairs.find_pairs` lists it. One without references has its own
            low-resolution picture as reference, as it is.
        protocol: "ttsr", "mmagic" or "c2", see `metrics.PROTOCOLS`.
        references: "first": only the first of each pair; "all": every patch takes the best of all;
            "stack": all in one picture, each in the upper left of a black one of 500x500 pixels,
            one below the other, as the paper's authors report to have done for CUFED5. There black
            areas can be matched, and patches can reach over the seams.
        device: where "detail" computes, by default the CPU.
        max_memory: bytes that each process may take; None for four fifths of what is free.
        precision: as for `ttsr_fast.search`; None takes the model's.
        backend: as for `ttsr_fast.search`; None takes the model's.
        on_error: "raise", or "skip" for a table that names what could not be evaluated, and why.
        pictures: a folder, made if it is not there, that gets a drawing `<name>.png` of each pair.
        together: whether the processes of torch.distributed share the pairs; False makes it the
            call of one process.
        progress: called with the name of a pair that is done, how many are and how many there are.

    Raises:
        TypeError, ValueError: arguments that do not fit; a picture that is none, is damaged or too
            small, with its name; NaN or infinity in weights or a result, with the likely reason;
            no pair that could be evaluated; processes that do not agree.
        OSError: a file is missing, or a drawing cannot be written.
        RuntimeError: the backend asked for cannot run here; another process raised an error, which
            the message tells, or has ended.
        ImportError: Pillow or scikit-image is not installed.
    """
    share = _Share(together)
    job = _Job(model, protocol, references, device, max_memory, precision, backend)
    check = partial(_check, job, pairs, on_error, pictures)
    rows: list[Row] = []
    failures: list[Failure] = []
    try:
        share.agree(check)
        for first in range(0, len(pairs), share.size):
            mine = pairs[first + share.rank : first + share.rank + 1]
            for found in share.run(partial(_evaluate, job, mine, on_error, pictures)):
                if isinstance(found, Row):
                    rows.append(found)
                elif found is not None:
                    failures.append(found)
                if progress is not None and found is not None:
                    progress(found.name, len(rows) + len(failures), len(pairs))
    finally:
        share.end()
    if not rows:
        raise ValueError(f"none of {len(pairs)} pairs can be evaluated: {failures[0].message}")
    method = model if isinstance(model, str) else "ttsr"
    return Table(method, protocol, references, rows, failures)


class _Job(NamedTuple):
    """What is done with every pair."""

    model: TTSR | str
    protocol: str
    references: str
    device: str | torch.device | None
    max_memory: int | None
    precision: str | None
    backend: str | None

    @property
    def helped(self) -> bool:
        """Whether references are of any use."""
        return self.model.hard_attention if isinstance(self.model, TTSR) else self.model == "detail"

    def files(self, pair: Pair) -> Sequence[Path]:
        """The references of a pair that are used."""
        files = pair.references if self.helped else ()
        return files[:1] if self.references == "first" else files

    def check_memory(self, size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError if `max_memory` is too little for these heights and widths."""
        if isinstance(self.model, TTSR):
            plan_ttsr(self.model, size, sizes, max_memory=self.max_memory)
        else:
            check_detail(size, sizes, torch.device(self.device or "cpu"), self.max_memory)


class _Outcome(NamedTuple):
    """A pair that is done, and the pictures it made: the truth, the result and what helped."""

    row: Row
    hr: np.ndarray  # [H, W, 3] uint8
    sr: np.ndarray  # [H, W, 3] uint8
    bicubic: np.ndarray  # [H, W, 3] uint8
    refs: list[Image]
    served: np.ndarray | None  # [h, w] number of the reference of each patch


def _check(
    job: _Job,
    pairs: Sequence[Pair],
    on_error: str,
    pictures: str | os.PathLike[str] | None,
) -> object:
    """Raise what can be said before the work is done; return what processes have to agree on."""
    model = job.model
    if isinstance(model, str) and model not in EVALUATED:
        raise ValueError(f"model must be a TTSR or one of {EVALUATED}, got {model!r}")
    if not isinstance(model, TTSR | str):
        raise TypeError(f"model must be a TTSR or one of {EVALUATED}, got {type(model).__name__}")
    if isinstance(model, TTSR) and job.device is not None:
        raise ValueError("device is for 'detail'; with a TTSR move the model")
    metrics.check_protocol(job.protocol)
    metrics.check_installed()
    if job.references not in REFERENCES:
        raise ValueError(f"references must be one of {REFERENCES}, got {job.references!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    if job.max_memory is not None and job.max_memory < 1:
        raise ValueError(f"max_memory must be a positive number of bytes, got {job.max_memory}")
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    names = [pair.name for pair in pairs]
    files = [path for pair in pairs for path in (pair.hr, *pair.references)]
    missing = [path for path in files if not path.is_file()]
    if missing and on_error == "raise":
        others = f" (the first of {len(missing)} that are missing)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"cannot read {shown(missing[0])}: no such file{others}")
    for pair in pairs if on_error == "raise" else ():
        _check_pair(job, pair)
    if pictures is not None:
        if len(set(names)) < len(names):
            raise ValueError("pairs must have different names for pictures of them")
        read = identities(files)
        for path in (_drawing(pictures, name) for name in names):
            if path.exists() and identity(path) in read:
                raise ValueError(f"cannot write {shown(path)}: it is an input; take another folder")
        Path(pictures).mkdir(parents=True, exist_ok=True)
    return (job.protocol, job.references, on_error, names)


def _check_pair(job: _Job, pair: Pair) -> None:
    """Raise what the headers of its files can tell."""
    height, width = images.size_of(pair.hr)
    size = height // SCALE, width // SCALE
    if 0 in size:
        raise ValueError(f"{shown(pair.hr)} must be at least {SCALE}x{SCALE} pixels")
    files = job.files(pair)
    refs = [(path.name, images.size_of(path)) for path in files]
    stacked = job.references == "stack" and len(refs) > 0
    if job.helped and not refs:
        refs = [("LR", size)]
    for name, (height, width) in refs:
        if stacked and max(height, width) > CANVAS:
            raise ValueError(
                f"{shown(pair.name)}: reference {shown(name)} must fit into {CANVAS}x{CANVAS} "
                f"pixels to be stacked, got {width}x{height}"
            )
        if not stacked and min(height, width) < _LEAST:
            raise ValueError(
                f"{shown(pair.name)}: reference {shown(name)} must be at least "
                f"{_LEAST}x{_LEAST} pixels, got {width}x{height}"
            )
    try:
        metrics.check_size(SCALE * size[0], SCALE * size[1], job.protocol)
        if job.helped and job.max_memory is not None:
            sizes = [(CANVAS * len(refs), CANVAS)] if stacked else [ref for _, ref in refs]
            job.check_memory(size, sizes)
    except ValueError as error:
        raise ValueError(f"{shown(pair.name)}: {error}") from error


def _evaluate(
    job: _Job,
    mine: Sequence[Pair],
    on_error: str,
    pictures: str | os.PathLike[str] | None,
) -> Row | Failure | None:
    """What this process's pair gives, None where the last ones have gone to others."""
    if not mine:
        return None
    (pair,) = mine
    try:
        outcome = _measure(job, pair)
    except _SKIPPED as error:
        if on_error == "raise":
            raise
        return Failure(pair.name, (str(error) or type(error).__name__).splitlines()[0])
    if pictures is not None:
        _draw(job, outcome).save(_drawing(pictures, pair.name))
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
    if job.helped and not files:
        refs, names = [Image(low)], ("LR",)
    elif job.references == "stack" and files:
        refs = [_stacked(refs)]
    start = time.perf_counter()
    try:
        sr, served = _enlarge(job, low, bicubic, refs)
        seconds = time.perf_counter() - start
        psnr, ssim = (f(sr, hr, job.protocol) for f in (metrics.psnr, metrics.ssim))
    except ValueError as error:
        raise ValueError(f"{shown(pair.name)}: {error}") from error
    row = Row(pair.name, psnr, ssim, seconds, names)
    return _Outcome(row, hr, sr, bicubic, refs, served)


def _enlarge(
    job: _Job,
    low: np.ndarray,  # [h, w, 3] uint8
    bicubic: np.ndarray,  # [4*h, 4*w, 3] uint8
    refs: list[Image],
) -> tuple[np.ndarray, np.ndarray | None]:
    """The result, as `bicubic`, and for each pixel of `low` the number of its reference."""
    size, sizes = (low.shape[0], low.shape[1]), [ref.size for ref in refs]
    model = job.model
    if model == "bicubic":
        return bicubic, None
    if isinstance(model, TTSR):
        lr, lrsr = (images.to_tensor(x).to(model.dtype) for x in (low, bicubic))
        if not model.hard_attention:
            (sr,) = model(lr.to(model.device))
            check_finite("the result holds", sr, model=model)
            return _pixels(sr), None
        plan = plan_ttsr(model, size, sizes, max_memory=job.max_memory)
        sr, match = super_resolve(
            model,
            lr,
            lrsr,
            ReferenceBank(refs).features(model, plan, grey=False),
            plan,
            precision=job.precision or model.SearchTransfer.precision,
            backend=job.backend or model.SearchTransfer.backend,
        )
    else:
        where = torch.device(job.device or "cpu")
        check_detail(size, sizes, where, job.max_memory)
        sr, match = detail(
            Image(low), refs, DEFAULT_PHASES, where, precision=job.precision, backend=job.backend
        )
    return _pixels(sr), match.reference[0].cpu().numpy()


def _pixels(sr: Tensor) -> np.ndarray:  # [1, 3, H, W] -> [H, W, 3] uint8
    return images.from_tensor(sr, np.empty((0, 0, 3), np.uint8))


def _stacked(refs: list[Image]) -> Image:
    canvas = np.zeros((len(refs), CANVAS, CANVAS, 3), np.uint8)
    for square, ref in zip(canvas, refs, strict=True):
        height, width = ref.size
        square[:height, :width] = ref.pixels
    return Image(canvas.reshape(-1, CANVAS, 3))


# --- processes ---


class _Share:
    """This process's part in the work of all, which go through it in step.

    After each round every process knows what all have done, so that none goes on for long after
    an error in another.
    """

    def __init__(self, together: bool) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if together and dist.is_available() and dist.is_initialized():
            self.rank, self.size = rank_and_size(None)
        if self.size > 1:  # one that takes objects from the CPU, whatever the others are
            self._group = dist.new_group(backend="gloo")

    def agree(self, step: Callable[[], object]) -> None:
        """Raise if `step` raises anywhere, or does not return the same in all."""
        facts = self.run(step)
        if any(other != facts[0] for other in facts):
            raise ValueError("the processes must evaluate the same pairs in the same way")

    def run(self, step: Callable[[], T]) -> list[T]:
        """What `step` returns in each process; an error, if it raises in one."""
        if self.size == 1:
            return [step()]
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(step())
        except Exception as caught:  # any: the others wait
            error = caught
        outcomes: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(outcomes, (done, repr(error)), group=self._group)
        except RuntimeError as lost:
            raise RuntimeError("a process of the group has ended, or does not answer") from (
                error or lost
            )
        if error is not None:
            raise error
        for rank, (result, told) in enumerate(outcomes):
            if not result:
                raise RuntimeError(f"process {rank} of the group raised {told}")
        return [result for (result,), _ in outcomes]

    def end(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


# --- files ---


def _drawing(folder: str | os.PathLike[str], name: str) -> Path:
    return Path(folder) / f"{name}.png"


def _draw(job: _Job, outcome: _Outcome) -> Image:
    row, title = outcome.row, job.model if isinstance(job.model, str) else "TTSR"
    start = metrics.psnr(outcome.bicubic, outcome.hr, job.protocol)
    panels = [
        (f"bicubic, {start:.2f} dB", Image(outcome.bicubic)),
        (f"{title}, {row.psnr:.2f} dB, SSIM {row.ssim:.4f}", Image(outcome.sr)),
        (f"{row.name}, the truth", Image(outcome.hr)),
    ]
    return draw_comparison(panels, outcome.refs, outcome.served)
