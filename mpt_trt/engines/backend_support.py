"""What each backend can do: the table of docs/backends.md, and the refusals that follow from it.

What `tensorrt` and `tensorrt_rtx` build is our own network, which has all that MptConfig can say.
TensorRT-LLM's MPTForCausalLM has its own limits; they are read from its sources, 0.20 to 1.2.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpt_trt.engines.spec import BACKENDS, TENSORRT_LLM, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import ft_file
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import (
    SMOOTHQUANT_ALPHA,
    Awq,
    SmoothQuant,
    WeightOnly,
    WeightQuantization,
    default_group_size,
)

AWQ_GROUP_SIZES = (128, 64)
"""For which its kernels exist."""
FIXED_EPSILON = 1e-5
"""Of its last norm, whatever the checkpoint says."""
DEFAULT_ALIBI_BIAS_MAX = 8
# Sizes of a rank's matrices must be multiples of these, or the layers pad themselves.
WEIGHT_ONLY_MULTIPLE, AWQ_MULTIPLE = 64, 128


RequestedValue = Callable[[EngineSpec], object]
"""The offending value when the spec has the feature, else None. (False is a value.)"""


@dataclass(frozen=True)
class Feature:
    """Something that a model or a variant may have: a row of the table.

    field: the key of config.yaml, config.json or of the command line that asks for it.
    requested_value: None for a row that nothing has to be refused for. unsupported: why a backend
    cannot, by backend. notes: how it can, by backend.
    """

    name: str
    field: str = ""
    requested_value: RequestedValue | None = None
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def able(self) -> list[str]:
        return [backend for backend in BACKENDS if backend not in self.unsupported]


def uses_modelopt_form(scheme: WeightQuantization | None) -> bool:
    """Whether SmoothQuant goes to TensorRT-LLM in ModelOpt's form, from a result of int8_sq.

    It is the only one that its plain attention can take, and it has exactly these settings; all
    others go in the form of its SmoothQuant plugins, from a smoothed FT checkpoint.
    """
    return isinstance(scheme, SmoothQuant) and scheme == SmoothQuant(
        SMOOTHQUANT_ALPHA, per_channel=True, per_token=False
    )


def uses_plugin_form(scheme: WeightQuantization | None) -> bool:
    """Whether TensorRT-LLM runs the scheme by its SmoothQuant plugin."""
    return isinstance(scheme, SmoothQuant) and not uses_modelopt_form(scheme)


def require_supported(spec: EngineSpec, backend: str) -> None:
    """Raises MptTrtError that names the field, its value and the backends that can."""
    for feature in FEATURES:
        if backend not in feature.unsupported or feature.requested_value is None:
            continue
        if (value := feature.requested_value(spec)) is not None:
            others = " or ".join(feature.able())
            raise MptTrtError(
                f"{feature.field} = {value}: backend {backend} cannot have it: "
                f"{feature.unsupported[backend]}; use backend {others}"
            )


# --- what a spec asks for ------------------------------------------------------------------------


def _float32_of_integers(spec: EngineSpec) -> str | None:
    has_integers = isinstance(spec.scheme, WeightOnly | Awq)
    return spec.dtype if has_integers and spec.dtype == "float32" else None


def _weight_only_groups(spec: EngineSpec) -> int | None:
    return spec.scheme.group_size if isinstance(spec.scheme, WeightOnly) else None


def _small_awq_groups(spec: EngineSpec) -> int | None:
    if not isinstance(spec.scheme, Awq):
        return None
    size = spec.scheme.group_size or default_group_size(spec.config)
    return None if size in AWQ_GROUP_SIZES else size


def _uneven_matrices(spec: EngineSpec) -> str | None:
    """The first of a rank's matrices whose sizes the 4-bit or 8-bit kernels cannot take."""
    if not isinstance(spec.scheme, WeightOnly | Awq):
        return None
    multiple = AWQ_MULTIPLE if isinstance(spec.scheme, Awq) else WEIGHT_ONLY_MULTIPLE
    for weight in filter(lambda weight: weight.is_linear, weights(spec.config)):
        shape = ft_file(spec.config, weight, Rank(0, spec.tp_size), spec.dtype).shape
        if any(size % multiple for size in shape):
            return f"{list(shape)} of {weight.name} on each of {spec.tp_size} ranks"
    return None


def _plugin_clipping(spec: EngineSpec) -> float | None:
    return spec.config.clip_qkv if uses_plugin_form(spec.scheme) else None


def _plugin_alibi(spec: EngineSpec) -> int | None:
    value = spec.config.alibi_bias_max
    is_other = uses_plugin_form(spec.scheme) and value != DEFAULT_ALIBI_BIAS_MAX
    return value if is_other else None


def _softmax_scale(spec: EngineSpec) -> float | None:
    value, usual = spec.config.softmax_scale, 1 / math.sqrt(spec.config.head_dim)
    return None if math.isclose(value, usual, rel_tol=1e-6) else value


def _expansion(spec: EngineSpec) -> float | None:
    config = spec.config
    is_usual = config.intermediate_size == 4 * config.hidden_size
    return None if is_usual else config.intermediate_size / config.hidden_size


def _uneven_vocabulary(spec: EngineSpec) -> int | None:
    size = spec.config.vocab_size
    return size if size % spec.tp_size else None


def _whole_head(spec: EngineSpec) -> bool | None:
    is_whole = spec.tp_size > 1 and not spec.vocabulary.head
    return False if is_whole else None


def _if_not(value: object, usual: object) -> object:
    return None if value == usual else value


NO_ARGUMENT = "its MPT model has no such parameter"

FEATURES: tuple[Feature, ...] = (
    Feature("`dtype: float32`"),
    Feature("`dtype: float16`, `bfloat16`"),
    Feature("`int8_weight_only`", notes={TENSORRT_LLM: "quantized by trtllm-build"}),
    Feature(
        "`int4_weight_only`, a scale an output feature",
        notes={TENSORRT_LLM: "quantized by trtllm-build"},
    ),
    Feature(
        "`int4_weight_only` in groups",
        "quantization.group_size",
        _weight_only_groups,
        {TENSORRT_LLM: "its int4 weights have a scale an output feature; so has group_size null"},
    ),
    Feature("`int4_awq` in groups of 128 or 64"),
    Feature(
        "`int4_awq` in groups of 32 or 16",
        "group_size",
        _small_awq_groups,
        {TENSORRT_LLM: "its kernels have groups of 128 or 64"},
    ),
    Feature(
        "`int8_weight_only`, `int4_weight_only`, `int4_awq` in float32",
        "dtype",
        _float32_of_integers,
        {TENSORRT_LLM: "its kernels for integer weights compute in float16 and bfloat16"},
    ),
    Feature(
        "the same with matrices of any size",
        "shape",
        _uneven_matrices,
        {
            TENSORRT_LLM: f"both must be multiples of {WEIGHT_ONLY_MULTIPLE} "
            f"(int4_awq: {AWQ_MULTIPLE})"
        },
    ),
    Feature(
        "`smoothquant` with `per_channel`, without `per_token`, alpha 0.5",
        notes={TENSORRT_LLM: "ModelOpt's form"},
    ),
    Feature("`smoothquant` with any other settings", notes={TENSORRT_LLM: "plugin form"}),
    Feature(
        "the same, of a model with `clip_qkv`",
        "clip_qkv",
        _plugin_clipping,
        {
            TENSORRT_LLM: "its SmoothQuant plugin clips nothing; alpha 0.5, per_channel: true and "
            "per_token: false need no plugin"
        },
    ),
    Feature(
        "the same, of a model with another `alibi_bias_max` than 8",
        "alibi_bias_max",
        _plugin_alibi,
        {
            TENSORRT_LLM: "its SmoothQuant plugin has 8; alpha 0.5, per_channel: true and "
            "per_token: false need no plugin"
        },
    ),
    Feature("`fp8`"),
    Feature(
        "`kv_cache_dtype: int8`, `fp8`",
        notes={TENSORRT_LLM: "one scale for keys and values"},
    ),
    Feature("multi-head, grouped-query and multi-query attention"),
    Feature("more ranks than K/V heads"),
    Feature("`clip_qkv`, `alibi_bias_max`"),
    Feature("an untied head"),
    Feature(
        "biases (`no_bias: false`)",
        "no_bias",
        lambda spec: "false" if spec.config.bias else None,
        {TENSORRT_LLM: "its MPT model has no biases in norms"},
    ),
    Feature(
        "learned positions",
        "attn_config.alibi",
        lambda spec: "false" if spec.config.position_embedding != "alibi" else None,
        {TENSORRT_LLM: "its MPT model has ALiBi alone"},
    ),
    Feature(
        "RMS norms",
        "norm_type",
        lambda spec: _if_not(spec.config.norm_type, "layernorm"),
        {TENSORRT_LLM: "its MPT model has layer norms alone"},
    ),
    Feature(
        "another epsilon of norms than 1e-5",
        "layer_norm_epsilon",
        lambda spec: _if_not(spec.config.layer_norm_epsilon, FIXED_EPSILON),
        {TENSORRT_LLM: f"its last norm has {FIXED_EPSILON:g} in any case"},
    ),
    Feature(
        "`expansion_ratio` other than 4",
        "expansion_ratio",
        _expansion,
        {TENSORRT_LLM: "its MPT model has 4"},
    ),
    Feature(
        "`qk_ln`",
        "attn_config.qk_ln",
        lambda spec: "true" if spec.config.qk_ln else None,
        {TENSORRT_LLM: NO_ARGUMENT},
    ),
    Feature(
        "`softmax_scale`",
        "attn_config.softmax_scale",
        _softmax_scale,
        {TENSORRT_LLM: NO_ARGUMENT},
    ),
    Feature(
        "`logit_scale`",
        "logit_scale",
        lambda spec: _if_not(spec.config.logit_scale, 1.0),
        {TENSORRT_LLM: NO_ARGUMENT},
    ),
    Feature("a sharded embedding (`shard_embedding`)"),
    Feature(
        "a head on every rank (`shard_head: false`)",
        "shard_head",
        _whole_head,
        {TENSORRT_LLM: "its head is always divided among ranks"},
    ),
    Feature(
        "a vocabulary that does not divide evenly among ranks",
        "vocab_size",
        _uneven_vocabulary,
        {TENSORRT_LLM: "its ranks have equal parts of the head"},
    ),
    Feature("logits of every token (`gather_all_token_logits`)"),
    Feature(
        "builds without a GPU",
        unsupported={"tensorrt": "on the GPU it runs on", TENSORRT_LLM: "on the GPU it runs on"},
    ),
    Feature(
        "runs on data-centre GPUs of compute capability 9.0 (Hopper)",
        unsupported={"tensorrt_rtx": "refused by the library"},
    ),
    Feature(
        "tried on a CPU, where there is no such GPU",
        unsupported={TENSORRT_LLM: "no other runtime reads its engines"},
    ),
    Feature(
        "figures of quality, and a place in reports",
        unsupported={TENSORRT_LLM: "smoke tests alone"},
    ),
)


def table() -> str:
    """The table of docs/backends.md."""
    head = f"| | {' | '.join(f'`{backend}`' for backend in BACKENDS)} |"
    rows = [head, f"|---|{'---|' * len(BACKENDS)}"]
    for feature in FEATURES:
        cells = [_cell(feature, backend) for backend in BACKENDS]
        rows.append(f"| {feature.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(feature: Feature, backend: str) -> str:
    if backend in feature.unsupported:
        return f"no: {feature.unsupported[backend]}"
    note = feature.notes.get(backend)
    return "yes" if note is None else f"yes: {note}"
