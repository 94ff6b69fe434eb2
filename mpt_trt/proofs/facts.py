"""Published facts about models, and the files that hold them.

Does not import NumPy, because Snakemake's planning reads facts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_trt.engines.spec import EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import METHODS, Quantization, method_of
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown
from mpt_trt.system.typed_json import from_json

SHIPPED = Path(__file__).parent / "facts"
"""Folder of the facts that ship with mpt-trt."""
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class EngineKind:
    """The engines that a fact is about. method: as in config.yaml. tp_size: that of the source."""

    dtype: str
    method: str = "none"
    tp_size: int = 1

    def __post_init__(self) -> None:
        known = ("none", *METHODS)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype = {shown(self.dtype)}: one of {', '.join(DTYPES)} is expected")
        if self.method not in known:
            raise ValueError(
                f"method = {shown(self.method)}: one of {', '.join(known)} is expected"
            )
        if self.tp_size < 1:
            raise ValueError(f"tp_size = {self.tp_size}: at least 1 is expected")

    def is_of(self, dtype: str, quantization: Quantization) -> bool:
        """Returns whether engines of that type and quantization are of this kind."""
        is_plain = quantization.kv_cache == "auto" and quantization.head == "auto"
        return is_plain and (dtype, method_of(quantization.scheme)) == (self.dtype, self.method)

    def fits(self, spec: EngineSpec) -> bool:
        """Returns whether an engine is of this kind, whatever its tensor-parallel size."""
        return self.is_of(spec.dtype, spec.quantization)

    @property
    def label(self) -> str:
        """Words for tables: `float16, int4_awq, 2 ranks`."""
        method = "" if self.method == "none" else f", {self.method}"
        return f"{self.dtype}{method}, {self.tp_size} rank{'s' * (self.tp_size > 1)}"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A published fact. tolerance: accepted deviation, in the fact's unit. reason: why that one.

    name: unique within a model. source: who published it, and where.
    """

    name: str
    source: str
    engine: EngineKind
    tolerance: float
    reason: str

    def __post_init__(self) -> None:
        if self.tolerance < 0:
            raise ValueError(f"tolerance = {self.tolerance}: at least 0 is expected")
        for key in ("name", "source", "reason"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key} is empty")

    @property
    def engines(self) -> tuple[EngineKind, ...]:
        """The engines that the fact compares."""
        return (self.engine,)


@dataclass(frozen=True, kw_only=True)
class PromptTokens(Fact):
    """Token ids of a text."""

    prompt: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GreedyTokens(Fact):
    """The most likely continuation of token ids. tolerance: of a log-probability, for near ties."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_filled(self, "prompt_tokens", "tokens")


@dataclass(frozen=True, kw_only=True)
class LogProbs(Fact):
    """Natural log-probabilities of a prompt's tokens from the second on, and of those after it.

    prompt_log_probs may be empty if the source has none.
    """

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    prompt_log_probs: tuple[float, ...]
    log_probs: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_filled(self, "prompt_tokens", "tokens")
        if len(self.prompt_log_probs) not in (0, len(self.prompt_tokens) - 1):
            raise ValueError("prompt_log_probs: one per prompt token after the first is expected")
        if len(self.log_probs) != len(self.tokens):
            raise ValueError("log_probs: one per token is expected")


@dataclass(frozen=True, kw_only=True)
class GeneratedText(Fact):
    """The beginning of the greedy continuation of a text. max_new_tokens: as in the source."""

    prompt: str
    text: str
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class RankWeights(Fact):
    """Bytes of the weights of one rank."""

    bytes: int


@dataclass(frozen=True, kw_only=True)
class Score(Fact):
    """A metric of one of lm-eval's tasks, or of a text as a whole.

    task: the task's name; None for a text. text: path of the text, from the folder of the facts.
    task_dir: folder of task files, from there; None for lm-eval's own tasks. metric: as in lm-eval.
    window_length: most tokens that the source's model reads at a time; None if it does not matter.
    """

    metric: str
    value: float
    task: str | None = None
    task_dir: str | None = None
    text: str | None = None
    window_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.task is None) == (self.text is None):
            raise ValueError("either task or text is expected")
        if self.text is not None and self.metric not in TEXT_METRICS:
            known = ", ".join(TEXT_METRICS)
            raise ValueError(f"metric = {shown(self.metric)}: of a text, there are {known}")


@dataclass(frozen=True, kw_only=True)
class ScoreDifference(Score):
    """How much a metric of `engine` exceeds that of `base`."""

    base: EngineKind

    @property
    def engines(self) -> tuple[EngineKind, ...]:
        return (self.engine, self.base)


TEXT_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")
KINDS: dict[str, type[Fact]] = {
    "prompt_tokens": PromptTokens,
    "greedy_tokens": GreedyTokens,
    "log_probs": LogProbs,
    "text": GeneratedText,
    "rank_weights": RankWeights,
    "score": Score,
    "score_difference": ScoreDifference,
}
"""Classes of facts by their `kind` in a file."""


def kind_of(fact: Fact) -> str:
    """Name of a fact's kind in a file."""
    return next(name for name, kind in KINDS.items() if type(fact) is kind)


@dataclass(frozen=True)
class FactsFile:
    """A file of facts. models: hub ids that they are about; () in a user's own file."""

    path: Path
    models: tuple[str, ...]
    facts: tuple[Fact, ...]

    def find(self, path: str) -> Path:
        """Path of a file that a fact names, relative to the folder of this file."""
        return self.path.parent / path


@dataclass(frozen=True)
class _Content:
    facts: tuple[dict[str, Any], ...]
    models: tuple[str, ...] = ()


def read_facts(path: Path) -> FactsFile:
    """Reads a file of facts; raises MptTrtError, naming file, fact and key, for any other."""
    content = read_json(path)
    try:
        read = from_json(_Content, content)
        facts = tuple(_fact(entry, index) for index, entry in enumerate(read.facts))
        _require_distinct(facts)
    except ValueError as error:
        raise MptTrtError(f"{path}: {error}; docs/proofs.md describes the format") from None
    return FactsFile(path, read.models, facts)


def read_all_facts(paths: Iterable[Path]) -> list[FactsFile]:
    """Reads several files; raises MptTrtError when two facts have the same name."""
    files = [read_facts(path) for path in paths]
    first: dict[str, Path] = {}
    for file in files:
        for fact in file.facts:
            if fact.name in first:
                raise MptTrtError(
                    f"{file.path}: fact {fact.name!r} is also in {first[fact.name]}; rename it"
                )
            first[fact.name] = file.path
    return files


def shipped_facts(source: str) -> list[Path]:
    """Files that ship with mpt-trt and are about the model with this hub id."""
    return [path for path in sorted(SHIPPED.glob("*.json")) if source in read_facts(path).models]


def _fact(entry: dict[str, Any], index: int) -> Fact:
    name = entry.get("name")
    where = f"fact {name!r}" if isinstance(name, str) else f"facts[{index}]"
    if (kind := entry.get("kind")) not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{where}: kind = {shown(kind)}: one of {known} is expected")
    try:
        return from_json(KINDS[kind], entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _require_filled(fact: Fact, *keys: str) -> None:
    for key in keys:
        if not getattr(fact, key):
            raise ValueError(f"{key} is empty")


def _require_distinct(facts: tuple[Fact, ...]) -> None:
    names = [fact.name for fact in facts]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two facts have the name {name!r}")
