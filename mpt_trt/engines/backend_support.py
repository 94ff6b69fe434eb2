"""Features that each backend supports, for the table of docs/backends.md and for checks.

`tensorrt` and `tensorrt_rtx` build mpt-trt's own network, which supports every MptConfig. The
limits of TensorRT-LLM's MPTForCausalLM come from the sources of 0.20 to 1.2.1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpt_trt.engines.spec import BACKENDS, TENSORRT_LLM, TENSORRT_RTX, EngineSpec
from mpt_trt.engines.trtllm.buildable import HEAD_SIZES
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.layout import ft_file
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import (
    SMOOTHQUANT_ALPHA,
    Awq,
    Gptq,
    Mixed,
    SmoothQuant,
    WeightOnly,
    WeightQuantization,
    group_size_of,
)

AWQ_GROUP_SIZES = (128, 64)
"""Group sizes of TensorRT-LLM's 4-bit kernels."""
FIXED_EPSILON = 1e-5
"""Epsilon of TensorRT-LLM's last norm, which ignores the checkpoint's."""
DEFAULT_ALIBI_BIAS_MAX = 8
LEAST_MULTIPLE = 64
"""TensorRT-LLM pads a matrix, whose weights then no longer fit, unless both of its sizes over all
ranks are multiples of tp_size times this or, if larger, the group size."""


RequestedValue = Callable[[EngineSpec], object]
"""Returns the offending value if the spec has the feature, else None. (False is a value.)"""


@dataclass(frozen=True)
class Feature:
    """A feature of a model or a variant: one row of the table.

    field: the key of config.yaml or config.json, or the option, that requests the feature.
    requested_value: None for a row that never leads to a rejection. unsupported: reason of each
    backend that lacks the feature. notes: how a backend supports it.
    """

    name: str
    field: str = ""
    requested_value: RequestedValue | None = None
    unsupported: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def supporting_backends(self) -> list[str]:
        """Backends that have the feature."""
        return [backend for backend in BACKENDS if backend not in self.unsupported]


def uses_modelopt_form(scheme: WeightQuantization | None) -> bool:
    """Returns whether TensorRT-LLM gets SmoothQuant in ModelOpt's form, from int8_sq calibration.

    TensorRT-LLM's plain attention accepts only that form, which has exactly these settings. Other
    settings need its SmoothQuant plugins and a smoothed FT checkpoint.
    """
    return isinstance(scheme, SmoothQuant) and scheme == SmoothQuant(
        SMOOTHQUANT_ALPHA, per_channel=True, per_token=False
    )


def uses_plugin_form(scheme: WeightQuantization | None) -> bool:
    """Returns whether TensorRT-LLM runs the scheme with its SmoothQuant plugin."""
    return isinstance(scheme, SmoothQuant) and not uses_modelopt_form(scheme)


def require_supported(spec: EngineSpec, backend: str) -> None:
    """Raises MptTrtError if the backend lacks a feature that the spec requests.

    The message names the field, its value and the backends that support it.
    """
    for feature in FEATURES:
        if backend not in feature.unsupported or feature.requested_value is None:
            continue
        if (value := feature.requested_value(spec)) is not None:
            others = " or ".join(feature.supporting_backends())
            raise MptTrtError(
                f"{feature.field} = {value}: backend {backend} does not support it: "
                f"{feature.unsupported[backend]}; use backend {others}"
            )


# --- requested values ----------------------------------------------------------------------------


def _float32_of_integers(spec: EngineSpec) -> str | None:
    has_integers = isinstance(spec.scheme, WeightOnly | Awq | Gptq)
    return spec.dtype if has_integers and spec.dtype == "float32" else None


def _weight_only_groups(spec: EngineSpec) -> int | None:
    return spec.scheme.group_size if isinstance(spec.scheme, WeightOnly) else None


def _small_awq_groups(spec: EngineSpec) -> int | None:
    if not isinstance(spec.scheme, Awq | Gptq):
        return None
    size = group_size_of(spec.scheme, spec.config)
    return None if size in AWQ_GROUP_SIZES else size


def _uneven_matrices(spec: EngineSpec) -> str | None:
    """Finds a matrix whose sizes the 4-bit or 8-bit kernels do not support.

    Source: WeightOnlyQuantLinear and WeightOnlyGroupwiseQuantLinear of TensorRT-LLM 1.2.1.
    """
    if not isinstance(spec.scheme, WeightOnly | Awq | Gptq):
        return None
    group_size = 0
    if isinstance(spec.scheme, Awq | Gptq):
        group_size = group_size_of(spec.scheme, spec.config)
    multiple = max(LEAST_MULTIPLE, group_size) * spec.tp_size
    for weight in filter(lambda weight: weight.is_linear, weights(spec.config)):
        shape = ft_file(spec.config, weight, Rank(0, spec.tp_size), spec.dtype).shape
        whole = ft_file(spec.config, weight, Rank(0, 1), spec.dtype).shape
        # Ranks that share K/V heads have copies of them, which count.
        over_all_ranks = [
            size if size == full else size * spec.tp_size
            for size, full in zip(shape, whole, strict=True)
        ]
        if any(size % multiple for size in over_all_ranks):
            return f"{over_all_ranks} of {weight.name} over {spec.tp_size} rank(s)"
    return None


def _plugin_dtype(spec: EngineSpec) -> str | None:
    is_other = uses_plugin_form(spec.scheme) and spec.dtype != "float16"
    return spec.dtype if is_other else None


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


NO_PARAMETER = "its MPT model has no such parameter"

ONE_FORMAT = "its checkpoints have one integer format for all matrices"


def mixed_is_unsupported() -> MptTrtError:
    """Makes the error for `mixed` in a TensorRT-LLM checkpoint."""
    return MptTrtError(
        f"quantization.method = mixed: TensorRT-LLM does not support it: {ONE_FORMAT}"
    )


FEATURES: tuple[Feature, ...] = (
    Feature("`dtype: float32`"),
    Feature("`dtype: float16`, `bfloat16`"),
    Feature("`int8_weight_only`", notes={TENSORRT_LLM: "quantized by trtllm-build"}),
    Feature(
        "`int4_weight_only`, one scale per output feature",
        notes={TENSORRT_LLM: "quantized by trtllm-build"},
    ),
    Feature(
        "`int4_weight_only` in groups",
        "quantization.group_size",
        _weight_only_groups,
        {TENSORRT_LLM: "it has one int4 scale per output feature; set group_size to null"},
    ),
    Feature("`int4_awq`, `int4_gptq` in groups of 128 or 64"),
    Feature(
        "`int4_awq`, `int4_gptq` in groups of 32 or 16",
        "group_size",
        _small_awq_groups,
        {TENSORRT_LLM: "its kernels support groups of 128 and 64"},
    ),
    Feature(
        "`int8_weight_only`, `int4_weight_only`, `int4_awq`, `int4_gptq` in float32",
        "dtype",
        _float32_of_integers,
        {TENSORRT_LLM: "its kernels for integer weights compute in float16 and bfloat16"},
    ),
    Feature(
        "integer weights with matrices of any size",
        "shape",
        _uneven_matrices,
        {
            TENSORRT_LLM: f"both must be multiples of {LEAST_MULTIPLE} (int4_awq, int4_gptq: of "
            "the group size, if larger) times the number of ranks"
        },
    ),
    Feature(
        "`smoothquant` with `alpha: 0.5`, `per_channel: true`, `per_token: false`",
        notes={TENSORRT_LLM: "ModelOpt's form"},
    ),
    Feature("`smoothquant` with other settings", notes={TENSORRT_LLM: "plugin form"}),
    Feature(
        "`smoothquant` with other settings, in bfloat16 or float32",
        "dtype",
        _plugin_dtype,
        {
            TENSORRT_LLM: "its SmoothQuant plugin supports only float16; alpha: 0.5, per_channel: "
            "true and per_token: false need no plugin"
        },
    ),
    Feature(
        "`smoothquant` with other settings, and `clip_qkv`",
        "clip_qkv",
        _plugin_clipping,
        {
            TENSORRT_LLM: "its SmoothQuant plugin does not clip; alpha: 0.5, per_channel: true and "
            "per_token: false need no plugin"
        },
    ),
    Feature(
        "`smoothquant` with other settings, and `alibi_bias_max` other than 8",
        "alibi_bias_max",
        _plugin_alibi,
        {
            TENSORRT_LLM: "its SmoothQuant plugin always uses 8; alpha: 0.5, per_channel: true and "
            "per_token: false need no plugin"
        },
    ),
    Feature("`fp8`"),
    Feature(
        "`kv_cache_dtype: int8`, `fp8`",
        notes={TENSORRT_LLM: "keys and values share a scale"},
    ),
    Feature(
        "`mixed`",
        "quantization.method",
        lambda spec: "mixed" if isinstance(spec.scheme, Mixed) else None,
        {TENSORRT_LLM: ONE_FORMAT},
    ),
    Feature(
        "`head: int8`",
        "quantization.head",
        lambda spec: None if spec.quantization.head == "auto" else spec.quantization.head,
        {TENSORRT_LLM: "its head and its embedding have the type of the activations"},
    ),
    Feature("multi-head, grouped-query and multi-query attention"),
    Feature("more ranks than K/V heads"),
    Feature("`clip_qkv`, `alibi_bias_max`"),
    Feature("an untied head (`tie_word_embeddings: false`)"),
    Feature(
        "biases (`no_bias: false`)",
        "no_bias",
        lambda spec: "false" if spec.config.bias else None,
        {TENSORRT_LLM: "its norms have no biases"},
    ),
    Feature(
        "learned positions",
        "attn_config.alibi",
        lambda spec: "false" if spec.config.position_embedding == "learned" else None,
        {TENSORRT_LLM: "its MPT model supports only ALiBi"},
    ),
    Feature(
        "rotary positions (`rope: true`)",
        "attn_config.rope",
        lambda spec: "true" if spec.config.position_embedding == "rope" else None,
        {TENSORRT_LLM: "its MPT model supports only ALiBi"},
    ),
    Feature(
        "RMS norms",
        "norm_type",
        lambda spec: _if_not(spec.config.norm_type, "layernorm"),
        {TENSORRT_LLM: "its MPT model supports only layer norms"},
    ),
    Feature(
        "a norm epsilon other than 1e-5",
        "layer_norm_epsilon",
        lambda spec: _if_not(spec.config.layer_norm_epsilon, FIXED_EPSILON),
        {TENSORRT_LLM: f"its last norm always uses {FIXED_EPSILON:g}"},
    ),
    Feature(
        "`expansion_ratio` other than 4",
        "expansion_ratio",
        _expansion,
        {TENSORRT_LLM: "its MPT model always uses 4"},
    ),
    Feature(
        "`qk_ln`",
        "attn_config.qk_ln",
        lambda spec: "true" if spec.config.qk_ln else None,
        {TENSORRT_LLM: NO_PARAMETER},
    ),
    Feature(
        "`softmax_scale`",
        "attn_config.softmax_scale",
        _softmax_scale,
        {TENSORRT_LLM: NO_PARAMETER},
    ),
    Feature(
        "`logit_scale`",
        "logit_scale",
        lambda spec: _if_not(spec.config.logit_scale, 1.0),
        {TENSORRT_LLM: NO_PARAMETER},
    ),
    Feature("a sharded embedding (`shard_embedding`)"),
    Feature(
        "a head on every rank (`shard_head: false`)",
        "shard_head",
        _whole_head,
        {TENSORRT_LLM: "it always shards the head"},
    ),
    Feature(
        "a vocabulary that does not divide evenly among ranks",
        "vocab_size",
        _uneven_vocabulary,
        {TENSORRT_LLM: "its ranks hold equal parts of the head"},
    ),
    Feature("logits of every token (`gather_all_token_logits`)"),
    Feature(
        "any head size (`d_model / n_heads`)",
        unsupported={TENSORRT_LLM: f"it builds {', '.join(map(str, HEAD_SIZES))}"},
    ),
    Feature(
        "integer weights, int8 caches and SmoothQuant for compute capability 10.0 to 11.9",
        unsupported={TENSORRT_LLM: "it has no such kernels"},
    ),
    Feature(
        "builds without a GPU",
        unsupported={
            "tensorrt": "builds on the GPU that runs the engine",
            TENSORRT_LLM: "builds on the GPU that runs the engine",
        },
    ),
    Feature(
        "runs on data-centre GPUs of compute capability 9.0 (Hopper)",
        unsupported={TENSORRT_RTX: "the library refuses them"},
    ),
    Feature(
        "tests run on a CPU if there is no such GPU",
        unsupported={TENSORRT_LLM: "no other runtime reads its engines"},
    ),
    Feature(
        "quality measurements and reports",
        unsupported={TENSORRT_LLM: "only smoke tests"},
    ),
)


def table() -> str:
    """Makes the table of docs/backends.md, in Markdown."""
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
