"""Reads `config.yaml` into frozen dataclasses: checked against its schema, with defaults."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mpt_trt.engines.compute_capabilities import default_capabilities
from mpt_trt.engines.spec import TENSORRT_LLM, BuilderChoice, BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Tolerance
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import (
    METHODS,
    HeadType,
    KvCacheType,
    Quantization,
    WeightQuantization,
    make_weight_quantization,
)
from mpt_trt.workflow.config_sources import ConfigSources

if TYPE_CHECKING:
    from jsonschema import ValidationError

Entry = TypeVar("Entry")

DEFAULT_SOURCES = ConfigSources()
SCHEMA = Path(__file__).with_name("config.schema.yaml")


@dataclass(frozen=True)
class Model:
    """Entry of `models`; see the schema."""

    source: str
    revision: str
    tokenizer: str | None
    adapter: str | None
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """Entry of `variants`; see the schema. quantization: None for `method: none`."""

    dtype: str
    quantization: WeightQuantization | None
    head: HeadType
    kv_cache_dtype: KvCacheType
    max_batch_size: int
    max_input_len: int
    max_output_len: int
    gather_all_token_logits: bool
    shard_embedding: bool
    shard_head: bool
    backend: str
    compute_capabilities: tuple[str, ...]
    tolerance: Tolerance

    @property
    def quantized(self) -> Quantization:
        return Quantization(self.quantization, self.kv_cache_dtype, self.head)

    @property
    def builder(self) -> BuilderChoice:
        return BuilderChoice(self.backend, self.compute_capabilities)

    def spec(self, config: MptConfig, tp_size: int) -> EngineSpec:
        """Makes the spec of a model's engine in this variant.

        Raises MptTrtError when tp_size does not divide the model.
        """
        limits = BuildLimits(
            self.max_batch_size,
            self.max_input_len,
            self.max_output_len,
            self.gather_all_token_logits,
        )
        vocabulary = VocabularySharding(self.shard_embedding, self.shard_head)
        return EngineSpec(config, self.dtype, tp_size, limits, vocabulary, self.quantized)


@dataclass(frozen=True)
class Calibration:
    """Section `calibration`; see the schema. text: None for the text that ships."""

    text: str | None
    num_samples: int
    sequence_length: int
    device: str

    @property
    def num_tokens(self) -> int:
        return self.num_samples * self.sequence_length


@dataclass(frozen=True)
class SmokeTest:
    """Section `smoke_test`; see the schema."""

    prompt: str
    max_new_tokens: int


@dataclass(frozen=True)
class Site:
    """Section `site`; see the schema."""

    gpus: str
    gpu_request: str
    gpu_memory_gb: dict[str, float]
    gpus_per_node: int
    mpi: str
    container: str | None
    job_overhead_mb: int


@dataclass(frozen=True)
class Quality:
    """Section `quality`; see the schema."""

    text: str
    num_windows: int
    window_length: int
    whole_text: bool
    tasks: tuple[str, ...]
    task_dir: str | None

    @property
    def num_tokens(self) -> int:
        """Maximum number of tokens that are read."""
        return self.num_windows * self.window_length


@dataclass(frozen=True)
class Proofs:
    """Section `proofs`; see the schema. variants: None for all. tp_size: None for the source's."""

    variants: tuple[str, ...] | None
    tp_size: int | None


@dataclass(frozen=True)
class Report:
    """Section `report`; see the schema. variants: None for all."""

    variants: tuple[str, ...] | None
    tp_sizes: tuple[int, ...]
    more_tp_sizes: dict[str, tuple[int, ...]]
    throughput: bool = False


@dataclass(frozen=True)
class Settings:
    """The configuration, with models and variants by name."""

    models: dict[str, Model]
    variants: dict[str, Variant]
    calibration: Calibration
    smoke_test: SmokeTest
    site: Site
    quality: Quality
    proofs: Proofs
    report: Report
    targets: tuple[str, ...]

    def model(self, name: str) -> Model:
        """Returns a model; raises MptTrtError with the nearest name when it is unknown."""
        return _entry("model", self.models, name)

    def variant(self, name: str) -> Variant:
        """Returns a variant; raises MptTrtError with the nearest name when it is unknown."""
        return _entry("variant", self.variants, name)

    def variants_of(self, backend: str) -> tuple[str, ...]:
        """Names of the variants with that backend."""
        return tuple(name for name, entry in self.variants.items() if entry.backend == backend)

    def engines_of_report(self) -> list[tuple[str, int]]:
        """Lists (variant, tp_size) of the engines in a model's report, in its order.

        Raises MptTrtError when a variant is unknown, or its quality is not measured.
        """
        report, unmeasured = self.report, self.variants_of(TENSORRT_LLM)
        measured = tuple(name for name in self.variants if name not in unmeasured)
        listed = measured if report.variants is None else report.variants
        found = []
        for name in dict.fromkeys((*listed, *report.more_tp_sizes)):
            self.variant(name)
            if name in unmeasured:
                raise MptTrtError(
                    f"config.yaml: report: {name} has backend {TENSORRT_LLM}, whose quality "
                    "is not measured; leave it out"
                )
            usual = report.tp_sizes if name in listed else ()
            found += [
                (name, size) for size in sorted({*usual, *report.more_tp_sizes.get(name, ())})
            ]
        return found


def parse_settings(
    content: Mapping[str, Any], sources: ConfigSources = DEFAULT_SOURCES
) -> Settings:
    """Checks `content` and fills in defaults.

    Raises MptTrtError that names the source, the key, its value and, for an unknown key, the
    nearest known one.
    """
    import jsonschema  # tools need only defaults

    schema = _schema()
    _require_text_keys(content, sources)
    content = sources.with_types(content, schema, _resolved)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(content)
    if error := next(iter(sorted(errors, key=lambda e: list(map(str, e.absolute_path)))), None):
        raise MptTrtError(f"{sources.of(_place(error))}: {_explain(error)}")
    _require_own_options(content, sources)
    filled = _with_defaults(content, schema)
    return Settings(
        models={name: _model(entry) for name, entry in filled["models"].items()},
        variants={name: _variant(entry) for name, entry in filled["variants"].items()},
        calibration=Calibration(**filled["calibration"]),
        smoke_test=SmokeTest(**filled["smoke_test"]),
        site=Site(**filled["site"]),
        quality=Quality(**filled["quality"] | {"tasks": tuple(filled["quality"]["tasks"])}),
        proofs=_proofs(filled["proofs"]),
        report=_report(filled["report"]),
        targets=tuple(filled["targets"]),
    )


def variant_default(key: str) -> Any:
    """Default of a variant's key, for command-line tools with the same option."""
    return _schema()["$defs"]["variant"]["properties"][key]["default"]


def variant_choices(key: str) -> list[str]:
    """Valid values of a variant's key."""
    return _schema()["$defs"]["variant"]["properties"][key]["enum"]


def quantization_default(key: str) -> Any:
    """Default of a key of a variant's `quantization`."""
    return _quantization_schema()[key]["default"]


def quantization_choices(key: str) -> list[Any]:
    """Valid values of a key of a variant's `quantization`."""
    return _quantization_schema()[key]["enum"]


def _quantization_schema() -> dict[str, Any]:
    return _schema()["$defs"]["variant"]["properties"]["quantization"]["properties"]


def default_calibration() -> Calibration:
    """Default settings of calibration."""
    return Calibration(**_with_defaults({}, _schema())["calibration"])


def default_tolerance() -> Tolerance:
    """Default tolerance of a variant."""
    return Tolerance(**_with_defaults({}, _schema()["$defs"]["variant"])["tolerance"])


def nearest(name: str, known: Iterable[str]) -> str:
    """Makes a hint for an unknown name: `; did you mean 'x'?`, or the known names."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"known names: {', '.join(names) or 'none'}"


def _entry(kind: str, entries: dict[str, Entry], name: str) -> Entry:
    if not entries:
        raise MptTrtError(
            f"config.yaml has no {kind}s, not even {name!r}; if your file replaces mpt-trt's, copy "
            f"its {kind}s, or give your file with --configfile under another name"
        )
    if name not in entries:
        raise MptTrtError(f"config.yaml has no {kind} named {name!r}; {nearest(name, entries)}")
    return entries[name]


def _model(entry: dict[str, Any]) -> Model:
    return Model(**entry | {"facts": tuple(entry["facts"])})


def _proofs(entry: dict[str, Any]) -> Proofs:
    variants = entry["variants"]
    return Proofs(None if variants is None else tuple(variants), entry["tp_size"])


def _variant(entry: dict[str, Any]) -> Variant:
    scheme = make_weight_quantization(**entry["quantization"])
    given = entry["compute_capabilities"]
    usual = default_capabilities(Quantization(scheme, entry["kv_cache_dtype"]))
    special = {
        "quantization": scheme,
        "head": entry["quantization"]["head"],
        "tolerance": Tolerance(**entry["tolerance"]),
        "compute_capabilities": usual if given is None else tuple(given),
    }
    return Variant(**entry | special)


def _report(entry: dict[str, Any]) -> Report:
    variants, more = entry["variants"], entry["more_tp_sizes"]
    return Report(
        variants=None if variants is None else tuple(variants),
        tp_sizes=tuple(entry["tp_sizes"]),
        more_tp_sizes={name: tuple(sizes) for name, sizes in more.items()},
        throughput=entry["throughput"],
    )


def _require_text_keys(
    content: object, sources: ConfigSources, place: tuple[object, ...] = ()
) -> None:
    """Raises MptTrtError when YAML reads a key as a number, a boolean or a date."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if not isinstance(key, str):
            name = ".".join(map(str, place)) or "top level"
            raise MptTrtError(
                f"{sources.of((*place, key))}: {name}: the key {key} is not a text in YAML; put it "
                "in quotes"
            )
        _require_text_keys(value, sources, (*place, key))


def _require_own_options(content: Mapping[str, Any], sources: ConfigSources) -> None:
    """Raises MptTrtError when a variant sets an option of another quantization method."""
    for name, variant in content.get("variants", {}).items():
        options = dict(variant.get("quantization", {}))
        method = options.pop("method", "none")
        # Every method can have it.
        options.pop("head", None)
        known = frozenset() if method == "none" else METHODS[method][1]
        if method == "mixed" and options.get("bits") is None:
            origin = sources.of(("variants", name, "quantization", "method"))
            raise MptTrtError(
                f"{origin}: variants.{name}.quantization.bits is missing: mixed needs the bits per "
                "weight, such as 4.5"
            )
        for option, value in options.items():
            if option not in known:
                legal = ", ".join(sorted(known)) or "none"
                origin = sources.of(("variants", name, "quantization", option))
                raise MptTrtError(
                    f"{origin}: variants.{name}.quantization.{option} = {value!r}: {method} has no "
                    f"such option; it has {legal}"
                )


@functools.cache
def _schema() -> dict[str, Any]:
    import yaml  # see config_sources.py

    # libyaml, if PyYAML has it, reads the schema in a tenth of the time.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(SCHEMA.read_text(), loader)


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return schema if reference is None else _schema()["$defs"][reference.rsplit("/", 1)[1]]


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Fills in the schema's defaults for missing keys of `value`."""
    schema = _resolved(schema)
    if not isinstance(value, Mapping):
        return value
    known = schema.get("properties", {})
    missing = {k: s["default"] for k, s in known.items() if k not in value and "default" in s}
    others = schema.get("additionalProperties") or {}
    return {k: _with_defaults(v, known.get(k, others)) for k, v in {**missing, **value}.items()}


def _place(error: ValidationError) -> list[object]:
    """Keys that lead to the wrong value or the unknown key."""
    place: list[object] = list(error.absolute_path)
    return [*place, _unknown_key(error)] if error.validator == "additionalProperties" else place


def _unknown_key(error: ValidationError) -> object:
    schema: Any = error.schema
    instance: Any = error.instance
    return next(key for key in instance if key not in schema.get("properties", {}))


def _explain(error: ValidationError) -> str:
    # The content of these attributes depends on the validator.
    schema: Any = error.schema
    expected: Any = error.validator_value
    instance: Any = error.instance
    place = ".".join(map(str, error.absolute_path)) or "top level"
    if error.validator == "additionalProperties":
        known, unknown = schema.get("properties", {}), _unknown_key(error)
        return f"{place}: unknown key {unknown!r}; {nearest(str(unknown), known)}"
    if error.validator == "enum":
        options = ", ".join(map(str, expected))
        return f"{place} = {instance!r}: choose one of {options}"
    if error.validator == "required":
        return f"{place}: {error.message}"
    return f"{place} = {instance!r}: {error.message}"
