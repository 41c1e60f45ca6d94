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
    "ttsr_fast.upscale": "ttsr_fast.upscaling",
}
NEW_ATTRIBUTES = {"Draws": "EpochSampler"}


class _Moved(ModuleType):
    """A module that forwards every attribute, and calls of itself to the one of its own name.

    `ttsr_fast.upscale` was a module and is a function: importing it as a module puts this in the
    function's place.
    """

    def __getattr__(self, name: str) -> Any:
        new = importlib.import_module(NEW_NAMES[self.__name__])
        return getattr(new, NEW_ATTRIBUTES.get(name, name))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(self, self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class _Finder(MetaPathFinder, Loader):
    """Finder and loader of the former names."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(spec.name)
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Attributes are looked up when they are needed."""

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        _warn(name)
        spec = importlib.util.find_spec(NEW_NAMES[name])
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]


def _warn(name: str) -> None:
    warnings.warn(f"{name} is now {NEW_NAMES[name]}", FutureWarning, stacklevel=2)


def install() -> None:
    """Make the former names importable."""
    sys.meta_path.append(_Finder())
