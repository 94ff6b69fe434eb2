"""The one exception that users see."""

from __future__ import annotations


class MptTrtError(ValueError):
    """Bad input or an unusable environment.

    The message is one sentence or two that name the file, the field, the value and the remedy. The
    command-line tools print it without a traceback and exit with status 1.
    """


class SharedError(MptTrtError):
    """An error that every rank of an engine meets in the same words; the first one reports it."""
