"""The command line: reads arguments, shows progress, reports every error in one line."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch

import ttsr_fast
from ttsr_fast import backends, images
from ttsr_fast.functional import PRECISIONS
from ttsr_fast.images import SUFFIXES, Image
from ttsr_fast.model import load_model
from ttsr_fast.pictures import draw_match
from ttsr_fast.upscale import METHODS, PHASES, upscale

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(f"error: {error.name} is missing: pip install 'ttsr-fast[cli]'") from error

SOME_FAILED, BAD_INPUT = 1, 2  # exit codes
_ENDINGS = ", ".join(suffix[1:] for suffix in SUFFIXES)
_ERRORS = (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError)

# What the extras of pyproject.toml bring.
EXTRAS = {
    "cli": ("imagecodecs", "pillow", "rich", "tifffile", "typer"),
    "bench": ("matplotlib", "pytest-benchmark", "rich", "scikit-image"),
    "peers": ("faiss-cpu", "pykeops"),
}

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
    ref: Annotated[
        Path,
        typer.Option(help="Reference picture, or a folder with one of the same name for each."),
    ],
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
    suffix: Annotated[str, typer.Option(help="Added to the names of results.")] = "_x4",
    ext: Annotated[
        str, typer.Option(help="png, jpg, ...; auto: as LR, or png where that cannot hold it.")
    ] = "auto",
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Enlarge a picture, or every picture of a folder, four times.

    Existing files are replaced, each when its successor is complete.

    A folder is worked through to its end even if some pictures fail; they are listed then.

    Exit codes: 0 all done, 1 some pictures of a folder failed, 2 bad input.
    """
    with _errors_in_one_line():
        sources = _sources(lr, ref)
        if ext != "auto" and f".{ext}" not in SUFFIXES:
            raise ValueError(f"--ext must be auto or one of {_ENDINGS}, got {ext}")
        options = _options(weights, method, phases, device, backend, precision)
        if lr.is_dir():
            output = output or lr.with_name(lr.name + suffix)
            output.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    results: set[Path] = set()
    with _progress("enlarging", len(sources), quiet) as step:
        for source in sources:
            start = time.perf_counter()
            try:
                low = images.read_image(source)
                path = _result_path(source, low, output, suffix, ext)
                reference = _reference_for(source, ref)
                if path.resolve() in {source.resolve(), reference.resolve(), *results}:
                    raise ValueError(f"cannot write {path}: it is an input or another result")
                images.check_output(path, low)
                image = upscale(low, images.read_image(reference), **options).image
                image.save(path)
            except _ERRORS as error:
                failures.append(_one_line(error))
            else:
                results.add(path.resolve())
                _report(path, image, start, quiet)
            step()
    for failure in failures:
        typer.echo(f"error: {failure}", err=True)
    if failures and lr.is_dir():
        _fail(f"{len(failures)} of {len(sources)} pictures failed", SOME_FAILED)
    if failures:
        raise typer.Exit(BAD_INPUT)


@app.command("match")
def match_command(
    lr: Annotated[Path, typer.Argument(metavar="LR", help="Picture to enlarge.")],
    ref: Annotated[Path, typer.Option(help="Reference picture.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the drawing.")],
    weights: Weights = None,
    method: Method = None,
    phases: Phases = None,
    device: Device = None,
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Draw where every patch of a picture came from, and how similar it is."""
    start = time.perf_counter()
    with _errors_in_one_line():
        images.check_output(output, Image(np.empty((1, 1, 3), np.uint8)))
        options = _options(weights, method, phases, device, backend, precision)
        low, high = images.read_image(lr), images.read_image(ref)
        with _progress("matching", 1, quiet):
            sheet = draw_match(low, high, *upscale(low, high, **options))
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
        for name, value in _environment():
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


def _environment() -> Iterator[tuple[str, str]]:
    yield "ttsr-fast", ttsr_fast.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "devices", ", ".join(_devices())
    yield "cpu capability", torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield f"cuda:{number}", torch.cuda.get_device_name(number)
    for backend in backends.BACKENDS:
        for kind in dict.fromkeys(device.partition(":")[0] for device in _devices()):
            reason = backends.why_not(backend, torch.device(kind))
            if reason is not None:
                verdict = f"no: {reason}"
            elif (backend, kind) == ("cpp", "cpu"):
                verdict = f"runs, {backends.instruction_set()}"
            else:
                verdict = "runs"
            yield f"{backend} on {kind}", verdict
    reason = backends.load_cuda_library()
    if reason is None:
        yield "cuda library", f"loaded, CUDA {backends.cuda_library_version()}"
    else:
        yield "cuda library", f"no: {reason}"
    for extra, names in EXTRAS.items():
        yield f"extra {extra}", ", ".join(f"{name} {_version(name)}" for name in names)


def _devices() -> list[str]:
    """Where tensors can be: the CPU, and every GPU that torch has support for."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    if gpu is None:
        return ["cpu"]
    return ["cpu", *(f"{gpu.type}:{n}" for n in range(torch.accelerator.device_count()))]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


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
    if name is None:
        return next(iter(_devices()[1:]), "cpu")
    if name not in _devices() and f"{name}:0" not in _devices():
        raise ValueError(f"--device must be one of {', '.join(_devices())}, got {name}")
    return name


def _sources(lr: Path, ref: Path) -> list[Path]:
    for path in (lr, ref):
        if not path.exists():
            raise FileNotFoundError(f"cannot read {path}: no such file or folder")
    if not lr.is_dir():
        return [lr]
    found = sorted(path for path in lr.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{lr} holds no pictures ({_ENDINGS})")
    return found


def _reference_for(source: Path, ref: Path) -> Path:
    """`ref`, or the picture in it with the same name, at least without its suffix."""
    if not ref.is_dir():
        return ref
    if (ref / source.name).is_file():
        return ref / source.name
    found = [ref / (source.stem + suffix) for suffix in SUFFIXES]
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        raise ValueError(f"{source} has {len(found)} references in {ref}, one is expected")
    return found[0]


def _result_path(source: Path, low: Image, output: Path | None, suffix: str, ext: str) -> Path:
    if output is not None and not output.is_dir():
        return output
    ending = f".{ext}"
    if ext == "auto":
        ending = ".png" if images.why_not_in(source.suffix, low) else source.suffix
    return (output or source.parent) / (source.stem + suffix + ending)


def _report(path: Path, image: Image, start: float, quiet: bool) -> None:
    if not quiet:
        height, width = image.size
        typer.echo(f"{path} ({width} x {height}, {time.perf_counter() - start:.1f} s)")


@contextmanager
def _progress(what: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, gone when done; one picture alone has no measure and only pulses."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    disable = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        task = progress.add_task(what, total=total if total > 1 else None)
        yield lambda: progress.advance(task)


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except _ERRORS as error:
        _fail(_one_line(error))


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
