"""Text of tokens during generation: whole characters, up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from mpt_trt.errors import MptTrtError

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens without certain text that a window holds before it is shortened.
MOST_UNCERTAIN = 8
# Bytes of the longest character.
UTF8_BYTES = 4


class Decoder(Protocol):
    """Turns token ids into text."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Converts token ids to text, by default without special tokens."""

    def is_open(self, token_ids: list[int], text: str) -> bool:
        """Returns whether the next token may change the text of these, besides its last character.

        text: what they are decoded to.
        """


class GrowingText:
    """Text of tokens that come one after another, without decoding all of them each time.

    A window of tokens is decoded. It begins with a few whose text is known (the context), because a
    token may have another text at the beginning and within a character.

    num_certain: characters that no further token changes.
    """

    def __init__(self, decoder: Decoder, skip_special_tokens: bool = True):
        self._decoder, self._skips = decoder, skip_special_tokens
        self._window: list[int] = []
        self._text = ""
        # Tokens of the context, its characters, and all characters of the window that are certain.
        self._context = self._num_context = self._num_sure = 0
        self.num_certain = 0

    @property
    def uncertain(self) -> str:
        """Text after the certain characters, which counts if no further token comes."""
        return self._text[self._num_sure :]

    @property
    def length(self) -> int:
        """Number of all characters, certain or not."""
        return self.num_certain + len(self.uncertain)

    def add(self, tokens: Sequence[int]) -> str:
        """Appends tokens; returns text that has become certain."""
        self._window += tokens
        self._text = self._decode(self._window)
        is_open = self._decoder.is_open(self._window, self._text)
        new = "" if is_open else self._take(len(self._text.rstrip(INCOMPLETE)))
        if self._num_sure == len(self._text) > self._num_context:
            self._drop_context(len(self._window))
        elif len(self._window) - self._context > MOST_UNCERTAIN and not is_open:
            new += self._shorten()
        self.num_certain += len(new)
        return new

    def _take(self, num_sure: int) -> str:
        """Makes the window's text certain up to a character; returns what has not been."""
        new = self._text[self._num_sure : num_sure]
        self._num_sure = max(self._num_sure, num_sure)
        return new

    def _shorten(self) -> str:
        """Shortens a window without a certain end; returns text that has become certain."""
        rest = [token for token in self._window[self._context :] if not self._is_skipped(token)]
        self._window[self._context :] = rest
        # Other tokens without text stay: a space at the beginning is one.
        if len(rest) <= MOST_UNCERTAIN or len(self._text) == self._num_context:
            return ""
        # Bytes that are no characters. The last tokens have as many as a character, so that nothing
        # before them changes if the text can be divided there.
        last = len(self._window) - UTF8_BYTES
        for end in range(last, last - UTF8_BYTES, -1):
            start = self._decode(self._window[:end])
            if self._text.startswith(start):
                new = self._take(len(start))
                self._drop_context(end)
                return new
        return ""

    def _drop_context(self, end: int) -> None:
        """Begins the window after the context. end: tokens of this window before the next one's."""
        window, context = self._window[self._context :], end - self._context
        text = self._decode(window[:context])
        if self._decoder.is_open(window[:context], text):
            # The tokens before it stay, with which it is not.
            return
        uncertain = self.uncertain
        self._window, self._context, self._num_context = window, context, len(text)
        self._text = self._decode(window) if uncertain else ""
        self._num_sure = len(self._text) - len(uncertain) if uncertain else self._num_context

    def _decode(self, tokens: list[int]) -> str:
        return self._decoder.decode(tokens, skip_special_tokens=self._skips)

    def _is_skipped(self, token: int) -> bool:
        """Returns whether it is a special token, which is not part of the text."""
        if not self._skips or self._decode([token]):
            return False
        return bool(self._decoder.decode([token], skip_special_tokens=False))


class GeneratedText:
    """Text of one sequence of new tokens, which ends before the first stop string.

    Stop strings may begin and end within tokens, and may contain special tokens, which are not
    part of the text.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str] = ()):
        if "" in stop:
            raise MptTrtError("--stop: an empty string would end every text; leave it out")
        self.tokens: list[int] = []
        self._plain = GrowingText(decoder)
        self._stops = _StopSearch(decoder, stop) if stop else None
        self._num_decoded = self._num_returned = 0
        # All certain text, and the end of it that has not been returned.
        self._certain: list[str] = []
        self._new = ""

    def add(self, token: int) -> bool:
        """Appends a token; returns whether a stop string is complete."""
        self.tokens.append(token)
        if self._stops is None:
            return False
        if self._stops.found is None:
            self._decode()
            self._stops.add(token, self._plain.length)
        return self._stops.found is not None

    def text(self, is_finished: bool = True) -> str:
        """Returns the text; without its uncertain end if more tokens follow."""
        self._decode()
        whole = "".join(self._certain) + self._plain.uncertain
        return whole[: self._length(is_finished)]

    def new_text(self, is_finished: bool) -> str:
        """Returns the part of the text that previous calls have not returned."""
        self._decode()
        count = max(self._length(is_finished) - self._num_returned, 0)
        new = (self._new + self._plain.uncertain)[:count]
        self._new = self._new[count:]
        self._num_returned += len(new)
        return new

    def _decode(self) -> None:
        """Decodes tokens that have not been."""
        tokens = self.tokens[self._num_decoded :]
        if tokens:
            self._num_decoded = len(self.tokens)
            new = self._plain.add(tokens)
            self._certain.append(new)
            self._new += new

    def _length(self, is_finished: bool) -> int:
        """Number of the text's characters, of which more may be decoded."""
        length = self._plain.length if is_finished else self._plain.num_certain
        return length if self._stops is None else self._stops.length(length, is_finished)


class _Lengths(NamedTuple):
    """Characters of the text so far, with special tokens (raw) and without (plain)."""

    raw: int
    plain: int


class _StopSearch:
    """Looks for stop strings in the text with special tokens.

    found: first character of a stop string; None until one is complete.
    """

    def __init__(self, decoder: Decoder, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._raw = GrowingText(decoder, skip_special_tokens=False)
        # The end of the certain text, in which a stop string may have begun.
        self._end = ""
        # Lengths before the first token, and after each.
        self._lengths = [_Lengths(0, 0)]
        self.found: int | None = None

    def add(self, token: int, plain: int) -> None:
        """Appends a token. plain: characters without special tokens, with this one."""
        self._end += self._raw.add([token])
        self._lengths.append(_Lengths(self._raw.length, plain))
        text = self._end + self._raw.uncertain
        start = self._raw.num_certain - len(self._end)
        places = [start + place for stop in self._stop if (place := text.find(stop)) >= 0]
        self.found = min(places, default=None)
        self._end = self._end[-max(map(len, self._stop)) :]

    def length(self, num_plain: int, is_finished: bool) -> int:
        """Characters, without special tokens, before a stop string or before one that may come.

        num_plain: those of the whole text.
        """
        if self.found is not None:
            return min(num_plain, self._without_special_tokens(self.found))
        if is_finished:
            return num_plain
        overlap = max(_overlap(self._end, stop) for stop in self._stop)
        return min(num_plain, self._without_special_tokens(self._raw.num_certain - overlap))

    def _without_special_tokens(self, length: int) -> int:
        """Converts a length of the text with special tokens to that of the text without them."""
        # From the end, because a token may shorten the text before it, if that was not certain.
        index = len(self._lengths) - 1
        while self._lengths[index].raw > length:
            index -= 1
        before, after = self._lengths[index], self._lengths[min(index + 1, len(self._lengths) - 1)]
        # The next token has fewer characters without special tokens if it is the first one.
        return max(before.plain, after.plain - (after.raw - length))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of a stop string."""
    # Only places of its first character: clients may send long stop strings.
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


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
