"""Published facts about models, and the files that hold them.

Does not import NumPy, because Snakemake's planning reads facts.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpt_trt.engines.spec import EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import DTYPES
from mpt_trt.quantization.schemes import METHODS, Quantization, method_of
from mpt_trt.system.files import ContentHash, read_json
from mpt_trt.system.json_text import shown
from mpt_trt.system.typed_json import from_json

SHIPPED = Path(__file__).parent / "facts"
"""Folder of the facts that ship with mpt-trt."""
MOST_FACTS = 10_000
MOST_TASK_FILES = 1_000


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
        _require_filled(self, "name", "source", "reason")
        for field in fields(self):
            _require_readable(field.name, getattr(self, field.name))

    @property
    def engines(self) -> tuple[EngineKind, ...]:
        """The engines that the fact compares."""
        return (self.engine,)


@dataclass(frozen=True, kw_only=True)
class PromptTokens(Fact):
    """Token ids of a text."""

    prompt: str
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_filled(self, "prompt")
        _require_tokens(self, "tokens")


@dataclass(frozen=True, kw_only=True)
class GreedyTokens(Fact):
    """The most likely continuation of token ids. tolerance: of a log-probability, for near ties."""

    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_tokens(self, "prompt_tokens", "tokens")

    @property
    def most_ties(self) -> int:
        """Most tokens that may differ in near ties: one in eight, and at least one.

        Without this limit, an engine whose logits are all alike would have ties only.
        """
        return max(1, len(self.tokens) // 8)


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
        _require_tokens(self, "prompt_tokens", "tokens")
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ValueError("prompt is empty")
        if not self.text:
            raise ValueError("text is empty, and every text begins with it")
        _require_at_least("max_new_tokens", self.max_new_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class RankWeights(Fact):
    """Bytes of the weights of one rank."""

    bytes: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least("bytes", self.bytes, 1)


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
        for key in ("metric", "task", "task_dir", "text"):
            if getattr(self, key) is not None:
                _require_filled(self, key)
        if self.window_length is not None:
            _require_at_least("window_length", self.window_length, 2)
        if (self.task is None) == (self.text is None):
            raise ValueError("either task or text is expected")
        if self.text is not None and self.metric not in TEXT_METRICS:
            known = ", ".join(TEXT_METRICS)
            raise ValueError(f"metric = {shown(self.metric)}: of a text, there are {known}")


@dataclass(frozen=True, kw_only=True)
class ScoreDifference(Score):
    """How much a metric of `engine` exceeds that of `base`."""

    base: EngineKind

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.base.dtype, self.base.method) == (self.engine.dtype, self.engine.method):
            raise ValueError(
                f"base = {self.base.label}: another type or quantization than the engine's is "
                "expected"
            )

    @property
    def engines(self) -> tuple[EngineKind, ...]:
        return (self.engine, self.base)


SHOWN_KEYS = ("name", "source", "metric", "task")
PATH_KEYS = ("text", "task_dir")
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

    @property
    def named_paths(self) -> list[Path]:
        """Texts and folders of task files that the facts name; they need not exist."""
        scores = [fact for fact in self.facts if isinstance(fact, Score)]
        named = [name for fact in scores for name in (fact.text, fact.task_dir) if name is not None]
        return [self.find(name) for name in dict.fromkeys(named)]


@dataclass(frozen=True)
class _Content:
    facts: tuple[dict[str, Any], ...]
    models: tuple[str, ...] = ()


def read_facts(path: Path) -> FactsFile:
    """Reads a file of facts; raises MptTrtError, naming file, fact and key, for any other."""
    content = read_json(path)
    try:
        _require_known(content, (field.name for field in fields(_Content)))
        read = from_json(_Content, content)
        if len(read.facts) > MOST_FACTS:
            raise ValueError(f"{len(read.facts):,} facts: at most {MOST_FACTS:,} are expected")
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


def facts_of(files: Iterable[FactsFile]) -> list[Fact]:
    """All facts in files, in their order."""
    return [fact for file in files for fact in file.facts]


def inputs_of(files: Iterable[FactsFile]) -> list[Path]:
    """Files of facts, and what their facts name: no output may replace them."""
    return [path for file in files for path in (file.path, *file.named_paths)]


def existing_files(path: Path) -> Iterator[Path]:
    """The regular file at a path, or those in a folder, sorted; none if nothing is there.

    Hidden files and compiled Python code are left out.

    Raises MptTrtError when there are more than a folder of task files can have.
    """
    if os.path.isfile(path):  # noqa: PTH113 (that fails for a path that is too long or forbidden)
        yield path
        return
    count = 0
    for root, folders, names in os.walk(path):
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__pycache__")))
        for name in sorted(names):
            found = Path(root, name)
            if name.startswith(".") or not os.path.isfile(found):  # noqa: PTH113
                continue
            count += 1
            if count > MOST_TASK_FILES:
                raise MptTrtError(
                    f"{path}: more than {MOST_TASK_FILES:,} files; task_dir must be a folder with "
                    "nothing but task files and their data"
                )
            yield found


def fact_hash(fact: Fact) -> str:
    """Hash of a fact's kind and keys, by which measurements of another one are told apart."""
    digest = ContentHash()
    digest.update(json.dumps([kind_of(fact), asdict(fact)], sort_keys=True).encode())
    return str(digest)


def shipped_facts(source: str) -> list[Path]:
    """Files that ship with mpt-trt and are about the model with this hub id."""
    return [path for path in sorted(SHIPPED.glob("*.json")) if source in read_facts(path).models]


def _fact(entry: dict[str, Any], index: int) -> Fact:
    name = entry.get("name")
    where = f"fact {name!r}" if isinstance(name, str) else f"facts[{index}]"
    where = where if len(where) <= 200 else f"{where[:197]}..."
    kind = entry.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(KINDS)
        raise ValueError(f"{where}: kind = {shown(kind)}: one of {known} is expected")
    try:
        _require_known(entry, ("kind", *(field.name for field in fields(KINDS[kind]))))
        for key in ("engine", "base"):
            if isinstance(engine := entry.get(key), dict):
                _require_known(engine, (field.name for field in fields(EngineKind)), f"{key}.")
        return from_json(KINDS[kind], entry)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _require_filled(fact: Fact, *keys: str) -> None:
    """Rejects texts without a visible character."""
    for key in keys:
        if not getattr(fact, key).strip():
            raise ValueError(f"{key} is empty")


def _require_tokens(fact: Fact, *keys: str) -> None:
    for key in keys:
        if not (tokens := getattr(fact, key)):
            raise ValueError(f"{key} is empty")
        if min(tokens) < 0:
            raise ValueError(f"{key} = {shown(min(tokens))}: at least 0 is expected")


def _require_at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{key} = {value}: at least {least} is expected")


def _require_readable(key: str, value: object) -> None:
    """Rejects texts that cannot be printed, or that cannot be paths; prompts may have any text."""
    if not isinstance(value, str):
        return
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{key} = {shown(value)}: it has half of a surrogate pair")
    if key in SHOWN_KEYS and not value.isprintable():
        raise ValueError(f"{key} = {shown(value)}: it has control characters")
    if key in PATH_KEYS and "\0" in value:
        raise ValueError(f"{key} = {shown(value)}: it has a NUL character")


def _require_known(entry: dict[str, Any], known: Iterable[str], where: str = "") -> None:
    known = list(known)
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{where}{shown(key)}: no such key; {hint}")


def _require_distinct(facts: tuple[Fact, ...]) -> None:
    names: set[str] = set()
    for fact in facts:
        if fact.name in names:
            raise ValueError(f"two facts have the name {fact.name!r}")
        names.add(fact.name)
