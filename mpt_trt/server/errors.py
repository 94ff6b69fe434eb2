"""Errors in OpenAI's format."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """An error that a client sees.

    status: HTTP status. kind: OpenAI's `type`. param: the field of the request. code: OpenAI's
    code, for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.kind, self.param, self.code = kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        content = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": content}


def overloaded(limit: int) -> ApiError:
    """Too many requests are running or waiting."""
    message = f"{limit} requests are running or waiting already; try again later"
    return ApiError(429, message, "rate_limit_error", code="queue_full")


def timed_out(seconds: float) -> ApiError:
    """The time for a request is over."""
    message = f"the request took longer than {seconds:g} s; lower max_tokens or try again later"
    return ApiError(504, message, "timeout_error", code="timeout")


def failed() -> ApiError:
    """The engine failed; the reason is in the server's log, not in the response."""
    return ApiError(500, "the engine failed while it ran the request", "server_error")


def stopping() -> ApiError:
    """The server is ending."""
    return ApiError(503, "the server is shutting down", "server_error", code="shutting_down")
