"""The one exception that users see."""

from __future__ import annotations


class MptTrtError(ValueError):
    """Bad input or an unusable environment.

    The message is one sentence or two that name the file, the field, the value and the remedy. The
    command-line tools print it without a traceback and exit with status 1.
    """
