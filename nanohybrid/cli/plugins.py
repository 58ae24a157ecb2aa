"""Files of the user's that register kinds of layers, loaded before a command runs."""

import importlib.util
import os
from pathlib import Path

from nanohybrid.errors import InputError

VARIABLE = "NANOHYBRID_MIXERS"


def load_mixers() -> None:
    """Run the Python files that the environment variable NANOHYBRID_MIXERS names, separated as PATH is.

    Raises InputError in one line where a file is missing or fails.
    """
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        path = Path(name)
        spec = importlib.util.spec_from_file_location(f"nanohybrid_mixers_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"{VARIABLE} names {path}: it must be a Python file that registers a mixer")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:  # whatever the user's file raises
            raise InputError(f"{VARIABLE}: {path}: {type(error).__name__}: {error}") from error
