"""Command line: arguments, progress, and one line for every error.

Slow imports are inside the commands, so that `--help` is quick.
"""

import logging
import signal
import sys

from ttsr_fast.cli.signals import at_start, exit_at_signals


def main() -> None:
    """Program `ttsr-fast`."""
    line = "error: interrupted: nothing has been done"
    at_start.enter_context(exit_at_signals(lambda name: line, signal.SIGINT, signal.SIGTERM))
    from ttsr_fast.cli.commands import app
    from ttsr_fast.cli.common import OneLineHandler

    logging.getLogger("ttsr_fast").addHandler(OneLineHandler())
    try:
        app(prog_name="ttsr-fast")
    except OSError as error:  # of standard output, such as a full disk
        sys.exit(f"error: {error}")
