"""The one family of errors that a user can act on.

A message is one line: the thing that is wrong, and the mend. They are raised where the fact is known and caught once,
by the command line (exit code 2) and by the server (status 4xx).
"""


class NanohybridError(Exception):
    """Something the user can mend. The message is one line."""


class ConfigError(NanohybridError):
    """A configuration that contradicts itself or that no model here can have."""


class CheckpointError(NanohybridError):
    """A checkpoint directory whose files are missing, damaged or disagree; names file and tensor."""


class InputError(NanohybridError):
    """An argument, recipe or input file that cannot be used as it is."""


class MissingExtraError(NanohybridError):
    """An optional dependency is not installed; names the `pip install` that brings it."""


def shown(value: object) -> str:
    """A value that someone else wrote, as an error message quotes it: one line of at most 60 characters."""
    try:
        text = value if isinstance(value, str) and value.isprintable() else repr(value)
    except ValueError:  # Python spells no integer of more than 4,300 digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 60 else text[:57] + "..."
