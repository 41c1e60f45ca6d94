"""Former names of modules and what they held, importable with a warning until version 0.3."""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# The modules that hold today what each of these held; the first is its successor.
NEW_NAMES = {
    "ttsr_fast.backends": ("operators.backends", "operators.library", "operators.triton"),
    "ttsr_fast.bank": ("upscaling.bank",),
    "ttsr_fast.build": ("operators.build",),
    "ttsr_fast.pairs": ("datasets",),
    "ttsr_fast.pictures": ("visualize",),
    "ttsr_fast.plan": ("upscaling.plan", "upscaling.memory"),
    "ttsr_fast.training.datasets": ("training.data",),
    "ttsr_fast.upscale": ("upscaling",),
}
NEW_ATTRIBUTES = {
    "DrawnItems": "PairDatasetBase",
    "Draws": "EpochSampler",
    "Pictures": "ImageCache",
    "UnusablePicture": "UnusableImage",
    "turned": "flip_rotate",
}


class _Moved(ModuleType):
    """A module that looks attributes up in its successors; a call goes to the one of its name.

    `ttsr_fast.upscale` was a module and is a function: importing it as a module puts this in the
    function's place.
    """

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return [known for known in dir(self) if not known.startswith("_")]
        for module in _successors(self.__name__):
            if hasattr(module, NEW_ATTRIBUTES.get(name, name)):
                return getattr(module, NEW_ATTRIBUTES.get(name, name))
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({name for module in _successors(self.__name__) for name in dir(module)})

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        function = getattr(self, self.__name__.rpartition(".")[2])
        return function(*arguments, **options)


class _Finder(MetaPathFinder, Loader):
    """Finder and loader of the former names."""

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in NEW_NAMES:
            return None
        successor = importlib.util.find_spec(_successor(name))
        spec = ModuleSpec(name, self, origin=successor.origin if successor else None)
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        _warn(spec.name)
        return _Moved(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Attributes are looked up when they are needed."""

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m`."""
        _warn(name)
        spec = importlib.util.find_spec(_successor(name))
        return spec.loader.get_code(spec.name)  # type: ignore[union-attr]


def _successor(name: str) -> str:
    return f"ttsr_fast.{NEW_NAMES[name][0]}"


def _successors(name: str) -> list[ModuleType]:
    return [importlib.import_module(f"ttsr_fast.{new}") for new in NEW_NAMES[name]]


def _warn(name: str) -> None:
    """A warning at the line that imports the former name, outside of the import system."""
    frame = sys._getframe(1)
    while frame.f_back and (
        frame.f_code.co_filename == __file__ or "importlib" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    place = (frame.f_code.co_filename, frame.f_lineno)
    warnings.warn_explicit(f"{name} is now {_successor(name)}", FutureWarning, *place)


def attribute(name: str) -> ModuleType:
    """A former module as an attribute of the package.

    Raises:
        AttributeError: there was none of this name.
    """
    if f"ttsr_fast.{name}" in NEW_NAMES:
        return importlib.import_module(f"ttsr_fast.{name}")
    raise AttributeError(f"module 'ttsr_fast' has no attribute {name!r}")


def install() -> None:
    """Make the former names importable."""
    sys.meta_path.append(_Finder())
