"""Imports of optional dependencies, with an error that has the `pip install` command."""

import importlib
from types import ModuleType

from nanohybrid.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the extra `extra` of this package installs.

    Raises MissingExtraError if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is installed, but one of its own imports fails
        name = module.partition(".")[0].replace("_", "-")
        raise MissingExtraError(f"this needs the package {name}: pip install 'nanohybrid[{extra}]'") from None
