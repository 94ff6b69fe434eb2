"""Responses in OpenAI's format, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpt_trt.generation.text import Decoder
from mpt_trt.server.service import Job, Part

# Value that OpenAI reports for tokens that cannot come.
LEAST_LOG_PROB = -9999.0


@dataclass
class Usage:
    """Numbers of tokens of a request."""

    prompt_tokens: int
    completion_tokens: int = 0

    def content(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {**vars(self), "total_tokens": total}


def usage_of(jobs: Sequence[Job]) -> Usage:
    """Counts the tokens of all prompts."""
    return Usage(sum(len(job.prompt) for job in jobs))


@dataclass
class Envelope:
    """Fields that a response's chunks share. kind: `object` of whole responses and of chunks."""

    kind: str
    model: str
    prefix: str
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def content(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


@dataclass
class CompletionFormat:
    """Choices of /v1/completions. echoes: text before each choice's own."""

    decoder: Decoder
    wants_log_probs: bool
    echoes: list[str]
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def chunk(self, part: Part, is_first: bool, offset: int) -> dict[str, Any]:
        """One part of a stream. offset: characters of the choice before this part."""
        echo = self.echoes[part.choice] if is_first else ""
        return self._choice(part.choice, echo + part.text, [part], [offset], part.finish_reason)

    def whole(self, index: int, parts: list[Part]) -> dict[str, Any]:
        echo = self.echoes[index]
        offsets, length = [], len(echo)
        for part in parts:
            offsets.append(length)
            length += len(part.text)
        text = echo + "".join(part.text for part in parts)
        return self._choice(index, text, parts, offsets, parts[-1].finish_reason)

    def _choice(
        self, index: int, text: str, parts: list[Part], offsets: list[int], reason: str | None
    ) -> dict[str, Any]:
        log_probs = self._log_probs(parts, offsets) if self.wants_log_probs else None
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": reason}

    def _log_probs(self, parts: list[Part], offsets: list[int]) -> dict[str, Any]:
        def name(token: int) -> str:
            return self.decoder.decode([token], skip_special_tokens=False)

        return {
            "tokens": [name(part.new.token) for part in parts],
            "token_logprobs": [_finite(part.new.log_prob) for part in parts],
            "top_logprobs": [
                {name(token): _finite(log_prob) for token, log_prob in part.new.top}
                for part in parts
            ],
            "text_offset": offsets,
        }


@dataclass
class ChatFormat:
    """Choices of /v1/chat/completions."""

    decoder: Decoder
    wants_log_probs: bool
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def chunk(self, part: Part, is_first: bool, offset: int) -> dict[str, Any]:
        """One part of a stream; the first one names the role."""
        role = {"role": "assistant"} if is_first else {}
        delta = {**role, "content": part.text}
        return self._choice(part.choice, "delta", delta, [part], part.finish_reason)

    def whole(self, index: int, parts: list[Part]) -> dict[str, Any]:
        text = "".join(part.text for part in parts)
        message = {"role": "assistant", "content": text}
        return self._choice(index, "message", message, parts, parts[-1].finish_reason)

    def _choice(
        self, index: int, key: str, content: dict[str, str], parts: list[Part], reason: str | None
    ) -> dict[str, Any]:
        log_probs = None
        if self.wants_log_probs:
            log_probs = {"content": [self._log_prob(part) for part in parts]}
        return {"index": index, key: content, "logprobs": log_probs, "finish_reason": reason}

    def _log_prob(self, part: Part) -> dict[str, Any]:
        top = [self._token(token, log_prob) for token, log_prob in part.new.top]
        return {**self._token(part.new.token, part.new.log_prob), "top_logprobs": top}

    def _token(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self.decoder.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": _finite(log_prob), "bytes": list(text.encode())}


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, LEAST_LOG_PROB)
