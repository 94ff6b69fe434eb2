"""Converts text to token ids and back, with the `tokenizers` library and tokenizer.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as TokenizerFile


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and the ids of its begin and end tokens (None if it names none)."""

    backend: TokenizerFile
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's special tokens unless told otherwise."""
        token_ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.backend.decode(token_ids, skip_special_tokens=True))


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads `folder/tokenizer.json` and `tokenizer_config.json`; raises MptTrtError if broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise MptTrtError(f"{path}: no such file; name the folder that holds the tokenizer")
    # Checkpoints without a tokenizer are converted without the library.
    from tokenizers import Tokenizer as TokenizerFile

    try:
        backend = TokenizerFile.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise MptTrtError(f"{path}: not a tokenizer ({error}); download it again") from None
    bos, eos = (_special_id(folder, backend, key) for key in ("bos_token", "eos_token"))
    return Tokenizer(backend, bos, eos)


def special_token_ids(folder: Path) -> tuple[int | None, int | None]:
    """Ids (bos, eos) of the folder's tokenizer; (None, None) when there is no tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None, None
    tokenizer = read_tokenizer(folder)
    return tokenizer.bos_token_id, tokenizer.eos_token_id


def _special_id(folder: Path, backend: TokenizerFile, key: str) -> int | None:
    path = folder / "tokenizer_config.json"
    token = read_json(path).get(key) if path.is_file() else None
    content = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(content) if isinstance(content, str) else None
