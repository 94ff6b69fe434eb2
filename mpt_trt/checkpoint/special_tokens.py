"""Finds the tokens that begin and end a model's text, like transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mpt_trt.checkpoint.tokenizer_files import has_tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

log = logging.getLogger(__name__)

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

    Ids beyond the vocabulary are left out with a warning: the model never generates them.

    Raises MptTrtError when a token is malformed.
    """
    generation = _token_ids(folder / "generation_config.json", "eos_token_id", vocab_size)
    config = _token_ids(folder / "config.json", "eos_token_id", vocab_size)
    ignored = {} if set(config) <= set(generation) or not generation else {"config.json": config}
    end_ids = generation or config
    bos_ids = _token_ids(folder / "config.json", "bos_token_id", vocab_size)
    bos_id = bos_ids[0] if bos_ids else None
    if (end_ids and bos_id is not None) or not has_tokenizer(tokenizer):
        return SpecialTokens(bos_id, end_ids, ignored)
    # Most checkpoints name their tokens in the files.
    from mpt_trt.checkpoint.tokenizer import read_tokenizer

    found = read_tokenizer(tokenizer)
    end_ids = end_ids or _within([found.eos_token_id], vocab_size)
    bos_ids = bos_ids or _within([found.bos_token_id], vocab_size)
    return SpecialTokens(bos_ids[0] if bos_ids else None, end_ids, ignored)


def describe_conflict(end_ids: tuple[int, ...], ignored: EndIds) -> str:
    """A sentence that names the end tokens that are used, and those that are not by their place."""
    others = ", ".join(f"{place} names {list(ids)}" for place, ids in ignored.items())
    return f"text ends with {list(end_ids)}; {others}, which is ignored (run.py --end_id chooses)"


def _token_ids(path: Path, field: str, vocab_size: int) -> tuple[int, ...]:
    """Distinct token ids of a field, which may be missing; negative ones mean none."""
    value = read_json(path).get(field) if path.is_file() else None
    values = value if isinstance(value, list) else [] if value is None else [value]
    for token in values:
        if not isinstance(token, int) or isinstance(token, bool):
            raise MptTrtError(
                f"{path}: {field} = {shown(value)}: a token id or a list of token ids is required"
            )
    if beyond := [token for token in values if token >= vocab_size]:
        log.warning(
            "%s: %s = %s is ignored: the vocabulary is 0..%d", path, field, beyond, vocab_size - 1
        )
    return _within(values, vocab_size)


def _within(ids: Iterable[int | None], vocab_size: int) -> tuple[int, ...]:
    """Returns the distinct ids that the vocabulary has."""
    return tuple(dict.fromkeys(id_ for id_ in ids if id_ is not None and 0 <= id_ < vocab_size))
