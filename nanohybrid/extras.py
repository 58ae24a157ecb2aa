<<<<<<< HEAD
"""Imports of optional dependencies, with an error that has the `pip install` command."""
=======
"""Imports of optional dependencies. One function says which is missing, and which `pip install` installs it."""
>>>>>>> 3c3fde9 (Errors, extras, files: plain English)

import importlib
from types import ModuleType

from nanohybrid.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
<<<<<<< HEAD
    """Import `module`, which the extra `extra` of this package installs. Raises MissingExtraError if it is not installed."""
=======
    """Import and return `module`, which the extra `extra` of this package installs.

    Raises MissingExtraError with the `pip install` command where it is not installed. An error inside an installed module is
    raised as it is.
    """
>>>>>>> 3c3fde9 (Errors, extras, files: plain English)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
<<<<<<< HEAD
            raise  # the package is installed, but one of its own imports fails
=======
            raise  # the package is installed, and something inside it is broken
>>>>>>> 3c3fde9 (Errors, extras, files: plain English)
        name = module.partition(".")[0].replace("_", "-")
        raise MissingExtraError(f"this needs the package {name}: pip install 'nanohybrid[{extra}]'") from None
