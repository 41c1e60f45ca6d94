"""Finds `ttsr_fast.kernels` in a checkout that is not installed: the folder `kernels`.

    PYTHONPATH=bench/uninstalled:. python ...

Python imports this file at its start. An installed package takes precedence.
"""

import sys
from importlib.util import spec_from_file_location
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "ttsr_fast.kernels":
            return None
        folders = [str(KERNELS)]
        return spec_from_file_location(
            name, KERNELS / "__init__.py", submodule_search_locations=folders
        )


sys.meta_path.append(Finder)
