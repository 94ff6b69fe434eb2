"""Text that grows, stop strings, and printing in order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from mpt_trt.api.text import IdsAsText
from mpt_trt.checkpoint.tokenizer import Tokenizer, read_tokenizer
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.text import MOST_UNCERTAIN, GeneratedText, OrderedPrinter
from support.paths import REPOSITORY

SPECIAL = {9: "<|end|>"}
WORDS = {0: "ab", 1: "cd", 2: "e", 3: "\n", 4: "cde"}


class Words:
    """A tokenizer of a few words."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        special = dict.fromkeys(SPECIAL, "") if skip_special_tokens else SPECIAL
        return "".join((WORDS | special)[token] for token in token_ids)

    def is_open(self, token_ids: list[int], text: str) -> bool:
        return False


PIECES = ["<s>", "</s>", "▁", "▁▁", "▁a", "b", "é", "▁日", ".", "▁.", "▁'", "s", "▁n", "'t", "�"]
BYTES = [f"<0x{byte:02X}>" for byte in b"\n\xe6\x97\xa5\xf0\x9f\x99\x82"]


def of_pieces(decoder: object, pieces: list[str], **options: bool) -> Tokenizer:
    """A tokenizer that decodes pieces; the first two are special tokens."""
    model = models.WordLevel({piece: number for number, piece in enumerate(pieces)}, "<s>")
    backend = Backend(model)
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:2]])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, **options), Path())


def as_in_llama() -> decoders.Decoder:
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])


TOKENIZERS = {
    "bytes of characters": read_tokenizer(REPOSITORY / "resources" / "mpt-demo"),
    "spaces at the beginning": of_pieces(decoders.Metaspace(), PIECES),
    "tokens of bytes": of_pieces(as_in_llama(), PIECES + BYTES),
    "spaces that are removed": of_pieces(
        decoders.Metaspace(), PIECES, clean_up_tokenization_spaces=True
    ),
    "parts of words": of_pieces(decoders.WordPiece(cleanup=False), [*PIECES, "##c", "##d"]),
}


class CountingDecoder:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.is_open, self.num_decoded = tokenizer, tokenizer.is_open, 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        backend = self._tokenizer.backend
        return str(backend.decode(token_ids, skip_special_tokens=skip_special_tokens))


# Bytes of characters, spaces and special tokens of the demo model, and any others.
SOME_IDS = read_tokenizer(REPOSITORY / "resources" / "mpt-demo").encode(
    "<|endoftext|>é → 東京 🙂 \n\n   ' .<|endoftext|>"
)


MOST_TOKENS = 40
# No token has more than one of these.
NEVER_COMPLETE = "\0" * (MOST_TOKENS + 1)


def tokens_of(name: str) -> st.SearchStrategy[list[int]]:
    size = len(TOKENIZERS[name].backend)
    token = st.integers(0, size - 1)
    if name == "bytes of characters":
        token = st.sampled_from(SOME_IDS) | token
    return st.lists(token, max_size=MOST_TOKENS)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_new_texts_add_up_to_what_all_tokens_are_decoded_to(name: str, data) -> None:
    """With one or several new tokens at a time, and with stop strings that do not occur."""
    tokens = data.draw(tokens_of(name))
    decoder = CountingDecoder(TOKENIZERS[name])
    text = GeneratedText(decoder, data.draw(st.sampled_from([(), (NEVER_COMPLETE,)])))
    at_a_time = data.draw(st.integers(1, 3))
    found = ""
    for number, token in enumerate(tokens, 1):
        assert not text.add(token)
        if number % at_a_time == 0:
            found += text.new_text(is_finished=False)
    found += text.new_text(is_finished=True)
    assert found == text.text() == decoder.decode(tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_end_the_text_in_any_tokens(name: str, data) -> None:
    """The text ends before the first stop string, as soon as the tokens so far contain one."""
    tokens = [token for token in data.draw(tokens_of(name)) if token > 1]
    decoder = CountingDecoder(TOKENIZERS[name])
    whole = decoder.decode(tokens)
    places = st.integers(0, max(len(whole) - 1, 0))
    stops = {whole[start : start + 3] for start in data.draw(st.lists(places, max_size=2))} - {""}
    text, found, is_found = GeneratedText(decoder, sorted(stops)), "", False
    for token in tokens:
        is_found = text.add(token)
        found += text.new_text(is_finished=is_found)
        begun = decoder.decode(text.tokens)
        places = [begun.find(stop) for stop in stops if stop in begun]
        assert is_found == bool(places)
        if is_found:
            break
    found += text.new_text(is_finished=True)
    assert found == text.text() == (begun[: min(places)] if is_found else whole)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_special_token_as_stop_string_ends_the_whole_text(name: str, data) -> None:
    """Also a text that other tokens would have changed: bytes of a character, spaces, quotes."""
    decoder = CountingDecoder(TOKENIZERS[name])
    tokens = [token for token in data.draw(tokens_of(name)) if token != 0]
    text, found = GeneratedText(decoder, [decoder.decode([0], skip_special_tokens=False)]), ""
    for token in tokens:
        assert not text.add(token)
        found += text.new_text(is_finished=False)
    assert text.add(0)
    found += text.new_text(is_finished=True)
    assert found == text.text() == decoder.decode(tokens)


@pytest.mark.parametrize("kind", ["text", "incomplete", "special", "special after text"])
@pytest.mark.parametrize("name", ["bytes of characters", "spaces at the beginning"])
def test_decoding_is_linear_in_the_tokens(name: str, kind: str) -> None:
    tokenizer, count = TOKENIZERS[name], 600
    ids = {
        "text": range(2, len(tokenizer.backend)),
        # A part of a character, or one like it.
        "incomplete": [tokenizer.encode("é")[-2] if "bytes" in name else PIECES.index("�")],
        "special": [0],
        "special after text": [5, *[0] * count],
    }[kind]
    tokens = [ids[number % len(ids)] for number in range(count)]
    decoder = CountingDecoder(tokenizer)
    text = GeneratedText(decoder)
    found = ""
    for token in tokens:
        text.add(token)
        found += text.new_text(is_finished=False)
    found += text.new_text(is_finished=True)
    assert decoder.num_decoded < count * 3 * MOST_UNCERTAIN
    assert found == decoder.decode(tokens)


@pytest.mark.parametrize("count", range(1, 2 * MOST_UNCERTAIN + 3))
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_special_tokens_within_a_character(cut: int, count: int) -> None:
    """The demo tokenizer's tokens of the bytes 0x80, the four of 😀, and 0x80; 0 is special."""
    tokenizer = TOKENIZERS["bytes of characters"]
    smile = [173, 254, 247, 223]
    tokens = [223, *smile[:cut], *[0] * count, *smile[cut:], 223]
    text = GeneratedText(tokenizer, ())
    parts = []
    for index, token in enumerate(tokens):
        text.add(token)
        parts.append(text.new_text(index == len(tokens) - 1))
    assert (
        "".join(parts)
        == tokenizer.decode(tokens)
        == "\N{REPLACEMENT CHARACTER}😀\N{REPLACEMENT CHARACTER}"
    )


def test_spaces_are_removed_across_tokens() -> None:
    """`'` loses the spaces around it, so that the next token may not be read without it."""
    tokenizer = TOKENIZERS["spaces that are removed"]
    tokens = [PIECES.index(piece) for piece in ("▁a", "▁'", "▁n", "'t")]
    text, found = GeneratedText(tokenizer), ""
    for token in tokens:
        text.add(token)
        found += text.new_text(is_finished=False)
    assert found == tokenizer.decode(tokens) == "a'n't"


def test_ids_are_separated() -> None:
    text = GeneratedText(IdsAsText(), ["7 8"])
    found = []
    for token in (5, 6, 7, 18):
        text.add(token)
        found.append(text.new_text(is_finished=False))
    assert found == ["5", " 6", " ", "7 18"]


def shown(tokens: list[int], *stop: str) -> tuple[list[str], list[bool]]:
    text = GeneratedText(Words(), stop)
    ended, texts = [], []
    for token in tokens:
        ended.append(text.add(token))
        texts.append(text.text(is_finished=ended[-1]))
    return texts, ended


def test_stop_strings_cross_tokens_and_are_held_back() -> None:
    assert shown([0, 1, 2], "bcde") == (["a", "a", "a"], [False, False, True])
    assert shown([0, 2, 1], "bcde") == (["a", "abe", "abecd"], [False] * 3)
    assert shown([0, 4], "d", "c") == (["ab", "ab"], [False, True])


def test_stop_strings_may_be_special_tokens() -> None:
    assert shown([0, 9, 1], "<|end|>")[0] == ["ab", "ab", "ab"]
    assert shown([0, 3, 9], "\n<|end|>")[0] == ["ab", "ab", "ab"]
    assert shown([9, 0, 1], "bc")[0] == ["", "a", "a"]
    assert shown([0, 9, 1])[0] == ["ab", "ab", "abcd"]


def test_an_empty_stop_string_is_rejected() -> None:
    with pytest.raises(MptTrtError, match="--stop"):
        GeneratedText(Words(), [""])


def test_new_text_is_returned_once() -> None:
    text = GeneratedText(Words(), ["bcde"])
    found = []
    for token in (0, 1, 0, 4):
        is_finished = text.add(token)
        found.append(text.new_text(is_finished))
    assert found == ["a", "", "bcda", ""]


def test_texts_come_as_a_whole_and_in_order() -> None:
    written: list[str] = []
    printer = OrderedPrinter(["1:", "2:", "3:"], ";", written.append)
    parts = ((0, "ab", 0), (1, "cd", 0), (2, "e", 1), (0, "cd", 1), (1, "ab", 1))
    for index, new_text, is_finished in parts:
        printer.update(index, new_text, bool(is_finished))
        if new_text == "e":
            assert "".join(written) == "1:ab"
    assert "".join(written) == "1:abcd;2:cdab;3:e;"
