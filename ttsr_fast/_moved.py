"""Former names of modules and classes, importable with a warning until version 0.3."""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

NEW_NAMES = {
    "ttsr_fast.backends": "ttsr_fast.operators.backends",
    "ttsr_fast.bank": "ttsr_fast.upscaling.bank",
    "ttsr_fast.build": "ttsr_fast.operators.build",
    "ttsr_fast.pairs": "ttsr_fast.datasets",
    "ttsr_fast.pictures": "ttsr_fast.visualize",
    "ttsr_fast.plan": "ttsr_fast.upscaling.plan",
    "ttsr_fast.training.datasets": "ttsr_fast.training.data",
}
NEW_ATTRIBUTES = {"Draws": "EpochSampler"}


class _Moved(MetaPathFinder, Loader):
    """Finder and loader of the former names: each module forwards every attribute."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, _Moved()) if name in NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> None:
        """An ordinary module."""

    def exec_module(self, module: ModuleType) -> None:
        new = importlib.import_module(_new_name(module.__name__))
        module.__getattr__ = lambda name: getattr(  # type: ignore[method-assign]
            new, NEW_ATTRIBUTES.get(name, name)
        )

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        spec = importlib.util.find_spec(_new_name(name))
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]


def _new_name(name: str) -> str:
    warnings.warn(f"{name} is now {NEW_NAMES[name]}", FutureWarning, stacklevel=2)
    return NEW_NAMES[name]


def install() -> None:
    """Make the former names importable."""
    sys.meta_path.append(_Moved())
