"""Text of tokens during generation: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mpt_trt.errors import MptTrtError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text, by default without special tokens."""


class GeneratedText:
    """Text of one sequence of new tokens, which ends before the first stop string.

    Stop strings may begin and end within tokens, and may contain special tokens, which are not
    part of the text.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()):
        if "" in stop:
            raise MptTrtError("--stop: an empty string would end every text; leave it out")
        self.tokens: list[int] = []
        self._decoder, self._stop = decoder, tuple(stop)
        self._end: int | None = None
        self._num_returned = 0

    def add(self, token: int) -> bool:
        """Appends a token; returns whether a stop string is complete."""
        self.tokens.append(token)
        if self._stop and self._end is None:
            raw = self._raw(self.tokens)
            starts = [start for stop in self._stop if (start := raw.find(stop)) >= 0]
            self._end = min(starts, default=None)
        return self._end is not None

    def text(self, is_finished: bool = True) -> str:
        """Returns the text; without its uncertain end if more tokens follow."""
        raw = self._raw(self.tokens)
        limit = len(raw)
        if self._end is not None:
            limit = self._end
        elif not is_finished:
            limit = len(raw.rstrip(INCOMPLETE))
            limit -= max((_overlap(raw[:limit], stop) for stop in self._stop), default=0)
        return self._visible(raw, limit)

    def new_text(self, is_finished: bool) -> str:
        """Returns the part of the text that previous calls have not returned."""
        text = self.text(is_finished)
        new = text[self._num_returned :]
        self._num_returned = max(self._num_returned, len(text))
        return new

    def _visible(self, raw: str, limit: int) -> str:
        """Returns `raw[:limit]` without special tokens."""
        plain = self._decoder.decode(self.tokens)
        if plain == raw:
            return raw[:limit]
        for count in range(len(self.tokens), -1, -1):
            start = self._raw(self.tokens[:count])
            if len(start) <= limit and raw.startswith(start):
                # The rest of the next token, unless it is a special one.
                next_one = self.tokens[count : count + 1]
                rest = raw[len(start) : limit] if self._decoder.decode(next_one) else ""
                return self._decoder.decode(self.tokens[:count]) + rest
        return ""

    def _raw(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=False)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class OrderedPrinter:
    """Prints growing texts of several sequences, each in one piece and in order.

    before: printed before each text. after: printed after each.
    """

    def __init__(self, before: Sequence[str], after: str, write: Callable[[str], None]):
        self._before, self._after, self._write = before, after, write
        self._waiting = [""] * len(before)
        self._finished = [False] * len(before)
        self._current = -1
        self._begin_next()

    def update(self, index: int, new_text: str, is_finished: bool) -> None:
        """Prints new text of a sequence if its turn has come, and otherwise keeps it."""
        self._waiting[index] += new_text
        self._finished[index] = is_finished
        while self._current < len(self._before):
            self._write(self._waiting[self._current])
            self._waiting[self._current] = ""
            if not self._finished[self._current]:
                return
            self._write(self._after)
            self._begin_next()

    def _begin_next(self) -> None:
        self._current += 1
        if self._current < len(self._before):
            self._write(self._before[self._current])
