"""Turns messages into the text that a chat or instruct model was trained to continue."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.checkpoint.tokenizer import Tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_small_file
from mpt_trt.system.json_text import MOST_BYTES, parse_json_object

Message = Mapping[str, str]
Conversation = list[Message]

END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, and strings that end an answer (in addition to the model's end tokens)."""

    text: str
    stop: tuple[str, ...] = ()


def _chat_ml(system_message: str) -> ChatTemplate:
    """Makes a ChatML template, with a system message for conversations that have none."""
    return ChatTemplate(
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{{{{- '<|im_start|>system\n' + {system_message!r} + '<|im_end|>\n' -}}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}",
        (END_OF_TURN,),
    )


def _instruct(after_blurb: str, instruction: str, between: str, response: str) -> ChatTemplate:
    """Makes a template with headings; a system message replaces the opening sentence."""
    blurb = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
    )
    return ChatTemplate(
        "{%- if messages[0]['role'] == 'system' -%}"
        f"{{{{- messages[0]['content'] + {after_blurb!r} -}}}}"
        f"{{%- else -%}}{{{{- {blurb + after_blurb!r} -}}}}{{%- endif -%}}"
        "{%- for message in messages -%}{%- if message['role'] == 'user' -%}"
        f"{{{{- {instruction!r} + '\n' + message['content'] + {between!r} + {response!r} + '\n'"
        " -}}"
        f"{{%- elif message['role'] == 'assistant' -%}}"
        f"{{{{- message['content'] + {between!r} -}}}}"
        "{%- endif -%}{%- endfor -%}"
    )


# Hub models without a template, by the end of their names. Sources: mpt-7b-instruct,
# mpt-30b-instruct and mpt-7b-8k-instruct: "Formatting" of their model cards (INTRO_BLURB,
# INSTRUCTION_KEY and RESPONSE_KEY of the first; format_prompt of the others). mpt-7b-chat and
# mpt-30b-chat: ChatML and system messages of their Spaces on the hub (spaces/mosaicml/mpt-7b-chat
# and mpt-30b-chat, app.py); llm-foundry's scripts/inference/hf_chat.py also has the first one.
KNOWN_TEMPLATES: tuple[tuple[str, ChatTemplate], ...] = (
    (
        r"mpt-7b-chat",
        _chat_ml(
            "- You are a helpful assistant chatbot trained by MosaicML.\n"
            "- You answer questions.\n"
            "- You are excited to be able to help the user, but will refuse to do anything that "
            "could be considered harmful to the user.\n"
            "- You are more than just an information source, you are also able to write poetry, "
            "short stories, and make jokes."
        ),
    ),
    (
        r"mpt-\w+(-8k)?-chat",
        _chat_ml(
            "A conversation between a user and an LLM-based AI assistant. The assistant gives "
            "helpful and honest answers."
        ),
    ),
    (r"mpt-7b-instruct", _instruct("\n", "### Instruction:", "\n", "### Response:")),
    (r"mpt-\w+(-8k)?-instruct", _instruct("\n\n", "###Instruction", "\n\n", "### Response")),
)


def choose_template(
    tokenizer: Tokenizer, names: Iterable[str], asked: Path | None = None
) -> ChatTemplate:
    """Chooses the template: from a file, otherwise the tokenizer's, otherwise a known model's.

    names: hub id and names of the model.

    Raises MptTrtError when there is none, or the file cannot be read.
    """
    if asked is not None:
        content = read_small_file(asked, MOST_BYTES)
        try:
            return ChatTemplate(content.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise MptTrtError(f"{asked}: not UTF-8 text ({error})") from None
    if tokenizer.backend.chat_template:
        own = tokenizer.backend.chat_template
        if isinstance(own, str):
            return ChatTemplate(own)
        if "default" in own:
            return ChatTemplate(own["default"])
    bases = [Path(name).name.lower() for name in names]
    for pattern, template in KNOWN_TEMPLATES:
        if any(re.fullmatch(pattern, base) for base in bases):
            return template
    raise MptTrtError(
        f"{tokenizer.folder}: the tokenizer has no chat template, and none is known for "
        f"{' or '.join(dict.fromkeys(bases))}; give --chat_template FILE"
    )


def chat_prompt(tokenizer: Tokenizer, template: ChatTemplate, messages: Conversation) -> list[int]:
    """Token ids of a conversation, up to the beginning of the assistant's next message.

    Raises MptTrtError when the template is malformed or rejects the messages.
    """
    try:
        text = tokenizer.backend.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template.text,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # Jinja's errors, and errors that templates raise
        reason = " ".join(str(error).split())
        raise MptTrtError(
            f"the chat template does not accept the messages ({type(error).__name__}: {reason}); "
            "change them or give --chat_template FILE"
        ) from None
    return tokenizer.encode(str(text), add_special_tokens=False)


def read_conversations(path: Path) -> list[Conversation]:
    """Reads a JSON file: a list of messages or of such lists, bare or as `messages` of objects.

    Raises MptTrtError, naming file and message, for any other content.
    """
    content = read_small_file(path, MOST_BYTES).removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        content = b'{"messages": ' + content + b"}"
    messages = parse_json_object(content, path, "give a list of messages").get("messages")
    if not isinstance(messages, list) or not messages:
        raise MptTrtError(f"{path}: no messages; give a list of objects with role and content")
    if all(isinstance(entry, dict) and "messages" in entry for entry in messages):
        messages = [entry["messages"] for entry in messages]
    several = messages if all(isinstance(entry, list) for entry in messages) else [messages]
    for conversation in several:
        _require_messages(path, conversation)
    return several


def _require_messages(path: Path, conversation: object) -> None:
    if not isinstance(conversation, list) or not conversation:
        raise MptTrtError(f"{path}: an empty conversation; give at least one message")
    for message in conversation:
        strings = isinstance(message, dict) and all(
            isinstance(message.get(field), str) for field in ("role", "content")
        )
        if not strings:
            raise MptTrtError(
                f"{path}: {str(message)[:80]} is not a message; give an object with the strings "
                "role and content"
            )
