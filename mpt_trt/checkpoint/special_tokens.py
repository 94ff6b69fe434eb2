"""Finds the tokens that begin and end a model's text, like transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpt_trt.checkpoint.tokenizer import has_tokenizer, read_tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

EndIds = Mapping[str, tuple[int, ...]]
"""End tokens by the file that names them."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that begin and end a model's text.

    bos_id: token that begins a text; None if unknown. end_ids: tokens that end a text.
    ignored_end_ids: what files of lower rank name instead, by file.
    """

    bos_id: int | None
    end_ids: tuple[int, ...]
    ignored_end_ids: EndIds = field(default_factory=dict)


def read_special_tokens(folder: Path, tokenizer: Path, vocab_size: int) -> SpecialTokens:
    """Reads the special tokens of the checkpoint in `folder`.

    End tokens are all of generation_config.json, otherwise of config.json, otherwise the
    tokenizer's. tokenizer: a folder with or without a tokenizer; it is read only if the files do
    not name the tokens.

    Raises MptTrtError when a token is malformed or beyond the vocabulary.
    """
    generation = _token_ids(folder / "generation_config.json", "eos_token_id", vocab_size)
    config = _token_ids(folder / "config.json", "eos_token_id", vocab_size)
    ignored = {} if set(config) <= set(generation) or not generation else {"config.json": config}
    end_ids = generation or config
    bos_ids = _token_ids(folder / "config.json", "bos_token_id", vocab_size)
    bos_id = bos_ids[0] if bos_ids else None
    if (end_ids and bos_id is not None) or not has_tokenizer(tokenizer):
        return SpecialTokens(bos_id, end_ids, ignored)
    found = read_tokenizer(tokenizer).require_fitting(vocab_size)
    if not end_ids and found.eos_token_id is not None:
        end_ids = (found.eos_token_id,)
    return SpecialTokens(found.bos_token_id if bos_id is None else bos_id, end_ids, ignored)


def describe_conflict(end_ids: tuple[int, ...], ignored: EndIds) -> str:
    """A sentence that names the end tokens that are used, and those that are not by their place."""
    others = ", ".join(f"{place} names {list(ids)}" for place, ids in ignored.items())
    return f"text ends with {list(end_ids)}; {others}, which is ignored (run.py --end_id chooses)"


def _token_ids(path: Path, field: str, vocab_size: int) -> tuple[int, ...]:
    """Distinct token ids of a field, which may be missing; negative ones mean none."""
    value = read_json(path).get(field) if path.is_file() else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if not isinstance(token, int) or isinstance(token, bool) or token >= vocab_size:
            raise MptTrtError(
                f"{path}: {field} = {shown(value)}: a token id below {vocab_size}, the size of the "
                "vocabulary, or a list of them is required"
            )
    return tuple(dict.fromkeys(token for token in values if token >= 0))
