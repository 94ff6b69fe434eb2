"""Text of an engine: tokenizer, chat template and end tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TypeAlias

from mpt_trt.checkpoint.chat import (
    ChatTemplate,
    Conversation,
    Message,
    chat_prompt,
    choose_template,
)
from mpt_trt.checkpoint.source import tokenizer_folder_of
from mpt_trt.checkpoint.tokenizer import Tokenizer, read_tokenizer
from mpt_trt.engines.manifest import Manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.text import Decoder

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a chat: objects with the strings `role` and `content`."""


@dataclass(frozen=True)
class EngineText:
    """Turns prompts into token ids and tokens into text.

    tokenizer: None if there is none; then prompts are token ids. problem: why there is none.
    chat_template: Jinja file to use instead of the tokenizer's template.
    """

    manifest: Manifest
    tokenizer: Tokenizer | None
    problem: MptTrtError | None = None
    chat_template: Path | None = None

    @classmethod
    def read(
        cls,
        engine_dir: Path,
        manifest: Manifest,
        tokenizer_dir: str | None = None,
        chat_template: Path | None = None,
    ) -> EngineText:
        """Reads the tokenizer of an engine directory.

        tokenizer_dir: hub id or folder of the tokenizer; None: the one in the engine directory, or
        that of its checkpoint, which may be missing.

        Raises MptTrtError when `tokenizer_dir` has no tokenizer, or one that does not fit the
        model. The engine's own is only a problem for prompts that are texts.
        """
        try:
            folder = tokenizer_folder_of(engine_dir, manifest.provenance, tokenizer_dir)
            tokenizer = read_tokenizer(folder).require_fitting(manifest.spec.config.vocab_size)
        except MptTrtError as error:
            if tokenizer_dir is not None:
                raise
            return cls(manifest, None, error, chat_template)
        return cls(manifest, tokenizer, None, chat_template)

    @property
    def decoder(self) -> Decoder:
        """The tokenizer; without one, the text of tokens is their ids."""
        return self.tokenizer or IdsAsText()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """End tokens of the engine; if it records none, that of the tokenizer."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        if not self.manifest.end_ids and own is not None:
            return (own,)
        return self.manifest.end_ids

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; raises MptTrtError when there is none."""
        names = [self.manifest.provenance.get("source"), self.manifest.model_name]
        known = [name for name in names if isinstance(name, str)]
        return choose_template(self.require_tokenizer(), known, self.chat_template)

    def require_tokenizer(self) -> Tokenizer:
        """Returns the tokenizer; raises MptTrtError, with the reason, when there is none."""
        if self.tokenizer is None:
            raise self.problem or MptTrtError("the engine has no tokenizer; give token ids")
        return self.tokenizer

    def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> list[int]:
        """Converts a prompt to token ids.

        add_special_tokens: whether the tokenizer adds its special tokens to a text.

        Raises MptTrtError when the prompt is empty or of another type.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise MptTrtError("a prompt is empty; give at least one character")
            return self.require_tokenizer().encode(prompt, add_special_tokens)
        messages = chat_messages(prompt)
        if messages is not None:
            return chat_prompt(self.require_tokenizer(), self.template, messages)
        return _require_ids(prompt)

    def stop_strings(self, prompts: Sequence[Prompt], stop: Sequence[str]) -> tuple[str, ...]:
        """Returns stop strings, with those of the chat template if a prompt is a chat."""
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if strings:
            self.require_tokenizer()
        has_chat = any(chat_messages(prompt) is not None for prompt in prompts)
        return (*strings, *(self.template.stop if has_chat else ()))


def chat_messages(prompt: Prompt) -> Conversation | None:
    """Returns the messages of a chat; None for other prompts.

    Raises MptTrtError for malformed messages.
    """
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return None
    if not prompt or not isinstance(prompt[0], Mapping):
        return None
    return [_require_message(message) for message in prompt]


def _require_message(message: object) -> Message:
    keys = ("role", "content")
    if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in keys):
        raise MptTrtError(
            f"{str(message)[:80]} is not a message; give objects with the strings role and content"
        )
    return message


class IdsAsText:
    """Replaces a missing tokenizer: the text of tokens is their ids."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, token_ids))

    def is_open(self, token_ids: list[int], text: str) -> bool:
        return False


def _require_ids(prompt: object) -> list[int]:
    try:
        ids = list(prompt)  # type: ignore[call-overload]
    except TypeError:
        ids = [None]
    if not all(isinstance(token, Integral) for token in ids):
        raise MptTrtError(
            f"{str(prompt)[:60]!r} is not a prompt; give a text, token ids or chat messages"
        )
    return [int(token) for token in ids]
