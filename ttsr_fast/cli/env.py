"""`ttsr-fast env`: versions, devices, and backends with reasons where they do not run."""

from typing import Annotated

from ttsr_fast.cli.common import errors_in_one_line, flag, loading, say


def env_command(
    build: Annotated[
        bool, flag("--build", help="First compile the kernels, in CUDA if torch has it.")
    ] = False,
) -> None:
    """Show versions, devices, and backends.

    A backend that does not run here comes with the reason.
    """
    with errors_in_one_line():
        if build:
            from ttsr_fast.operators.build import build_libraries

            for line in build_libraries():
                say(line)
        with loading():
            from ttsr_fast.cli import environment

        for name, value in environment.describe():
            say(f"{name:<20} {value}")
