"""Compares what engines gave with published facts."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    kind_of,
)
from mpt_trt.proofs.result import FactMeasurements, Measured, ProofResult, Verdict
from mpt_trt.quantization.schemes import Quantization, make_weight_quantization


def compare(
    model: str, facts: Sequence[Fact], measurements: Sequence[FactMeasurements]
) -> ProofResult:
    """Compares every fact with the engine of its kind, if one was measured."""
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


def _verdict(fact: Fact, measurements: Sequence[FactMeasurements]) -> Verdict:
    given = [_measured(fact, kind, measurements) for kind in fact.engines]
    problem = next((each.problem for each in given if each.problem is not None), None)
    if problem is None:
        compared = _compare(fact, given)
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


def _measured(fact: Fact, kind: EngineKind, measurements: Sequence[FactMeasurements]) -> Measured:
    """What the engine of the source's tensor-parallel size gave, or else another of its kind."""
    fitting = [
        each for each in measurements if fact.name in each.measured and _is_of_kind(each, kind)
    ]
    own = [each for each in fitting if each.ranks == kind.tp_size]
    if isinstance(fact, RankWeights):
        fitting = own
    for each in (*own, *fitting):
        return each.measured[fact.name]
    return Measured(problem=f"there is no engine in {kind.label}")


def _is_of_kind(measured: FactMeasurements, kind: EngineKind) -> bool:
    scheme = make_weight_quantization(**measured.quantization)
    head, cache = measured.head, measured.kv_cache
    quantization = Quantization(scheme, cache, head)  # type: ignore[arg-type]
    return kind.is_of(measured.dtype, quantization)


def _compare(fact: Fact, given: Sequence[Measured]) -> _Comparison:
    found = given[0]
    match fact:
        case PromptTokens():
            differing = _differing(fact.tokens, found.tokens)
            return _Comparison(_ids(fact.tokens), _ids(found.tokens), differing)
        case GreedyTokens():
            return _Comparison(_ids(fact.tokens), _ids(found.tokens), max(found.numbers))
        case LogProbs():
            expected = (*fact.prompt_log_probs, *fact.log_probs)
            return _Comparison(
                _numbers(expected), _numbers(found.numbers), _largest(expected, found.numbers)
            )
        case GeneratedText():
            text = found.text or ""
            return _Comparison(repr(fact.text), repr(text), float(not text.startswith(fact.text)))
        case RankWeights():
            size = max(found.numbers, key=lambda number: abs(number - fact.bytes))
            return _Comparison(f"{fact.bytes:,}", f"{size:,.0f}", abs(size - fact.bytes))
        case ScoreDifference():
            difference = found.numbers[0] - given[1].numbers[0]
            return _Comparison(
                f"{fact.value:+.6g}",
                f"{difference:+.6g} ({given[1].numbers[0]:.6g} to {found.numbers[0]:.6g})",
                abs(difference - fact.value),
            )
        case Score():
            [score] = found.numbers
            return _Comparison(f"{fact.value:.6g}", f"{score:.6g}", abs(score - fact.value))
    raise TypeError(f"{type(fact).__name__} has no comparison")


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
