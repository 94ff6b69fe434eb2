"""The engine as HTTP handlers use it: generations with a limited queue and a time limit."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpt_trt.api.outputs import FinishReason
from mpt_trt.api.text import EngineText, Prompt
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.text import Decoder, GeneratedText
from mpt_trt.scheduling.scheduler import NewToken, Request, Scheduler
from mpt_trt.scheduling.worker import Worker
from mpt_trt.server import errors
from mpt_trt.server.errors import ApiError
from mpt_trt.server.metrics import Metrics
from mpt_trt.server.outbox import Outbox
from mpt_trt.server.protocol import ChatRequest, CompletionRequest

log = logging.getLogger(__name__)

# OpenAI's default of /v1/completions.
DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Limits:
    """Limits for clients.

    max_waiting: choices that may wait for a cache row. timeout_s: seconds per request.
    max_body_bytes: size of a request's body.
    """

    max_waiting: int = 64
    timeout_s: float = 300.0
    max_body_bytes: int = 1 << 20


@dataclass(frozen=True)
class Part:
    """A new token of a choice.

    new: None if only the prompt was requested. finish_reason: None unless this is the last part.
    prompt: in the first part, the prompt's tokens, if their log-probabilities were requested.
    """

    choice: int
    text: str
    new: NewToken | None
    finish_reason: FinishReason | None
    prompt: tuple[NewToken, ...] = ()


@dataclass(frozen=True)
class Job:
    """A prompt to continue `n` times.

    wants_prompt: whether log-probabilities of the prompt are requested. wants_tokens: whether
    tokens are generated.
    """

    prompt: tuple[int, ...]
    config: GenerationConfig
    stop: tuple[str, ...]
    n: int
    wants_log_probs: bool
    wants_prompt: bool = False
    wants_tokens: bool = True


class BackendDecoder:
    """Decodes without redirecting stderr, as `Tokenizer` does.

    That takes longer than decoding a token, and would hide what the worker's thread logs meanwhile.
    """

    def __init__(self, text: EngineText):
        tokenizer = text.require_tokenizer()
        self._backend, self.is_open = tokenizer.backend, tokenizer.is_open

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


class Service:
    """Turns requests into generations. All methods belong to the event loop's thread.

    num_live: choices that are running or waiting.
    """

    def __init__(
        self,
        text: EngineText,
        scheduler: Scheduler,
        worker: Worker,
        outbox: Outbox,
        limits: Limits,
        capacity: int,
        model_name: str | None = None,
    ):
        """Takes a worker that is running.

        outbox: the one that the scheduler delivers. capacity: tokens per cache row. model_name:
        name for clients; None: the engine's.
        """
        self.text, self.limits, self.metrics = text, limits, Metrics(scheduler)
        self.decoder: Decoder = BackendDecoder(text)
        self.model_name = model_name or served_name(text.manifest.model_name)
        self._worker, self._outbox, self._capacity = worker, outbox, capacity
        self._max_live = text.manifest.spec.limits.max_batch_size + limits.max_waiting
        self._longest_token = max(map(len, text.require_tokenizer().backend.get_vocab()))
        self.num_live = 0

    @property
    def is_running(self) -> bool:
        return self._worker.is_running

    def require_model(self, name: str) -> None:
        """Raises ApiError unless `name` is the model that is served."""
        if name != self.model_name:
            message = f"the model {name[:100]!r} does not exist; this is {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def completion_jobs(self, request: CompletionRequest) -> list[Job]:
        """Encodes the prompts.

        Raises ApiError for one that cannot be encoded, and when the queue is full.
        """
        count = len(request.prompts) * request.n
        self._require_places(count, "n" if request.n > 1 else "prompt")
        stop = request.stop_strings
        most = DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        field = "max_tokens" if most else "prompt"
        wants_prompt = bool(request.echo) and request.logprobs is not None
        jobs = []
        for prompt in request.prompts:
            job = self._job(request, self._encoded(prompt), stop, most, field)
            jobs.append(replace(job, wants_prompt=wants_prompt, wants_tokens=most > 0))
            # Other clients get their tokens between two prompts.
            await asyncio.sleep(0)
        return jobs

    def chat_jobs(self, request: ChatRequest) -> list[Job]:
        """Encodes the conversation.

        Raises ApiError if it has no template or cannot be encoded, and when the queue is full.
        """
        self._require_places(request.n, "n")
        try:
            template = self.text.template
        except MptTrtError:
            message = (
                "the model has no chat template; use /v1/completions, or start serve.py with "
                "--chat_template"
            )
            raise ApiError(400, message) from None
        messages = [message.plain() for message in request.messages]
        self._require_short(sum(len(message["content"]) for message in messages), "messages")
        prompt = self._encoded(messages)
        stop = (*request.stop_strings, *template.stop)
        by_field = {
            "max_completion_tokens": request.max_completion_tokens,
            "max_tokens": request.max_tokens,
            "messages": max(1, self._capacity - len(prompt)),
        }
        field, most = next((field, most) for field, most in by_field.items() if most)
        return [self._job(request, prompt, stop, most, field)]

    def start(self, jobs: Sequence[Job]) -> Generation:
        """Starts to generate; raises ApiError when the queue is full or a job does not fit."""
        if not self.is_running:
            raise errors.stopping()
        count = sum(job.n for job in jobs)
        self._require_places(count, "n")
        self._outbox.loop = asyncio.get_running_loop()
        generation = Generation(
            jobs, self.decoder, self.limits.timeout_s, self._release, self._outbox
        )
        try:
            self.num_live += count
            generation.submit(self._worker)
        except MptTrtError as error:
            generation.cancel()
            failure = ApiError(400, str(error)) if self.is_running else errors.stopping()
            raise failure from None
        return generation

    def _release(self) -> None:
        self.num_live -= 1

    def _require_places(self, count: int, field: str) -> None:
        """Raises ApiError, naming the field, when so many completions cannot run or wait now."""
        if count > self._max_live:
            message = (
                f"{count} completions in one request are more than the {self._max_live} that may "
                "run and wait; send fewer prompts, or lower n"
            )
            raise ApiError(400, message, param=field)
        if self.num_live + count > self._max_live:
            raise errors.overloaded(self._max_live)

    def _encoded(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            self._require_short(len(prompt), "prompt")
        try:
            return self.text.encode(prompt)
        except MptTrtError as error:
            raise ApiError(400, str(error)) from None

    def _require_short(self, num_characters: int, field: str) -> None:
        """Raises ApiError, naming the field, for a text that cannot fit a cache row.

        Encoding it would take seconds, in which nothing else is answered.
        """
        most = self._capacity * self._longest_token
        if num_characters > most:
            message = (
                f"{field}: {num_characters} characters are more than {self._capacity} tokens can "
                f"have, which a cache row holds: at most {most}; shorten the {field}"
            )
            raise ApiError(400, message, param=field, code="context_length_exceeded")

    def _job(
        self,
        request: CompletionRequest | ChatRequest,
        prompt: list[int],
        stop: tuple[str, ...],
        max_tokens: int,
        field: str,
    ) -> Job:
        """Makes a job. field: field of the request to change if it has too many tokens.

        Raises ApiError, naming the field, when the tokens do not fit a cache row.
        """
        if len(prompt) + max_tokens > self._capacity:
            is_limit = field not in ("prompt", "messages")
            remedy = "shorten the prompt" + (f" or lower {field}" if is_limit else "")
            message = (
                f"a prompt has {len(prompt)} tokens, which with {max_tokens} new ones makes "
                f"{len(prompt) + max_tokens}, but a cache row holds {self._capacity}; {remedy}"
            )
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        end_ids = () if request.ignore_eos else self.text.end_ids
        # GenerationConfig's top_p 0 is no limit; for OpenAI's clients it is the most likely token.
        is_greedy = request.temperature == 0 or request.top_p == 0
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
        config = GenerationConfig(
            max_new_tokens=max(1, max_tokens),
            end_ids=end_ids,
            pad_id=end_ids[0] if end_ids else 0,
            temperature=1.0 if is_greedy else request.temperature,
            top_k=1 if is_greedy else request.top_k,
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            random_seed=seed,
            top_log_probs=request.top_logprobs or 0,
        )
        wants_log_probs = request.top_logprobs is not None
        return Job(tuple(prompt), config, stop, request.n, wants_log_probs)


def served_name(model_name: str) -> str:
    """The model's name without the folders of this machine: a hub id, or a folder's own name."""
    path = Path(model_name)
    return path.name if path.is_absolute() else model_name


class Generation:
    """The choices of one HTTP request while they are generated."""

    def __init__(
        self,
        jobs: Sequence[Job],
        decoder: Decoder,
        timeout_s: float,
        release: Callable[[], None],
        outbox: Outbox,
    ):
        self._jobs, self._decoder = jobs, decoder
        self._release, self._outbox = release, outbox
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s, self._time_out, errors.timed_out(timeout_s))
        self._parts: list[Part] = []
        self._failure: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._requests: dict[int, Request] = {}
        self._worker: Worker | None = None
        self._live = set(range(sum(job.n for job in jobs)))

    def submit(self, worker: Worker) -> None:
        """Queues every choice; raises MptTrtError when one does not fit the engine."""
        self._worker = worker
        choices = ((job, stream) for job in self._jobs for stream in range(job.n))
        for choice, (job, stream) in enumerate(choices):
            self._requests[choice] = self._request(choice, job, stream)
            worker.submit(self._requests[choice])

    async def parts(self) -> AsyncGenerator[list[Part], None]:
        """Yields new tokens of all choices as they come; cancels what is left at the end.

        Raises ApiError when the time is over or the engine fails.
        """
        try:
            while self._live or self._parts or self._failure is not None:
                if self._parts:
                    parts, self._parts = self._parts, []
                    for part in parts:
                        if part.finish_reason is not None:
                            self._end(part.choice)
                    yield parts
                elif self._failure is not None:
                    raise self._failure
                else:
                    self._waiter = self._loop.create_future()
                    await self._waiter
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Frees the rows of all choices that are not finished."""
        self._timer.cancel()
        for choice in list(self._live):
            self._cancel_request(choice)
            self._end(choice)

    def cancel_from_outside(self) -> None:
        """Cancels, and ends `parts`, which another task waits for."""
        self.cancel()
        self._parts = []
        self._wake()

    def _end(self, choice: int) -> None:
        if choice in self._live:
            self._live.remove(choice)
            self._release()

    def _cancel_request(self, choice: int) -> None:
        if self._worker is not None and choice in self._requests:
            self._worker.cancel(self._requests[choice])

    def _request(self, choice: int, job: Job, stream: int) -> Request:
        """Makes a request whose callbacks run in the event loop's thread.

        The worker's thread goes on meanwhile, so a choice that a stop string ends gets a token or
        two that are dropped.
        """
        text = _ChoiceText(choice, job, GeneratedText(self._decoder, job.stop))

        def put(receive: Callable[[Any], None]) -> Callable[[Any], None]:
            return functools.partial(self._outbox.put, receive)

        return Request(
            job.prompt,
            job.config,
            on_token=put(functools.partial(self._receive, text)),
            on_end=put(functools.partial(self._receive_end, text)),
            stream=stream,
            wants_log_probs=job.wants_log_probs,
            on_prompt=put(text.set_prompt) if job.wants_prompt else None,
            wants_tokens=job.wants_tokens,
        )

    def _receive(self, text: _ChoiceText, new: NewToken) -> None:
        """Takes a new token."""
        if text.is_finished or text.choice not in self._live:
            return
        try:
            part = text.part(new)
        except Exception:
            log.exception("token %d has no text", new.token)
            self._fail(errors.failed())
            return
        self._parts.append(part)
        if text.has_stopped:
            self._cancel_request(text.choice)
        self._wake()

    def _receive_end(self, text: _ChoiceText, error: Exception | None) -> None:
        """Takes the end of a choice, which is known already if it has tokens."""
        if text.is_finished or text.choice not in self._live:
            return
        if isinstance(error, FloatingPointError):
            self._fail(ApiError(500, str(error), "server_error"))
        elif error is not None:
            self._fail(errors.failed())
        else:
            self._parts.append(text.part_without_token())
            self._wake()

    def _time_out(self, failure: ApiError) -> None:
        """Ends the generation even if its client does not read what it has got."""
        self._parts = []
        self._fail(failure)

    def _fail(self, failure: ApiError) -> None:
        self._failure = failure
        self.cancel()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ChoiceText:
    """The growing text of a choice.

    is_finished: whether it has all its tokens. has_stopped: whether a stop string ended it.
    """

    def __init__(self, choice: int, job: Job, text: GeneratedText):
        self.choice, self._job, self._text = choice, job, text
        self._prompt: tuple[NewToken, ...] = ()
        self.is_finished = self.has_stopped = False

    def set_prompt(self, tokens: tuple[NewToken, ...]) -> None:
        """Keeps the prompt's tokens for the first part."""
        self._prompt = tokens

    def part(self, new: NewToken) -> Part:
        """Makes the part of a new token."""
        prompt, self._prompt = self._prompt, ()
        reason = self._finish_reason(new.token)
        self.is_finished = reason is not None
        return Part(self.choice, self._text.new_text(self.is_finished), new, reason, prompt)

    def part_without_token(self) -> Part:
        """Makes the only part of a choice without tokens."""
        self.is_finished = True
        return Part(self.choice, "", None, "length", self._prompt)

    def _finish_reason(self, token: int) -> FinishReason | None:
        config = self._job.config
        self.has_stopped = self._text.add(token)
        if self.has_stopped or token in config.end_ids:
            return "stop"
        return "length" if len(self._text.tokens) == config.max_new_tokens else None
