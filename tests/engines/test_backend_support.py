"""Features of backends: the documentation's table and the checks agree."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from mpt_trt.checkpoint.known_models import SHIPPED, hub_config, known_config
from mpt_trt.engines import backend_support
from mpt_trt.engines.backend_support import (
    BACKENDS,
    FEATURES,
    TENSORRT_LLM,
    require_supported,
)
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.rope import Rope
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import (
    Awq,
    Fp8,
    Gptq,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    WeightQuantization,
)
from mpt_trt.workflow.settings import parse_settings, variant_choices
from support.workflow import REPOSITORY
from tools import markdown

USUAL = EngineSpec(
    known_config("mpt-7b"), "float16", 2, BuildLimits(8, 512, 256), VocabularySharding()
)


def with_config(**changes: object) -> EngineSpec:
    return replace(USUAL, config=replace(USUAL.config, **changes))


def with_scheme(scheme: object, **changes: object) -> EngineSpec:
    return replace(with_config(**changes), quantization=Quantization(scheme))


# 130 heads of 32 features, 65 on each of two ranks: 4160 is a multiple of 64, but not of 2 x 64.
NARROW = {
    "hidden_size": 4160,
    "num_heads": 130,
    "num_kv_heads": 130,
    "softmax_scale": 32**-0.5,
    "intermediate_size": 4 * 4160,
}
# Of each feature that some backend lacks, a spec that has it and no other such feature.
SPECS = {
    "`mixed`": with_scheme(Mixed(5.0)),
    "`head: int8`": replace(USUAL, quantization=Quantization(head="int8")),
    "`int4_weight_only` in groups": with_scheme(WeightOnly(4, 64)),
    "`int4_awq`, `int4_gptq` in groups of 32 or 16": with_scheme(Awq(32)),
    "`int8_weight_only`, `int4_weight_only`, `int4_awq`, `int4_gptq` in float32": replace(
        with_scheme(WeightOnly(8)), dtype="float32"
    ),
    "integer weights with matrices of any size": replace(
        USUAL,
        config=replace(USUAL.config, **NARROW),
        tp_size=2,
        quantization=Quantization(Awq(64)),
    ),
    "`smoothquant` with other settings, in bfloat16 or float32": replace(
        with_scheme(SmoothQuant()), dtype="bfloat16"
    ),
    "`smoothquant` with other settings, and `clip_qkv`": with_scheme(SmoothQuant(), clip_qkv=6.0),
    "`smoothquant` with other settings, and `alibi_bias_max` other than 8": with_scheme(
        SmoothQuant(), alibi_bias_max=16
    ),
    "biases (`no_bias: false`)": with_config(bias=True),
    "learned positions": with_config(position_embedding="learned"),
    "rotary positions (`rope: true`)": with_config(position_embedding="rope", rope=Rope()),
    "RMS norms": with_config(norm_type="rmsnorm"),
    "a norm epsilon other than 1e-5": with_config(layer_norm_epsilon=1e-6),
    "`expansion_ratio` other than 4": with_config(intermediate_size=2 * 4096),
    "`qk_ln`": with_config(qk_ln=True),
    "`softmax_scale`": with_config(softmax_scale=0.1),
    "`logit_scale`": with_config(logit_scale=0.5),
    "a head on every rank (`shard_head: false`)": replace(
        USUAL, vocabulary=VocabularySharding(head=False)
    ),
    "a vocabulary that does not divide evenly among ranks": with_config(vocab_size=50_431),
}


def test_every_refusal_has_a_spec() -> None:
    assert {
        f.name for f in FEATURES if f.requested_value is not None and f.unsupported
    } == SPECS.keys()


@pytest.mark.parametrize("name", SPECS)
def test_backends_refuse_what_the_table_says_they_lack(name: str) -> None:
    (feature,) = (feature for feature in FEATURES if feature.name == name)
    spec = SPECS[name]
    for backend in BACKENDS:
        if backend not in feature.unsupported:
            require_supported(spec, backend)
            continue
        able = " or ".join(b for b in BACKENDS if b not in feature.unsupported)
        pattern = f"^{re.escape(feature.field)} = .*backend {backend} .*use backend {able}$"
        with pytest.raises(MptTrtError, match=pattern):
            require_supported(spec, backend)


@pytest.mark.parametrize(
    "spec",
    [
        USUAL,
        with_config(clip_qkv=6.0, alibi_bias_max=16, num_kv_heads=1, tie_word_embeddings=False),
        with_scheme(SmoothQuant(0.5, True, False), clip_qkv=6.0, alibi_bias_max=16),
        with_scheme(SmoothQuant()),
        with_scheme(Awq()),
        with_scheme(WeightOnly(4)),
        with_scheme(Fp8()),
        replace(USUAL, quantization=Quantization(None, "int8"), dtype="float32"),
        replace(USUAL, tp_size=1, vocabulary=VocabularySharding(head=False)),
    ],
)
def test_what_every_backend_has(spec: EngineSpec) -> None:
    for backend in BACKENDS:
        require_supported(spec, backend)


def lacking_fields(name: str, scheme: WeightQuantization | None, tp_size: int) -> set[str]:
    """The fields that TensorRT-LLM refuses of a shipped model, from the model's own config.json.

    Its MPT model has no norms of queries and keys. Its SmoothQuant plugin neither clips nor knows
    another ALiBi than that of 8. Its integer layers pad both sizes of a matrix to multiples of 64,
    or of the group size, times the number of ranks.
    """
    raw = hub_config(name)
    attention, hidden = raw["attn_config"], raw["d_model"]
    fields = set()
    if attention.get("qk_ln"):
        fields.add("attn_config.qk_ln")
    is_plugin = isinstance(scheme, SmoothQuant) and scheme != SmoothQuant(0.5, True, False)
    if is_plugin and "clip_qkv" in attention:
        fields |= {"clip_qkv", "alibi_bias_max"}  # MPT-7B-StoryWriter has both
    if isinstance(scheme, WeightOnly | Awq | Gptq):
        head_dim = hidden // raw["n_heads"]
        # Each rank has at least one K/V head of its own.
        kv_heads = max(attention.get("kv_n_heads", raw["n_heads"]), tp_size)
        sizes = (hidden, 4 * hidden, hidden + 2 * kv_heads * head_dim)
        # 128, as AMMO's, or 64 where 128 would lie on two of 8 ranks.
        group_size = 128 if hidden % (8 * 128) == 0 else 64
        if isinstance(scheme, WeightOnly):
            group_size = 0
        if any(size % (max(64, group_size) * tp_size) for size in sizes):
            fields.add("shape")
    return fields


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHIPPED)
def test_models_and_variants_that_ship(name: str, tp_size: int) -> None:
    config: MptConfig = known_config(name)
    content = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    for variant in parse_settings(content).variants.values():
        spec = variant.spec(config, tp_size)
        if not (fields := lacking_fields(name, spec.scheme, tp_size)):
            require_supported(spec, TENSORRT_LLM)
            continue
        pattern = rf"^({'|'.join(map(re.escape, fields))}) = .*backend {TENSORRT_LLM} "
        with pytest.raises(MptTrtError, match=pattern):
            require_supported(spec, TENSORRT_LLM)


def test_shipped_models_that_lack_tensorrt_llm_are_the_known_ones() -> None:
    lacking = {
        (name, tp_size)
        for name in SHIPPED
        for tp_size in (1, 2, 4, 8)
        if lacking_fields(name, Awq(), tp_size)
    }
    assert lacking == {("mpt-1b-redpajama-200b", tp_size) for tp_size in (1, 2, 4, 8)}


def test_backends_are_those_of_the_configuration() -> None:
    assert {"auto", *BACKENDS} == set(variant_choices("backend"))


def test_committed_table_is_what_is_known() -> None:
    assert markdown.between_marks(REPOSITORY / "docs/backends.md") == backend_support.table(), (
        "run make docs"
    )
