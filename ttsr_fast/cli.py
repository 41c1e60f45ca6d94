"""The command line: reads arguments, shows progress, reports every error in one line."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch

import ttsr_fast
from ttsr_fast import backends, environment, images, plan
from ttsr_fast.bank import ReferenceBank
from ttsr_fast.folders import ENDINGS, check_result, namesake, pictures_in, result_path
from ttsr_fast.functional import PRECISIONS
from ttsr_fast.images import SUFFIXES, Image
from ttsr_fast.model import load_model
from ttsr_fast.pictures import draw_match
from ttsr_fast.upscale import AMP, METHODS, PHASES, upscale

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install 'ttsr-fast[cli]'") from error

SOME_FAILED, BAD_INPUT = 1, 2  # exit codes
_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The program `ttsr-fast`."""
    app(prog_name="ttsr-fast")


def _one_of(choices: Sequence[Any], help: str, default: str) -> Any:
    """An option that takes one of `choices`, or None."""

    def check(parameter: typer.CallbackParam, value: Any) -> Any:
        if value is not None and value not in choices:
            _fail(f"--{parameter.name} must be one of {', '.join(map(str, choices))}, got {value}")
        return value

    metavar = "|".join(map(str, choices))
    return typer.Option(callback=check, metavar=metavar, help=help, show_default=default)


Weights = Annotated[
    Path | None, typer.Option(help="A TTSR checkpoint: official, mmagic's or .safetensors.")
]
References = Annotated[
    list[Path] | None,
    typer.Option(help="Reference picture, or a folder of them; may be given several times."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="4GiB, 512M, ...: what the process may take.", show_default="what is free"),
]
Method = Annotated[
    str | None,
    _one_of(METHODS, "detail needs no weights.", "ttsr with --weights, otherwise detail"),
]
Phases = Annotated[
    int | None,
    _one_of(PHASES, "For detail: how finely to search. 4 finds most, in 4 times the time.", "2"),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, ...", show_default="the GPU if there is one"),
]
Backend = Annotated[
    str | None, _one_of(backends.BACKENDS, "What runs the search.", "the fastest that can")
]
Precision = Annotated[str | None, _one_of(PRECISIONS, "What speed may cost in accuracy.", "fp32")]
Amp = Annotated[
    str | None,
    _one_of(tuple(AMP), "For ttsr: convolutions in this type, not the search.", "the model's"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]


@app.callback(invoke_without_command=True)
def _program(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """x4 super-resolution with a reference picture."""
    if version:
        typer.echo(f"ttsr-fast {ttsr_fast.__version__}")
        raise typer.Exit


@app.command("upscale")
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
    with _errors_in_one_line():
        sources = pictures_in(lr)
        if ext != "auto" and f".{ext}" not in SUFFIXES:
            raise ValueError(f"--ext must be auto or one of {ENDINGS}, got {ext}")
        options = _options(weights, method, phases, device, backend, precision)
        if cache is not None and weights is None:
            raise ValueError("--cache is for --method ttsr, with --weights")
        if compiled and weights is None:
            raise ValueError("--compile is for --method ttsr, with --weights")
        if compiled:
            options["model"].MainNet.compile()  # at the first picture; windows go without
        options |= {"amp": amp, "max_memory": _bytes(max_memory), "tile": tile}
        references = _References(ref, pairs, cache)
        if show_plan:
            return _show_plans(sources, references, options)
        if lr.is_dir():
            output = output or lr.with_name(lr.name + suffix)
            output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    results: list[Path] = []
    with _progress("enlarging", len(sources), quiet) as (step, tell):
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
                    _report(path, image, start, quiet)
                results.append(path)
            except _ERRORS as error:
                failures.append(_one_line(error))
            step()
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures and lr.is_dir():
        _fail(f"{len(failures)} of {len(sources)} pictures failed", SOME_FAILED)
    if failures:
        raise typer.Exit(BAD_INPUT)


class _References:
    """The references of every picture: all for each, or one of the same name."""

    def __init__(self, ref: list[Path] | None, pairs: Path | None, cache: Path | None) -> None:
        if bool(ref) == (pairs is not None):
            raise ValueError("either --ref or --pairs is needed, and not both")
        if pairs is not None and not pairs.is_dir():
            raise ValueError(f"--pairs must be a folder, got {pairs}")
        self._pairs, self._cache = pairs, cache
        self._all = [file for path in ref or () for file in pictures_in(path)]
        self._bank: ReferenceBank | None = None

    def files(self, source: Path) -> list[Path]:
        return self._all if self._pairs is None else [namesake(source, self._pairs)]

    def bank(self, source: Path) -> ReferenceBank:
        if self._pairs is not None or self._bank is None:
            files = self.files(source)
            self._bank = ReferenceBank(files if len(files) > 1 else files[0], cache=self._cache)
        return self._bank


def _show_plans(sources: list[Path], references: _References, options: dict[str, Any]) -> None:
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


@app.command("match")
def match_command(
    lr: Annotated[Path, typer.Argument(metavar="LR", help="Picture to enlarge.")],
    ref: References,
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the drawing.")],
    weights: Weights = None,
    method: Method = None,
    phases: Phases = None,
    device: Device = None,
    max_memory: MaxMemory = None,
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Draw where every patch of a picture came from, and how similar it is."""
    start = time.perf_counter()
    with _errors_in_one_line():
        images.check_output(output, Image(np.empty((1, 1, 3), np.uint8)))
        options = _options(weights, method, phases, device, backend, precision)
        low, bank = images.read_image(lr), _References(ref, None, None).bank(lr)
        with _progress("matching", 1, quiet) as (_, tell):
            result = upscale(
                low, bank, max_memory=_bytes(max_memory), progress=tell(lr.name), **options
            )
            sheet = draw_match(low, bank.pictures(grey=False), *result)
        sheet.save(output)
    _report(output, sheet, start, quiet)


@app.command("env")
def env_command(
    build: Annotated[
        bool, typer.Option("--build", help="First compile the kernels, in CUDA if torch has it.")
    ] = False,
) -> None:
    """Show versions, devices, and which backends run here and why others do not."""
    with _errors_in_one_line():
        if build:
            _build()
        for name, value in environment.describe():
            typer.echo(f"{name:<20} {value}")


def _build() -> None:
    from ttsr_fast import build

    typer.echo(f"compiled {build.build_library()}")
    if torch.version.cuda is None:
        return
    reason = build.why_not(cuda=True)
    if reason is None:
        typer.echo(f"compiled {build.build_library(cuda=True)}")
    else:
        typer.echo(f"left out the kernels in CUDA: {reason}")


def _options(
    weights: Path | None,
    method: str | None,
    phases: int | None,
    device: str | None,
    backend: str | None,
    precision: str | None,
) -> dict[str, Any]:
    """What `upscale` takes beside the pictures; the model is loaded and moved."""
    if method == "ttsr" and weights is None:
        raise ValueError("--method ttsr needs --weights")
    if weights is not None and (method == "detail" or phases is not None):
        raise ValueError("--weights are for --method ttsr, which takes no --phases")
    options = {"method": method, "phases": phases, "backend": backend, "precision": precision}
    where = torch.device(_device(device))
    if backend is not None:
        backends.can_run(backend, where, raise_error=True)
    if weights is not None:
        return {**options, "model": load_model(weights).to(where)}
    return {**options, "device": where}


def _device(name: str | None) -> str:
    known = environment.devices()
    if name is None:
        return next(iter(known[1:]), "cpu")
    if name not in known and f"{name}:0" not in known:
        raise ValueError(f"--device must be one of {', '.join(known)}, got {name}")
    return name


def _report(path: Path, image: Image, start: float, quiet: bool) -> None:
    if not quiet:
        height, width = image.size
        typer.echo(f"{path} ({width} x {height}, {time.perf_counter() - start:.1f} s)")


@contextmanager
def _progress(
    what: str, total: int, quiet: bool
) -> Iterator[tuple[Callable[[], None], Callable[[str], Callable[[str, int, int], None]]]]:
    """A bar on the terminal, gone when done; one picture alone has no measure and only pulses.

    Gives a function for every picture that is done, and one that makes, of a picture's name, what
    `upscale` tells of its progress.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what, total=total if total > 1 else None)

        def tell(name: str) -> Callable[[str, int, int], None]:
            def told(stage: str, done: int, of: int) -> None:
                progress.update(task, description=f"{name}: {stage} {done}/{of}")

            return told

        yield lambda: progress.advance(task), tell


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        _fail(_one_line(error))


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _bytes(text: str | None) -> int | None:
    try:
        return None if text is None else plan.parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"--max-memory: {error}") from None


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
