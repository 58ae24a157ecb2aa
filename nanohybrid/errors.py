"""Errors that a user can act on.

A message is one line that names the problem and the fix. The command line catches these errors (exit code 2),
and so does the server (HTTP 4xx).
"""


class NanohybridError(Exception):
    """A problem that the user can fix. The message is one line."""


class ConfigError(NanohybridError):
    """A configuration that contradicts itself or is not supported."""


class CheckpointError(NanohybridError):
    """Missing, damaged or contradictory files of a checkpoint; the message names file and tensor."""


class InputError(NanohybridError):
    """An argument, recipe or input file that cannot be used."""


class MissingExtraError(NanohybridError):
    """An optional dependency is not installed; the message has the `pip install` command."""


def shown(value: object) -> str:
    """An untrusted value for an error message: one line of at most 60 characters."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."
