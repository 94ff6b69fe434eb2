"""Text that grows, stop strings, and printing in order."""

from __future__ import annotations

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.generation.text import GeneratedText, OrderedPrinter

SPECIAL = {9: "<|end|>"}
WORDS = {0: "ab", 1: "cd", 2: "e", 3: "\n", 4: "cde"}


class Words:
    """A tokenizer of a few words."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        special = dict.fromkeys(SPECIAL, "") if skip_special_tokens else SPECIAL
        return "".join((WORDS | special)[token] for token in token_ids)


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
