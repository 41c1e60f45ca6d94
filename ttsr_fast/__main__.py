"""`python -m ttsr_fast` is the command line."""

from ttsr_fast.cli import main

main()
