"""Standard streams that may be closed, or that cannot take what is written to them."""

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
    """Descriptor 1; raises MptTrtError, which no other file's error can be mistaken for."""

    def write(self, content: Buffer, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            raise MptTrtError(
                f"cannot write to the standard output: {error.strerror}; redirect it to a file "
                "with enough space, or to a program that reads all of it"
            ) from None


def prepare_standard_streams() -> None:
    """Opens standard streams that are closed, and makes errors of the standard output ours.

    Otherwise the next file that is opened would get the descriptor of a closed stream, and with it
    what libraries print. Writing to a closed standard output stays an error.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor, os.O_WRONLY if descriptor == STDERR else os.O_RDONLY)
    if sys.stderr is None:
        stream = io.BufferedWriter(io.FileIO(STDERR, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(stream, line_buffering=True)
    # Anything else is somebody's replacement, who sees to its errors.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _standard_output(sys.stdout)


def flush_standard_output() -> None:
    """Writes what is buffered; raises MptTrtError when that fails, and drops the rest."""
    try:
        sys.stdout.flush()
    except (MptTrtError, OSError):
        # Python tries again when it ends.
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
