"""Converts text to token ids and back, with transformers' tokenizers.

The ids are those of `AutoTokenizer`. Added tokens count wherever they are stored; truncation and
padding that a training run left in tokenizer.json are ignored. Code in the folder is not executed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.checkpoint.tokenizer_files import VOCABULARY_FILES, tokenizer_files
from mpt_trt.errors import MptTrtError
from mpt_trt.system.json_text import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ends of a text that `clean_up_tokenization` of transformers may change when more follows.
REMOVABLE_SPACE = re.compile(r"[ ']$| n'?$| '[vr]$")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers. folder: folder of its files."""

    backend: PreTrainedTokenizerBase
    folder: Path

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

        Raises MptTrtError when the text contains bytes that are not UTF-8 (lone surrogates).
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
        return [int(token) for token in encoded["input_ids"]]

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

        Raises MptTrtError, naming the first token that is not.
        """
        beyond = {
            id_: token for token, id_ in self.backend.get_vocab().items() if id_ >= vocab_size
        }
        if beyond:
            first = min(beyond)
            raise MptTrtError(
                f"{self.folder}: the tokenizer does not fit the model: token "
                f"{shown(beyond[first])} has id {first}, but the vocabulary is "
                f"0..{vocab_size - 1}; give the model's own tokenizer (--tokenizer_dir)"
            )
        return self


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
        # relatives.
        backend = AutoTokenizer.from_pretrained(
            str(folder.absolute()),
            config=MptConfig(),
            use_fast=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        # Some damage is detected only when text is read.
        backend("a", truncation=False, padding=False)
    return Tokenizer(backend, folder)


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
        path = folder / VOCABULARY_FILES[0]
        raise MptTrtError(
            f"{path}: not a tokenizer that transformers reads ({type(error).__name__}: "
            f"{reason[:300]}); download it again"
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
    with tempfile.TemporaryFile() as written:
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
