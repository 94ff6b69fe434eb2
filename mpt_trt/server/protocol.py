"""Requests of OpenAI's interface, checked, and the parts of responses."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mpt_trt.checkpoint.chat import Message
from mpt_trt.generation.config import LEAST_PENALTY, MOST_PENALTY
from mpt_trt.server.errors import ApiError
from mpt_trt.system.json_text import shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MOST_CHOICES = 64
MOST_STOP_STRINGS = 16
MOST_TOP_LOGPROBS = 20

PROMPT_KINDS = (
    "a prompt is a text, token ids from 0 to vocab_size - 1, or a list of up to "
    f"{MOST_CHOICES} of either, none of them empty"
)

UNSUPPORTED = {
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "suffix",
    "response_format",
}

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Text = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a streamed response. continuous_usage_stats: vLLM's extension."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """Fields that both kinds of requests have.

    top_k, repetition_penalty and ignore_eos are extensions, with the names that vLLM gave them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=LEAST_PENALTY, le=MOST_PENALTY)
    ignore_eos: bool = False
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOP_STRINGS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # These and the others in UNSUPPORTED are accepted only with values that change nothing.
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("temperature", "top_p", "n", "top_k", "repetition_penalty", mode="before")
    @classmethod
    def _default_for_null(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Returns whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_continuous_usage(self) -> bool:
        """Returns whether every chunk of a stream has the numbers of tokens."""
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats


class CompletionRequest(_Request):
    """Body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MOST_CHOICES),
        ]
    )
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1)
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def top_logprobs(self) -> int | None:
        """Number of most likely tokens to report; None without log-probabilities."""
        return self.logprobs


class ContentPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart]
    name: str | None = None

    def plain(self) -> Message:
        """The message as a chat template takes it."""
        if isinstance(self.content, str):
            return {"role": self.role, "content": self.content}
        return {"role": self.role, "content": "".join(part.text for part in self.content)}


class ResponseFormat(BaseModel):
    """The only format of responses: text."""

    type: Literal["text"]


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    number_of_top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP_LOGPROBS, alias="top_logprobs"
    )
    response_format: ResponseFormat | None = None

    @property
    def top_logprobs(self) -> int | None:
        """Number of most likely tokens to report; None without log-probabilities."""
        return (self.number_of_top_logprobs or 0) if self.logprobs else None


def parse_completion(content: dict[str, Any]) -> CompletionRequest:
    """Checks the body of /v1/completions; raises ApiError, naming the field."""
    request = _parsed(CompletionRequest, content)
    if request.best_of not in (None, request.n):
        raise ApiError(400, "best_of is not supported; leave it out", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens: 0 needs echo", param="max_tokens")
    return request


def parse_chat(content: dict[str, Any]) -> ChatRequest:
    """Checks the body of /v1/chat/completions; raises ApiError, naming the field."""
    request: ChatRequest = _parsed(ChatRequest, content)
    if request.number_of_top_logprobs and not request.logprobs:
        message = f"top_logprobs = {request.number_of_top_logprobs}: it needs logprobs: true"
        raise ApiError(400, message, param="top_logprobs")
    return request


def _parsed(kind: Any, content: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        field = str(details[0]["loc"][0])
        detail = _most_telling([one for one in details if one["loc"][0] == field])
        message = _in_words(detail, shown(content.get(field)))
        raise ApiError(400, message[:500], param=field[:100]) from None


def _most_telling(details: list[ErrorDetails]) -> ErrorDetails:
    """Finds the error of the type that was meant; a field of several types has errors of each.

    The deepest one, or a value of the right type out of its range, or one of the fewest of a type.
    """
    counts = Counter(detail["loc"][1:2] for detail in details)

    def rank(detail: ErrorDetails) -> tuple[int, bool, int]:
        is_of_type = not detail["type"].endswith("_type")
        return len(detail["loc"]), is_of_type, -counts[detail["loc"][1:2]]

    return max(details, key=rank)


def _in_words(detail: ErrorDetails, value: str) -> str:
    """Makes the sentence of an error. value: that of the whole field."""
    field, *inner = map(str, detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{field}: unknown field {inner[-1]}" if inner else f"unknown field {field}"
    if detail["type"] == "missing":
        return f"{field}: the field {inner[-1]} is missing" if inner else f"{field} is missing"
    if field in UNSUPPORTED:
        return f"{field} = {value} is not supported; leave it out"
    if field == "messages" and detail["type"] == "literal_error":
        return (
            f"messages: content of the type {shown(detail['input'])} is not supported, only 'text'"
        )
    if field == "prompt" and detail["type"] != "string_unicode":
        is_inner = any(isinstance(place, int) for place in detail["loc"])
        wrong = f", with {shown(detail['input'])} in it" if is_inner else ""
        return f"{field} = {value}{wrong}: {PROMPT_KINDS}"
    return f"{field} = {value}: {detail['msg']}"
