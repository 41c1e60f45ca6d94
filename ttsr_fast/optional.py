"""Import of packages that an installation may lack."""

import importlib
from typing import Any


def optional(module: str, message: str, error: type[Exception] = ImportError) -> Any:
    """A module, imported when it is needed.

    Args:
        module: dotted name.
        message: purpose and command of the installation.
        error: type of the exception.

    Raises:
        ImportError: the module, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise error(message) from cause
