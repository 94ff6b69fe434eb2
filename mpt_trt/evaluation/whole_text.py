"""Word and byte perplexity of a whole text, by windows like those of lm-eval's rolling tasks."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from mpt_trt.checkpoint.tokenizer import Tokenizer
from mpt_trt.engines.load import LoadedEngine
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.quality_result import WholeText
from mpt_trt.evaluation.token_scores import Passage, score_passages
from mpt_trt.system.progress_lines import Advance, no_progress


def rolling_windows(tokens: list[int], prefix: int, length: int) -> Iterator[Passage]:
    """Divides a text into passages in which the model reads up to `length` tokens.

    Every token is predicted once. The first one follows `prefix`; every window begins with the last
    token of the one before it, and the last window begins earlier, so that it is as long as the
    others. These are the windows of lm-eval's `loglikelihood_rolling` (get_rolling_token_windows
    with a context of one token, and make_disjoint_window).
    """
    for start in range(0, len(tokens), length):
        stop = min(start + length, len(tokens))
        if start == 0:
            yield Passage([prefix, *tokens[:stop]], 1)
        else:
            first = stop - length - 1
            yield Passage(tokens[first:stop], start - first)


def window_length_of(engine: LoadedEngine) -> int:
    """Tokens per window: the model's max_seq_len, or the engine's cache if it is shorter."""
    return min(engine.model.capacity, engine.manifest.spec.config.max_seq_len)


def prefix_of(tokenizer: Tokenizer) -> int:
    """Token before a text: the one that begins texts or, if there is none, that ends them."""
    own = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    prefix = next((token for token in own if token is not None), None)
    if prefix is None:
        raise MptTrtError(
            f"{tokenizer.folder}: the tokenizer has neither bos_token nor eos_token, which whole "
            "texts begin with; add one to tokenizer_config.json"
        )
    return prefix


def text_windows(text: str, tokenizer: Tokenizer, length: int) -> list[Passage]:
    """Divides a text into windows; raises MptTrtError when it is empty."""
    if not text:
        raise MptTrtError("the text is empty; set quality.text to a text with content")
    return list(rolling_windows(tokenizer.encode(text), prefix_of(tokenizer), length))


def measure_text(
    engine: LoadedEngine,
    text: str,
    tokenizer: Tokenizer,
    length: int,
    advance: Advance = no_progress,
) -> WholeText:
    """Computes word and byte perplexity of `text`. Every rank takes part.

    length: most tokens per window. advance: counts windows.

    Raises MptTrtError when the text is empty.
    """
    passages = text_windows(text, tokenizer, length)
    scores = score_passages(engine, passages, advance)
    nats = -sum(score.total for score in scores)
    return whole_text_of(nats, sum(len(score.log_probs) for score in scores), text, length)


def whole_text_of(nats: float, tokens: int, text: str, window_length: int) -> WholeText:
    """Figures of a text with the negative log-probability `nats`.

    Words are what lm-eval counts: the parts between white space, one more than there are gaps.
    """
    words, size = len(re.split(r"\s+", text)), len(text.encode("utf-8"))
    return WholeText(
        word_perplexity=_exponential(nats / words),
        byte_perplexity=_exponential(nats / size),
        bits_per_byte=nats / size / math.log(2),
        nats=nats,
        tokens=tokens,
        words=words,
        bytes=size,
        window_length=window_length,
    )


def _exponential(nats: float) -> float | None:
    """Perplexity; None beyond the largest float, from 709 nats per word or byte on."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None
