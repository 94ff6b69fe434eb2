"""Compares what engines gave with published facts."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.facts import (
    EngineKind,
    Fact,
    GeneratedText,
    GreedyTokens,
    LogProbs,
    PromptTokens,
    RankWeights,
    Score,
    ScoreDifference,
    fact_hash,
    kind_of,
)
from mpt_trt.proofs.result import FactMeasurements, Measured, ProofResult, Verdict


def compare(
    model: str, facts: Sequence[Fact], measurements: Sequence[FactMeasurements]
) -> ProofResult:
    """Compares every fact with the engines of its kind that were measured; the worst one counts.

    Raises MptTrtError when the measurements are of other facts, or of several models.
    """
    _require_same_facts(facts, measurements)
    _require_one_model(measurements)
    return ProofResult(
        model=model,
        date=datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        engine_dirs=tuple(each.engine_dir for each in measurements),
        runtimes=tuple(dict.fromkeys(each.runtime for each in measurements)),
        verdicts=tuple(_verdict(fact, measurements) for fact in facts),
    )


@dataclass(frozen=True)
class _Comparison:
    """expected, found: in words. deviation: in the fact's unit."""

    expected: str
    found: str
    deviation: float

    @property
    def badness(self) -> float:
        """The deviation, in which one that is no number is the worst."""
        return math.inf if math.isnan(self.deviation) else self.deviation


def _require_same_facts(facts: Sequence[Fact], measurements: Sequence[FactMeasurements]) -> None:
    hashes = {fact.name: fact_hash(fact) for fact in facts}
    for each in measurements:
        for name in each.measured.keys() & hashes:
            if each.hashes.get(name) != hashes[name]:
                raise MptTrtError(
                    f"{each.engine_dir}: the measurement of fact {name!r} is of another fact with "
                    "this name, or of an earlier version; measure it again with these facts"
                )


def _require_one_model(measurements: Sequence[FactMeasurements]) -> None:
    first = next(iter(measurements), None)
    for each in measurements:
        if first is not None and each.model_name != first.model_name:
            raise MptTrtError(
                f"{each.engine_dir} is of the model {each.model_name}, and {first.engine_dir} of "
                f"{first.model_name}; give measurements of one model"
            )


def _verdict(fact: Fact, measurements: Sequence[FactMeasurements]) -> Verdict:
    given = [_measured(fact, kind, measurements) for kind in fact.engines]
    problem = next(filter(None, map(_problem, given)), None)
    if problem is None:
        checked = [[each for each in some if each.problem is None] for some in given]
        compared = max(
            (_compare(fact, chosen) for chosen in itertools.product(*checked)),
            key=lambda each: each.badness,
        )
        # A deviation that is no number fails.
        is_passed = compared.deviation <= fact.tolerance
    return Verdict(
        name=fact.name,
        kind=kind_of(fact),
        source=fact.source,
        engine=fact.engine.label,
        status="not checked" if problem else "passed" if is_passed else "failed",
        expected="" if problem else compared.expected,
        found="" if problem else compared.found,
        deviation=None if problem else compared.deviation,
        tolerance=fact.tolerance,
        reason=fact.reason,
        problem=problem,
    )


def _problem(given: Sequence[Measured]) -> str | None:
    """Why none of a kind's engines gave anything; None if one did."""
    return None if any(each.problem is None for each in given) else given[0].problem


def _measured(
    fact: Fact, kind: EngineKind, measurements: Sequence[FactMeasurements]
) -> list[Measured]:
    """What engines of the kind gave, those of the source's tensor-parallel size first."""
    fitting = [
        each for each in measurements if fact.name in each.measured and _is_of_kind(each, kind)
    ]
    own = [each for each in fitting if each.ranks == kind.tp_size]
    if isinstance(fact, RankWeights):
        fitting = own
    others = [each for each in fitting if each.ranks != kind.tp_size]
    if found := [each.measured[fact.name] for each in (*own, *others)]:
        return found
    return [Measured(problem=f"there is no engine in {kind.label}")]


def _is_of_kind(measured: FactMeasurements, kind: EngineKind) -> bool:
    return kind.is_of(measured.dtype, measured.quantized)


def _compare(fact: Fact, given: Sequence[Measured]) -> _Comparison:
    found = given[0]
    match fact:
        case PromptTokens():
            differing = _differing(fact.tokens, found.tokens)
            return _Comparison(_ids(fact.tokens), _ids(found.tokens), differing)
        case GreedyTokens():
            return _compare_greedy(fact, found)
        case LogProbs():
            expected = (*fact.prompt_log_probs, *fact.log_probs)
            return _Comparison(
                _numbers(expected), _numbers(found.numbers), _largest(expected, found.numbers)
            )
        case GeneratedText():
            text = found.text or ""
            return _Comparison(repr(fact.text), repr(text), float(not text.startswith(fact.text)))
        case RankWeights():
            sizes = found.numbers or (math.nan,)
            size = max(sizes, key=lambda number: abs(number - fact.bytes))
            return _Comparison(f"{fact.bytes:,}", f"{size:,.0f}", abs(size - fact.bytes))
        case ScoreDifference():
            score, base = _single(found), _single(given[1])
            difference = score - base
            return _Comparison(
                f"{fact.value:+.6g}",
                f"{difference:+.6g} ({base:.6g} to {score:.6g})",
                abs(difference - fact.value),
            )
        case Score():
            score = _single(found)
            return _Comparison(f"{fact.value:.6g}", f"{score:.6g}", abs(score - fact.value))
    raise TypeError(f"{type(fact).__name__} has no comparison")


def _compare_greedy(fact: GreedyTokens, found: Measured) -> _Comparison:
    """Bounds near ties in two ways: by their log-probability and by their number."""
    differing = _differing(fact.tokens, found.tokens)
    gap = max(found.numbers, default=math.inf)
    if differing <= fact.most_ties:
        return _Comparison(_ids(fact.tokens), _ids(found.tokens), gap)
    count = f"{differing:.0f} of {len(fact.tokens)} tokens differ, and {fact.most_ties} may"
    return _Comparison(_ids(fact.tokens), f"{_ids(found.tokens)} ({count})", math.inf)


def _single(found: Measured) -> float:
    """A score; NaN when the metric had no finite value."""
    return found.numbers[0] if len(found.numbers) == 1 else math.nan


def _differing(expected: Sequence[int], found: Sequence[int]) -> float:
    """Number of tokens that differ."""
    pairs = sum(one != other for one, other in zip(expected, found, strict=False))
    return float(pairs + abs(len(expected) - len(found)))


def _largest(expected: Sequence[float], found: Sequence[float]) -> float:
    if len(expected) != len(found):
        return math.inf
    return max(abs(one - other) for one, other in zip(expected, found, strict=True))


def _ids(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)
