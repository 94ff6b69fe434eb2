"""HTTP routes: OpenAI's interface, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mpt_trt.errors import MptTrtError
from mpt_trt.server import errors
from mpt_trt.server.errors import ApiError
from mpt_trt.server.protocol import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from mpt_trt.server.responses import (
    ChatFormat,
    CompletionFormat,
    Envelope,
    usage_of,
)
from mpt_trt.server.service import Generation, Job, Part, Service
from mpt_trt.system.json_text import parse_json_object

log = logging.getLogger(__name__)

Format = CompletionFormat | ChatFormat
Handler = Callable[[Request], Awaitable[Response]]
# Made once, which takes as long as a chunk.
ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
# Status in the metrics when the client has gone.
CLIENT_GONE = 499


def make_app(service: Service, api_key: str | None) -> FastAPI:
    """Makes the application. api_key: what clients must send as bearer token; None: nothing."""
    routes = _Routes(service)
    app = FastAPI(title="mpt-trt", docs_url=None, redoc_url=None, openapi_url=None)

    def add(path: str, method: str, handler: Handler, is_open: bool = False) -> None:
        key = None if is_open else api_key
        app.add_api_route(
            path, _guarded(path, handler, service, key), methods=[method], response_model=None
        )

    add("/health", "GET", routes.health, is_open=True)
    add("/metrics", "GET", routes.metrics)
    add("/v1/models", "GET", routes.models)
    add("/v1/models/{name:path}", "GET", routes.model)
    add("/v1/completions", "POST", routes.completions)
    add("/v1/chat/completions", "POST", routes.chat_completions)
    app.add_exception_handler(HTTPException, _http_error)
    return app


class _Routes:
    """Handlers, which raise ApiError."""

    def __init__(self, service: Service):
        self._service = service
        self._started = int(time.time())

    async def health(self, _: Request) -> Response:
        if not self._service.is_running:
            raise errors.stopping()
        return _json({"status": "ok"})

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._service.require_model(request.path_params["name"])
        return _json(self._model())

    async def completions(self, request: Request) -> Response:
        asked = parse_completion(await self._body(request))
        self._service.require_model(asked.model)
        jobs = await self._service.completion_jobs(asked)
        decoder = self._service.decoder
        echoes = [""] * (len(jobs) * asked.n)
        if asked.echo:
            texts = [
                prompt if isinstance(prompt, str) else decoder.decode(prompt)
                for prompt in asked.prompts
            ]
            echoes = [text for text in texts for _ in range(asked.n)]
        shape = CompletionFormat(decoder, asked.logprobs is not None, echoes)
        return await self._respond(request, asked, jobs, shape)

    async def chat_completions(self, request: Request) -> Response:
        asked = parse_chat(await self._body(request))
        self._service.require_model(asked.model)
        jobs = self._service.chat_jobs(asked)
        shape = ChatFormat(self._service.decoder, bool(asked.logprobs))
        return await self._respond(request, asked, jobs, shape)

    async def _respond(
        self,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        jobs: list[Job],
        shape: Format,
    ) -> Response:
        generation = self._service.start(jobs)
        watcher = asyncio.create_task(_cancel_when_gone(request, generation))
        if asked.stream:
            chunks = self._chunks(generation, jobs, shape, asked, watcher)
            return StreamingResponse(chunks, media_type="text/event-stream")
        try:
            return await self._whole(generation, jobs, shape)
        finally:
            watcher.cancel()

    async def _whole(self, generation: Generation, jobs: list[Job], shape: Format) -> Response:
        usage = usage_of(jobs)
        choices: list[list[Part]] = [[] for job in jobs for _ in range(job.n)]
        async for parts in self._timed(generation):
            for part in parts:
                choices[part.choice].append(part)
                usage.completion_tokens += part.new is not None
        if not all(each and each[-1].finish_reason for each in choices):
            raise ClientDisconnect
        envelope = Envelope(shape.kind, self._service.model_name, shape.prefix)
        content = [shape.whole(index, each) for index, each in enumerate(choices)]
        return _json(envelope.content(content, usage=usage.content()))

    async def _chunks(
        self,
        generation: Generation,
        jobs: list[Job],
        shape: Format,
        asked: CompletionRequest | ChatRequest,
        watcher: asyncio.Task[None],
    ) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk per token, an error if there is one, and the end."""
        usage = usage_of(jobs)
        envelope = Envelope(shape.chunk_kind, self._service.model_name, shape.prefix)
        lengths: dict[int, int] = {}

        def event(part: Part) -> bytes:
            usage.completion_tokens += part.new is not None
            is_first, offset = part.choice not in lengths, lengths.get(part.choice, 0)
            lengths[part.choice] = offset + len(part.text)
            more = {"usage": usage.content()} if asked.wants_continuous_usage else {}
            return _event(envelope.content([shape.chunk(part, is_first, offset)], **more))

        try:
            async for parts in self._timed(generation):
                yield b"".join(map(event, parts))
            if asked.wants_usage:
                yield _event(envelope.content([], usage=usage.content()))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)
        finally:
            generation.cancel()
            watcher.cancel()

    async def _timed(self, generation: Generation) -> AsyncIterator[list[Part]]:
        """Yields the parts, and records the times between them."""
        metrics = self._service.metrics
        last: dict[int, float] = {}
        started = time.perf_counter()
        async with contextlib.aclosing(generation.parts()) as every:
            async for parts in every:
                now = time.perf_counter()
                for part in parts:
                    if part.choice in last:
                        metrics.between_tokens_s.observe(now - last[part.choice])
                    else:
                        metrics.first_token_s.observe(now - started)
                    last[part.choice] = now
                yield parts

    async def _body(self, request: Request) -> dict[str, Any]:
        limits = self._service.limits
        content = bytearray()
        try:
            async with asyncio.timeout(limits.timeout_s):
                async for piece in request.stream():
                    content += piece
                    if len(content) > limits.max_body_bytes:
                        message = f"the body is larger than {limits.max_body_bytes} bytes"
                        raise ApiError(413, message, code="request_too_large")
        except TimeoutError:
            raise errors.timed_out(limits.timeout_s) from None
        try:
            return parse_json_object(bytes(content), Path("body"), "send a JSON object")
        except MptTrtError as error:
            raise ApiError(400, str(error)) from None

    def _model(self) -> dict[str, Any]:
        name = self._service.model_name
        return {"id": name, "object": "model", "created": self._started, "owned_by": "mpt-trt"}


def _guarded(path: str, handler: Handler, service: Service, api_key: str | None) -> Handler:
    """Wraps a handler: checks the key, answers errors in OpenAI's format, and counts."""

    async def guarded(request: Request) -> Response:
        try:
            _require_key(request, api_key)
            response = await handler(request)
        except ApiError as error:
            response = _json(error.body, error.status)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_GONE)
        except Exception:
            log.exception("a request to %s failed", path)
            response = _json(errors.failed().body, 500)
        service.metrics.requests.labels(path, str(response.status_code)).inc()
        # The client chooses query and address; repr escapes control characters.
        client = request.client.host if request.client else "unknown"
        log.info("%s %s %r %d", client, request.method, request.url.path, response.status_code)
        return response

    return guarded


def _require_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        raise ApiError(401, message, "authentication_error", code="invalid_api_key")


async def _cancel_when_gone(request: Request, generation: Generation) -> None:
    """Waits until the client disconnects, and then frees its request's rows."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    generation.cancel_from_outside()


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers unknown paths and methods."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return _json(ApiError(error.status_code, message).body, error.status_code)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return Response(_encoded(content), status, headers, "application/json")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _encoded(content) + b"\n\n"


def _encoded(content: dict[str, Any]) -> bytes:
    # ASCII, because clients can send lone surrogates, which have no UTF-8.
    return ENCODER.encode(content).encode()
