"""Log messages on stderr: columns drawn by Rich on a terminal, otherwise a line per message."""

from __future__ import annotations

import logging
import sys

from mpt_trt.errors import MptTrtError


def set_up_logging(level: str) -> None:
    """Log to stderr. level: a level name of the logging module, in any case.

    Raises MptTrtError for an unknown level.
    """
    if level.upper() not in logging.getLevelNamesMapping():
        raise MptTrtError(f"log level {level!r}: known are debug, info, warning, error, critical")
    handler = _rich_handler() if sys.stderr.isatty() else _plain_handler()
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The hub's client logs every request, and also prints its own messages.
    logging.getLogger("huggingface_hub").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _plain_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    return handler


def _rich_handler() -> logging.Handler:
    from rich.console import Console  # takes a tenth of a tool's start
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, markup=False)
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
