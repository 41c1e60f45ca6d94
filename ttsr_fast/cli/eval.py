"""`ttsr-fast eval`: PSNR and SSIM over a data set."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table as Sheet
from rich.text import Text

from ttsr_fast.choices import EVALUATED, LAYOUTS, PROTOCOLS, REFERENCES
from ttsr_fast.cli.common import (
    SOME_FAILED,
    Backend,
    Device,
    MaxMemory,
    Precision,
    Quiet,
    Weights,
    errors_in_one_line,
    fail,
    fitting,
    flag,
    loading,
    one_of,
    progress_bar,
    say,
)
from ttsr_fast.files import check_writable

if TYPE_CHECKING:
    from ttsr_fast.evaluation.table import Table


def eval_command(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the data set.")],
    layout: Annotated[str | None, one_of(LAYOUTS, "How its files are laid out.", "folders")] = None,
    references: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="For cufed5 and sun80 numbers, as 1 or 1,2,3,4,5; for folders the folder of "
            "references; for urban100 and manga109 a list of them in a text file.",
            show_default="1 for cufed5, otherwise all",
        ),
    ] = None,
    mode: Annotated[
        str | None,
        one_of(
            REFERENCES,
            "Of several references only the first, each patch from the best of all, or all stacked "
            "into one image of 500 pixels width.",
            "all if --references names several, otherwise first",
        ),
    ] = None,
    weights: Weights = None,
    method: Annotated[str | None, one_of(EVALUATED, "Instead of --weights.", "none")] = None,
    protocol: Annotated[str | None, one_of(PROTOCOLS, "Whose PSNR and SSIM.", "ttsr")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="For the table, as CSV.")] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For the table, as JSON.")
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For comparisons: bicubic, result, truth, references."),
    ] = None,
    skip: Annotated[bool, flag("--skip", help="Skip pairs that cannot be evaluated.")] = False,
    device: Device = None,
    max_memory: MaxMemory = None,
    backend: Backend = None,
    precision: Precision = None,
    quiet: Quiet = False,
) -> None:
    """Measure PSNR and SSIM over a data set.

    Every image is reduced four times, upscaled again with its references, and compared.

    In several processes, on as many GPUs: torchrun --nproc-per-node 2 -m ttsr_fast eval ...

    Exit codes: 0 all done, 1 some images were skipped, 2 bad input.
    """
    with errors_in_one_line(), _processes() as rank:
        with loading():
            import torch

            from ttsr_fast.cli.inputs import device_named, memory_limit
            from ttsr_fast.datasets import check_other_file, find_pairs
            from ttsr_fast.evaluation import evaluate
            from ttsr_fast.model import load_model

        if (weights is None) == (method is None):
            raise ValueError("either --weights or --method is needed, and not both")
        tables = [path for path in (csv, json) if path is not None]
        for path in tables:
            check_writable(path)
        if (layout or "folders") == "folders" and references is None:
            raise ValueError("--references FOLDER is needed for --layout folders")
        pairs = find_pairs(root, layout or "folders", references=_references(layout, references))
        read = [file for pair in pairs for file in (pair.hr, *pair.references)]
        read += [Path(name) for name in (weights, references) if name is not None]
        for path in tables:
            check_other_file(path, read)
        if len({path.resolve() for path in tables}) < len(tables):
            raise ValueError("--csv and --json must be two files")
        where = torch.device(device_named(device or _own_gpu()))
        model = load_model(weights).to(where) if weights is not None else str(method)
        with progress_bar("evaluating", len(pairs), quiet or rank > 0) as (step, _):
            table = evaluate(
                model,
                pairs,
                protocol=protocol or "ttsr",
                references=mode or ("all" if "," in (references or "") else "first"),
                device=None if weights is not None else where,
                max_memory=memory_limit(max_memory),
                precision=precision,
                backend=backend,
                on_error="skip" if skip else "raise",
                pictures=pictures,
                progress=lambda *_: step(),
            )
        if rank > 0:
            return
        if csv is not None:
            table.to_csv(csv)
        if json is not None:
            table.to_json(json)
        if not quiet:
            _show(table)
    for failure in table.failures:
        say(f"error: {failure.message}", err=True)
    if table.failures:
        total = len(table.rows) + len(table.failures)
        fail(f"{len(table.failures)} of {total} images failed", SOME_FAILED)


def _references(layout: str | None, text: str | None) -> Any:
    """Argument `references` of `find_pairs`."""
    if text is None or layout not in ("cufed5", "sun80"):
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--references must be numbers, as 1 or 1,2,3, got {text}") from None


@contextmanager
def _processes() -> Iterator[int]:
    """Rank of this process; the processes of torchrun form a group meanwhile."""
    with loading():
        import torch.distributed as dist

    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched:
        yield 0
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _own_gpu() -> str | None:
    """GPU of a process of torchrun, by its rank on the machine."""
    import torch

    number = os.environ.get("LOCAL_RANK")
    if number is None or not torch.cuda.is_available():
        return None
    return f"cuda:{int(number) % torch.cuda.device_count()}"


def _show(table: "Table") -> None:
    sheet = Sheet(box=box.SIMPLE_HEAD, show_footer=True)
    sheet.add_column("image", "mean", overflow="fold")
    sheet.add_column("PSNR", f"{table.psnr:.3f}", justify="right")
    sheet.add_column("SSIM", f"{table.ssim:.4f}", justify="right")
    sheet.add_column("references", overflow="fold")
    for row in table.rows:
        numbers = f"{row.psnr:.3f}", f"{row.ssim:.4f}"
        sheet.add_row(_literal(row.name), *numbers, _literal(" ".join(row.references)))
    Console().print(sheet)
    counted, failed = len(table.rows), len(table.failures)
    if failed:
        typer.echo(f"the mean leaves out {failed} of {counted + failed} images, which failed")
    if table.equal:
        typer.echo(f"the mean PSNR leaves out {table.equal} results equal to the truth")
    used = "" if table.method == "bicubic" else f", references: {table.references}"
    typer.echo(
        f"{table.method}, protocol {table.protocol}{used}: {counted} images, "
        f"{table.seconds:.2f} s each"
    )


def _literal(text: str) -> Text:
    """A cell; a string would be parsed as markup."""
    return Text(fitting(text, sys.stdout))
