"""Responses in OpenAI's format, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpt_trt.generation.text import Decoder, GrowingText
from mpt_trt.scheduling.scheduler import NewToken
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
        echo = self.echoes[part.choice]
        text = echo + part.text if is_first else part.text
        offsets = [len(echo) + offset]
        return self._choice(part.choice, text, [part], offsets, part.finish_reason)

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
        prompt = parts[0].prompt
        starts = token_starts(self.decoder, [each.token for each in prompt])
        end = len(self.echoes[parts[0].choice])
        tokens = [*prompt, *(part.new for part in parts if part.new is not None)]
        names = [self._name(each.token) for each in tokens]
        return {
            "tokens": names,
            "token_logprobs": [_finite(each.log_prob) for each in tokens],
            "top_logprobs": [self._top(each) for each in tokens],
            "text_offset": [min(start, end) for start in starts]
            + offsets[: len(tokens) - len(prompt)],
        }

    def _top(self, token: NewToken) -> dict[str, float | None] | None:
        """Returns log-probabilities by name; None for the first token of a prompt."""
        if token.log_prob is None:
            return None
        return {self._name(other): _finite(log_prob) for other, log_prob in token.top}

    def _name(self, token: int) -> str:
        return self.decoder.decode([token], skip_special_tokens=False)


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
            tokens = [part.new for part in parts if part.new is not None]
            log_probs = {"content": [self._log_prob(new) for new in tokens]}
        return {"index": index, key: content, "logprobs": log_probs, "finish_reason": reason}

    def _log_prob(self, new: NewToken) -> dict[str, Any]:
        top = [self._token(token, log_prob) for token, log_prob in new.top]
        return {**self._token(new.token, new.log_prob), "top_logprobs": top}

    def _token(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self.decoder.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": _finite(log_prob), "bytes": list(text.encode())}


def token_starts(decoder: Decoder, tokens: Sequence[int]) -> list[int]:
    """First character of each token in the text of all, where special tokens have no text.

    A character that several tokens make up belongs to each of them.
    """
    starts, text = [], GrowingText(decoder)
    for token in tokens:
        starts.append(text.num_certain)
        text.add([token])
    return starts


def _finite(log_prob: float | None) -> float | None:
    return None if log_prob is None else max(log_prob, LEAST_LOG_PROB)
