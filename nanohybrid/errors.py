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
