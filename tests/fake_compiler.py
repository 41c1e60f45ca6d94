"""Stand-in for c++ and nvcc that records how it is called: its output is that in words.

    python tests/fake_compiler.py compute_80 compute_90

The leading words are the architectures that it knows, the others the compiler's arguments. An
object file is the command that made it, a library the commands of its objects and its own.
"""

import re
import shlex
import sys
from pathlib import Path


def main() -> None:
    known = [word for word in sys.argv[1:] if re.fullmatch(r"compute_\d+", word)]
    arguments = sys.argv[1 + len(known) :]
    if "--list-gpu-arch" in arguments:
        sys.stdout.write("\n".join(known))
    if "-o" not in arguments:  # a question
        return
    target = Path(arguments[arguments.index("-o") + 1])
    objects = [Path(word) for word in arguments if word.endswith(".o") and "-shared" in arguments]
    commands = [*(path.read_text() for path in objects), shlex.join(arguments)]
    target.write_text("\n".join(commands))


if __name__ == "__main__":
    main()
