"""Handles standard streams that are closed or cannot be written to."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING

from mpt_trt.errors import MptTrtError

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDIN, STDOUT, STDERR = range(3)


class _StandardOutput(io.FileIO):
    """Descriptor 1, whose errors are MptTrtErrors, distinct from those of other files."""

    def write(self, content: Buffer, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise MptTrtError(
                f"cannot write to the standard output: {error.strerror}; redirect it to a file "
                "with enough space, or to a program that reads all of it"
            ) from None


def prepare_standard_streams() -> None:
    """Opens closed standard streams, and turns errors of the standard output into MptTrtError.

    Otherwise the next opened file would get the descriptor of a closed stream, and the output of
    libraries with it. Writing to a closed standard output stays an error.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor, os.O_WRONLY if descriptor == STDERR else os.O_RDONLY)
    if sys.stderr is None:
        stream = io.BufferedWriter(io.FileIO(STDERR, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(stream, line_buffering=True)
    # Any other object is a replacement, whose owner handles its errors.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _standard_output(sys.stdout)


def flush_standard_output() -> None:
    """Writes buffered output; if that fails, drops the rest and raises MptTrtError."""
    try:
        sys.stdout.flush()
    except (MptTrtError, OSError):
        # Otherwise, Python would try again at exit.
        _open_null(STDOUT, os.O_WRONLY)
        with contextlib.suppress(MptTrtError, OSError):
            sys.stdout.flush()
        raise


def _standard_output(replaced: io.TextIOWrapper | None) -> io.TextIOWrapper:
    stream = io.BufferedWriter(_StandardOutput(STDOUT, "w", closefd=False))
    if replaced is None:
        return io.TextIOWrapper(stream)
    return io.TextIOWrapper(
        stream,
        replaced.encoding,
        replaced.errors,
        line_buffering=replaced.line_buffering,
        write_through=replaced.write_through,
    )


def _open_null(descriptor: int, flags: int) -> None:
    opened = os.open(os.devnull, flags)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
