"""Former names of modules, importable with a warning until version 0.3."""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

NEW_NAMES = {
    "backends": "operators.backends",
    "bank": "upscaling.bank",
    "build": "operators.build",
    "pairs": "datasets",
    "pictures": "visualize",
    "plan": "upscaling.plan",
}


class _Moved(MetaPathFinder, Loader):
    """Finder and loader of the former names: each module forwards every attribute."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.rpartition(".")
        return (
            ModuleSpec(name, _Moved()) if package == "ttsr_fast" and module in NEW_NAMES else None
        )

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        new = importlib.import_module(_new_name(module.__name__))
        module.__getattr__ = lambda name: getattr(new, name)  # type: ignore[method-assign]

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        spec = importlib.util.find_spec(_new_name(name))
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]


def _new_name(name: str) -> str:
    new = f"ttsr_fast.{NEW_NAMES[name.rpartition('.')[2]]}"
    warnings.warn(f"{name} is now {new}", FutureWarning, stacklevel=2)
    return new


def install() -> None:
    """Make the former names importable."""
    sys.meta_path.append(_Moved())
