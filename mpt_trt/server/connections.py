"""HTTP connections that are closed when no request comes."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

# Seconds for the headers of a request, the first one or another one. uvicorn itself waits for ever
# for the first, so that connections which send nothing, or a byte now and then, could keep all
# others out. It waits 5 s for another one, as long as httpx and OpenAI's client keep a connection:
# a request just before the end would find it closed.
HEADER_SECONDS = 15.0


class HttpProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with a time limit for headers; the application limits the body's time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.timeout_keep_alive = HEADER_SECONDS
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Starts the time limit when a request is awaited, and stops it when there is one."""
        if not self._is_waiting():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _is_waiting(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        self._timer = None
        if self._is_waiting():
            self.transport.close()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
