"""The one exception that users see."""

from __future__ import annotations


class MptTrtError(ValueError):
    """Bad input or an unusable environment.

    The message names the file, the field, the value and the remedy in one or two sentences.
    Command-line tools print it without a traceback and exit with status 1.
    """


class SharedError(MptTrtError):
    """An error that every rank of an engine raises with the same message; only rank 0 prints it."""
