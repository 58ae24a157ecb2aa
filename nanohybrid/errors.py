"""Errors that a user can act on.

<<<<<<< HEAD
A message is one line that names the problem and the fix. The command line catches these errors (exit code 2), and so does the server
(HTTP 4xx).
=======
A message is one line that names what is wrong and how to fix it. An error is raised where the fact is known and caught once:
by the command line (exit code 2) or by the server (status 4xx).
>>>>>>> 3c3fde9 (Errors, extras, files: plain English)
"""


class NanohybridError(Exception):
<<<<<<< HEAD
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
=======
    """The base class: something that the user can fix. The message is one line."""


class ConfigError(NanohybridError):
    """A configuration that contradicts itself, or that no model of this package can have."""


class CheckpointError(NanohybridError):
    """Files of a checkpoint are missing, damaged or contradict each other. The message names file and tensor."""


class InputError(NanohybridError):
    """An argument, recipe or input file cannot be used."""


class MissingExtraError(NanohybridError):
    """An optional dependency is not installed. The message names the `pip install` that installs it."""


def shown(value: object) -> str:
    """A value from a file or a request as an error message quotes it: one line of at most 60 characters."""
>>>>>>> 3c3fde9 (Errors, extras, files: plain English)
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."
