"""Converts text to token ids and back, with transformers' tokenizers.

The ids are those of `AutoTokenizer`. Added tokens count wherever they are stored; truncation and
padding that a training run left in tokenizer.json are ignored. Code in the folder is not executed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.checkpoint.tokenizer_files import VOCABULARY_FILES, tokenizer_files
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ends of a text that `clean_up_tokenization` of transformers may change when more follows.
REMOVABLE_SPACE = re.compile(r"[ ']$| n'?$| '[vr]$")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers.

    folder: folder of its files. vocab_size: of the model, if the tokenizer has more ids; else None.
    """

    backend: PreTrainedTokenizerBase
    folder: Path
    vocab_size: int | None = None

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text; None if there is none."""
        return _optional_id(self.backend.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text; None if there is none."""
        return _optional_id(self.backend.eos_token_id)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills up rows; None if there is none."""
        return _optional_id(self.backend.pad_token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Converts text to token ids, by default with the tokenizer's special tokens.

        Raises MptTrtError when the text contains bytes that are not UTF-8 (lone surrogates), or a
        token that the model does not have.
        """
        _require_utf8(text)
        with _plain_errors(self.folder):
            encoded = self.backend(
                text,
                add_special_tokens=add_special_tokens,
                truncation=False,
                padding=False,
                verbose=False,
            )
        token_ids = [int(token) for token in encoded["input_ids"]]
        if self.vocab_size is not None and max(token_ids, default=0) >= self.vocab_size:
            raise self._misfit(max(token_ids), self.vocab_size)
        return token_ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text, by default without special tokens."""
        with _plain_errors(self.folder):
            return str(self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def is_open(self, token_ids: list[int], text: str) -> bool:
        """Returns whether the next token may change the text of these, besides its last character.

        text: what they are decoded to.
        """
        plain = (token for token in reversed(token_ids) if token not in self._special_tokens)
        if self._byte_tokens and next(plain, None) in self._byte_tokens:
            return True
        return self._removes_spaces and REMOVABLE_SPACE.search(text) is not None

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        """Tokens of single bytes. If some in a row are not UTF-8, none of them is a character."""
        vocabulary = self.backend.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        return frozenset(vocabulary[name] for name in names if name in vocabulary)

    @cached_property
    def _special_tokens(self) -> frozenset[int]:
        added = self.backend.added_tokens_decoder.items()
        return frozenset(number for number, token in added if token.special)

    @cached_property
    def _removes_spaces(self) -> bool:
        return bool(getattr(self.backend, "clean_up_tokenization_spaces", False))

    def require_fitting(self, vocab_size: int) -> Tokenizer:
        """Returns the tokenizer if all its ids are in the model's vocabulary.

        The pad token may be beyond it: scripts and transformers' defaults add one, which no text
        contains. Raises MptTrtError, naming the first other token that is not.
        """
        beyond = {id_ for id_ in self.backend.get_vocab().values() if id_ >= vocab_size}
        if others := beyond - {self.pad_token_id}:
            raise self._misfit(min(others), vocab_size)
        return replace(self, vocab_size=vocab_size) if beyond else self

    def _misfit(self, token_id: int, vocab_size: int) -> MptTrtError:
        token = self.backend.convert_ids_to_tokens(token_id)
        return MptTrtError(
            f"{self.folder}: the tokenizer does not fit the model: token {shown(token)} has id "
            f"{token_id}, but the vocabulary is 0..{vocab_size - 1}; give the model's own "
            "tokenizer (--tokenizer_dir)"
        )


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads the tokenizer in `folder`; raises MptTrtError, naming the file, when it is damaged."""
    if not tokenizer_files(folder):
        path = folder / VOCABULARY_FILES[0]
        raise MptTrtError(
            f"{path}: no such file; name the folder that holds the tokenizer (--tokenizer_dir)"
        )
    with _plain_errors(folder), _without_pytorch(), warnings.catch_warnings():
        # In a notebook without ipywidgets, tqdm asks for them; no progress bar is shown here.
        warnings.filterwarnings("ignore", message="IProgress not found")
        # The import takes a second, and commands without text do not need it.
        from transformers import AutoTokenizer, MptConfig

        # transformers' own MPT configuration instead of the folder's config.json, because
        # transformers does not support grouped-query attention, llm-foundry's numbers or MPT's
        # relatives. Only the tokenizer's class is taken from there.
        backend = AutoTokenizer.from_pretrained(
            str(folder.absolute()),
            config=MptConfig(**_class_in_config(folder)),
            use_fast=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        # Some damage is detected only when text is read.
        backend("a", truncation=False, padding=False)
    return Tokenizer(backend, folder)


def _class_in_config(folder: Path) -> dict[str, Any]:
    """The tokenizer's class in config.json, which counts if tokenizer_config.json has none."""
    path = folder / "config.json"
    name = read_json(path).get("tokenizer_class") if path.is_file() else None
    return {"tokenizer_class": name} if isinstance(name, str) else {}


@contextlib.contextmanager
def _without_pytorch() -> Iterator[None]:
    """Keeps transformers from importing PyTorch, which takes 4 s and no tokenizer needs.

    Nothing changes in a process that has imported PyTorch, since transformers may compute there.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    # Else transformers warns that there is no PyTorch.
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        del sys.modules["torch"]
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MptTrtError(
            f"the text is not valid UTF-8 at character {error.start}: {text[:60]!r}; convert it "
            "to UTF-8"
        ) from None


def _optional_id(value: Any) -> int | None:
    return value if isinstance(value, int) else None


@contextlib.contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Turns the libraries' errors into MptTrtError."""
    try:
        with _stderr_of_success():
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, MptTrtError):
        raise
    except BaseException as error:  # panics of the library are not of type Exception
        reason = " ".join(str(error).split())
        there = [name for name in VOCABULARY_FILES if (folder / name).is_file()]
        raise MptTrtError(
            f"{folder / there[0] if there else folder}: not a tokenizer that transformers reads "
            f"({type(error).__name__}: {reason[:300]}); correct tokenizer_config.json, or download "
            "all files of the tokenizer again"
        ) from None


@contextlib.contextmanager
def _stderr_of_success() -> Iterator[None]:
    """Drops output to stderr if the block raises, because Rust prints panics there."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    # In memory, because a read-only container has no folder for temporary files.
    with os.fdopen(os.memfd_create("stderr"), "w+b") as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
            sys.stderr.flush()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        written.seek(0)
        if content := written.read():
            os.write(2, content)
