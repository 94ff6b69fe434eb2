"""Places of tokens in a text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer

from mpt_trt.generation.text import INCOMPLETE, MOST_UNCERTAIN
from mpt_trt.server.responses import token_starts
from support.paths import REPOSITORY

BACKEND = Tokenizer.from_file(str(REPOSITORY / "resources" / "mpt-demo" / "tokenizer.json"))


class CountingDecoder:
    num_decoded = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return str(BACKEND.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def is_open(self, token_ids: list[int], text: str) -> bool:
        return False


def starts_by_prefix(tokens: list[int]) -> list[int]:
    """Numbers of complete characters before each token, from decoding all tokens before it."""
    prefixes = [BACKEND.decode(tokens[:count]) for count in range(len(tokens))]
    return [len(prefix.rstrip(INCOMPLETE)) for prefix in prefixes]


@pytest.mark.parametrize(
    "text",
    ["Zürich → 東京 é", "x", "🙂🙃 a", "<|endoftext|>é<|endoftext|> and 東", " a b", "e\u0301"],
)
def test_starts_of_tokens(text: str) -> None:
    tokens = BACKEND.encode(text).ids
    starts = token_starts(CountingDecoder(), tokens)
    assert starts == starts_by_prefix(tokens)
    plain = BACKEND.decode(tokens)
    assert len(set(starts)) > len(plain) // 3 and max(starts) < len(plain)


def test_tokens_without_a_text() -> None:
    assert token_starts(CountingDecoder(), []) == []


@pytest.mark.parametrize("seed", range(5))
def test_starts_in_any_tokens(seed: int) -> None:
    """Starts never decrease, and never exceed the text; the work is linear in the tokens."""
    rng, decoder = random.Random(seed), CountingDecoder()
    tokens = [rng.randrange(BACKEND.get_vocab_size()) for _ in range(500)]
    if seed == 0:
        tokens = BACKEND.encode("é").ids[:1] * 500  # no character is ever complete
    starts = token_starts(decoder, tokens)
    assert starts == sorted(starts)
    assert max(starts) <= len(BACKEND.decode(tokens))
    assert decoder.num_decoded < len(tokens) * 4 * MOST_UNCERTAIN
