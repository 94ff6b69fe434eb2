"""Measures on an engine what published facts are about."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpt_trt.api.engine import Engine
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.logits import all_logits
from mpt_trt.evaluation.quality_result import WholeText
from mpt_trt.evaluation.whole_text import measure_text, prefix_of, window_length_of
from mpt_trt.generation.logits import log_softmax, require_finite
from mpt_trt.harness.tasks import TaskError, open_model, run_tasks
from mpt_trt.proofs.facts import (
    Fact,
    FactsFile,
    GeneratedText,
    GreedyTokens,
    LogProbs,
    PromptTokens,
    RankWeights,
    Score,
)
from mpt_trt.proofs.result import Measured
from mpt_trt.system.files import read_text_file


class Unavailable(MptTrtError):
    """Something that a fact needs and this engine lacks, so that the fact is not checked."""


def facts_about(engine: Engine, files: Iterable[FactsFile]) -> list[tuple[FactsFile, Fact]]:
    """The facts about engines of this one's kind, with their files."""
    spec = engine.loaded.manifest.spec
    return [
        (file, fact)
        for file in files
        for fact in file.facts
        if any(kind.fits(spec) for kind in fact.engines)
    ]


def measure_facts(
    engine: Engine, engine_dir: Path, files: Sequence[FactsFile]
) -> dict[str, Measured]:
    """Measures all facts about engines of this one's kind. Every rank takes part.

    Raises FloatingPointError when a logit is not finite.
    """
    measuring = _Measuring(engine, engine_dir)
    return {fact.name: measuring.measure(file, fact) for file, fact in facts_about(engine, files)}


@dataclass
class _Measuring:
    """An engine, and the results that several facts share."""

    engine: Engine
    engine_dir: Path
    texts: dict[tuple[Path, int], WholeText] = field(default_factory=dict)
    tasks: dict[tuple[str, Path | None, int], dict[str, float]] = field(default_factory=dict)

    def measure(self, file: FactsFile, fact: Fact) -> Measured:
        """Measures a fact; what it needs and this machine or the engine lacks is its problem."""
        try:
            return self._measure(file, fact)
        except (TaskError, Unavailable) as error:
            return Measured(problem=str(error))

    def _measure(self, file: FactsFile, fact: Fact) -> Measured:
        match fact:
            case PromptTokens():
                self._require_tokenizer()
                return Measured(tokens=tuple(self.engine.text.encode(fact.prompt)))
            case GreedyTokens():
                return self._greedy_tokens(fact)
            case LogProbs():
                return self._log_probs(fact)
            case GeneratedText():
                self._require_tokenizer()
                self._require_room(self._encode(fact.prompt), fact.max_new_tokens)
                [output] = self.engine.generate([fact.prompt], fact.max_new_tokens)
                return Measured(tokens=output.tokens, text=output.text)
            case RankWeights():
                return self._rank_weights()
            case Score():
                return self._score(file, fact)
        raise TypeError(f"{type(fact).__name__} cannot be measured")

    def _greedy_tokens(self, fact: GreedyTokens) -> Measured:
        """Generates, and after a token that differs goes on with the published one.

        The numbers are the log-probabilities by which generated tokens exceed the published ones in
        their places.
        """
        self._require_vocabulary(fact.prompt_tokens, fact.tokens)
        self._require_room(fact.prompt_tokens, len(fact.tokens))
        published, done = fact.tokens, 0
        tokens, gaps = list(published), [0.0] * len(published)
        found = self._generate(fact.prompt_tokens, len(published))
        while done < len(published):
            rest = published[done:]
            same = next((at for at, one in enumerate(rest) if found[at] != one), len(rest))
            if same == len(rest):
                break
            context = [*fact.prompt_tokens, *published[: done + same]]
            log_probs = self._next_log_probs(context)
            done += same + 1
            tokens[done - 1] = found[same]
            gaps[done - 1] = float(log_probs[found[same]] - log_probs[published[done - 1]])
            if done < len(published):
                context = [*fact.prompt_tokens, *published[:done]]
                found = self._generate(context, len(published) - done)
        return Measured(numbers=tuple(gaps), tokens=tuple(tokens))

    def _generate(self, context: Sequence[int], count: int) -> tuple[int, ...]:
        [output] = self.engine.generate([list(context)], count, end_ids=())
        return output.tokens

    def _next_log_probs(self, context: list[int]) -> np.ndarray:
        last = all_logits(self.engine.loaded, context)[-1]
        return log_softmax(require_finite(last[None]).astype(np.float64))[0]

    def _log_probs(self, fact: LogProbs) -> Measured:
        """Reads the prompt in few steps, and the tokens after it one by one, from the cache."""
        prompt, tokens = list(fact.prompt_tokens), list(fact.tokens)
        self._require_vocabulary(prompt, tokens)
        self._require_room(prompt, len(tokens))
        loaded = self.engine.loaded
        rows = [all_logits(loaded, prompt)]
        for offset, token in enumerate(tokens[:-1]):
            position = np.array([len(prompt) + offset], np.int64)
            step = loaded.model.step(np.array([[token]]), position, np.zeros((1, 2), np.int64))
            rows.append(np.array(step))
        logits = require_finite(np.concatenate(rows)).astype(np.float64)
        following = [*prompt[1:], *tokens]
        found = log_softmax(logits)[np.arange(len(following)), following]
        wanted = found if fact.prompt_log_probs else found[len(prompt) - 1 :]
        return Measured(numbers=tuple(map(float, wanted)))

    def _encode(self, prompt: str) -> list[int]:
        tokens = self.engine.text.encode(prompt)
        if not tokens:
            raise Unavailable("the engine's tokenizer gives no tokens for the prompt")
        self._require_vocabulary(tokens)
        return tokens

    def _require_vocabulary(self, *tokens: Sequence[int]) -> None:
        size = self.engine.loaded.model.vocab_size
        largest = max(max(each) for each in tokens)
        if largest >= size:
            raise Unavailable(f"token {largest} is beyond the engine's vocabulary of {size} tokens")

    def _require_room(self, prompt: Sequence[int], count: int) -> None:
        capacity, needed = self.engine.loaded.model.capacity, len(prompt) + count
        if needed > capacity:
            raise Unavailable(
                f"{needed} tokens do not fit the engine's cache of {capacity}; build it with a "
                "larger max_input_len"
            )

    def _require_tokenizer(self) -> None:
        if self.engine.text.tokenizer is None:
            raise Unavailable("the engine has no tokenizer; set models.*.tokenizer in config.yaml")

    def _rank_weights(self) -> Measured:
        """Bytes of every rank's weight files; without the graph, which has a few kilobytes."""
        ranks = self.engine.loaded.manifest.ranks
        return Measured(
            numbers=tuple(
                float(
                    sum(
                        (self.engine_dir / name).stat().st_size
                        for name in rank.network_files
                        if name != rank.network
                    )
                )
                for rank in ranks
            )
        )

    def _score(self, file: FactsFile, fact: Score) -> Measured:
        self._require_tokenizer()
        length = self._window_length(fact)
        if fact.task is None:
            whole = self._whole_text(file.find(fact.text or ""), length)
            return _score_of(getattr(whole, fact.metric))
        folder = None if fact.task_dir is None else file.find(fact.task_dir)
        metrics = self._task(fact.task, folder, length)
        if fact.metric not in metrics:
            known = ", ".join(metrics)
            raise TaskError(f"task {fact.task} has no metric {fact.metric}; it has {known}")
        return _score_of(metrics[fact.metric])

    def _window_length(self, fact: Score) -> int:
        if fact.window_length is None:
            return window_length_of(self.engine.loaded)
        capacity = self.engine.loaded.model.capacity
        if fact.window_length > capacity:
            raise Unavailable(
                f"the source read {fact.window_length} tokens at a time, and the engine's cache "
                f"holds {capacity}; raise max_input_len or max_output_len of the variant"
            )
        return fact.window_length

    def _whole_text(self, path: Path, length: int) -> WholeText:
        if (path, length) not in self.texts:
            tokenizer = self.engine.text.require_tokenizer()
            text = _read_text(path)
            try:
                prefix_of(tokenizer)
            except MptTrtError as error:
                raise Unavailable(str(error)) from None
            self.texts[path, length] = measure_text(self.engine.loaded, text, tokenizer, length)
        return self.texts[path, length]

    def _task(self, name: str, folder: Path | None, length: int) -> dict[str, float]:
        key = name, folder, length
        if key not in self.tasks:
            self.tasks |= {key: run_tasks(open_model(self.engine, length), [name], folder)[name]}
        return self.tasks[key]


def _score_of(value: float | None) -> Measured:
    """A score. One that is not finite, or too large for a number, has none, and fails."""
    return Measured(numbers=(value,) if value is not None and math.isfinite(value) else ())


def _read_text(path: Path) -> str:
    if not os.path.isfile(path):  # noqa: PTH113 (that fails for a path that is too long)
        raise Unavailable(f"{path}: {'not a file' if os.path.lexists(path) else 'no such file'}")
    try:
        text = read_text_file(path)
    except MptTrtError as error:
        raise Unavailable(str(error)) from None
    if not text:
        raise Unavailable(f"{path}: the text is empty")
    return text
