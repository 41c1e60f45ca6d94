"""Commands of `ttsr-fast`, each in a file of its name; `common` holds shared parts."""

import warnings
from typing import Annotated

import ttsr_fast
from ttsr_fast.cli.common import flag, typer
from ttsr_fast.cli.convert import convert_command
from ttsr_fast.cli.env import env_command
from ttsr_fast.cli.eval import eval_command
from ttsr_fast.cli.match import match_command
from ttsr_fast.cli.train import train_command
from ttsr_fast.cli.upscale import upscale_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("upscale")(upscale_command)
app.command("match")(match_command)
app.command("eval")(eval_command)
app.command("convert")(convert_command)
app.command("train")(train_command)
app.command("env")(env_command)


@app.callback(invoke_without_command=True)
def _program(
    version: Annotated[bool, flag("--version", help="Show the version and exit.")] = False,
) -> None:
    """x4 super-resolution with a reference image."""
    for module in ("PIL", "tifffile"):  # errors say the same
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    if version:
        typer.echo(f"ttsr-fast {ttsr_fast.__version__}")
        raise typer.Exit
