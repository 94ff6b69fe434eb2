"""Keeps TensorRT's error messages, which its own logger prints to the standard output."""

from __future__ import annotations

from typing import Any

# Every build without a GPU logs this harmless message.
EXPECTED = "CUDA driver version is insufficient"


def make_logger(trt: Any) -> Any:
    """Makes a logger that keeps errors, because TensorRT returns None or False on failure.

    `errors` are the messages so far, each on one line; `take()` joins and removes them.
    """

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and EXPECTED not in message:
                self.errors.append(" ".join(message.split()))

        def take(self) -> str:
            errors, self.errors = self.errors, []
            return "; ".join(dict.fromkeys(errors)) or "no message"

    return Logger()
