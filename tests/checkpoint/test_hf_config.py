"""`config.json` to MptConfig: both styles, every field, and rejected values."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import MptConfig as TransformersConfig

from mpt_trt.checkpoint.hf_config import parse_hf_config, read_hf_config
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.rope import Rope
from mpt_trt.system.json_text import shown
from support.checkpoints import CheckpointSpec, config_dict

# config.json of mosaicml/mpt-7b, as on the hub.
MPT_7B = {
    "architectures": ["MPTForCausalLM"],
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "fan_mode": "fan_in"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "model_type": "mpt",
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50432,
}
MPT_7B_EXPECTED = MptConfig(
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    num_layers=32,
    intermediate_size=16384,
    vocab_size=50432,
    max_seq_len=2048,
    softmax_scale=1 / math.sqrt(4096 / 32),
)
TINY = config_dict(CheckpointSpec())


def read(folder: Path, content: dict[str, Any]) -> MptConfig:
    (folder / "config.json").write_text(json.dumps(content))
    return read_hf_config(folder)


def with_attention(**changes: Any) -> dict[str, Any]:
    return {"attn_config": TINY["attn_config"] | changes}


def with_rope(rope: object = True, **changes: Any) -> dict[str, Any]:
    return with_attention(alibi=False, rope=rope, **changes)


def with_hf_rope(**scaling: Any) -> dict[str, Any]:
    return with_rope(rope_impl="hf", rope_theta=500, rope_hf_config=scaling)


LLAMA3 = {"type": "llama3", "high_freq_factor": 4, "original_max_position_embeddings": 512}


def expected_of(spec: CheckpointSpec) -> MptConfig:
    usual_scale = 1 / math.sqrt(spec.hidden_size // spec.num_heads)
    logit_scale = {None: 1.0, "inv_sqrt_d_model": 1 / math.sqrt(spec.hidden_size)}
    return MptConfig(
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads or spec.num_heads,
        num_layers=spec.num_layers,
        intermediate_size=round(spec.hidden_size * spec.expansion_ratio),
        vocab_size=spec.vocab_size,
        max_seq_len=spec.max_seq_len,
        softmax_scale=spec.softmax_scale or usual_scale,
        position_embedding="alibi" if spec.alibi else "learned",
        alibi_bias_max=spec.alibi_bias_max,
        clip_qkv=spec.clip_qkv,
        qk_ln=spec.qk_ln,
        logit_scale=logit_scale.get(spec.logit_scale, spec.logit_scale),
        norm_type="rmsnorm" if "rms" in spec.norm_type.lower() else "layernorm",
        layer_norm_epsilon=spec.layer_norm_epsilon,
        bias=not spec.no_bias,
        tie_word_embeddings=spec.tie_word_embeddings,
        bos_token_id=0,
        eos_token_id=0,
    )


BASE = CheckpointSpec()
SPECS = {
    "plain": BASE,
    "1 head": replace(BASE, num_heads=1),
    "3 heads": replace(BASE, num_heads=3),
    "odd sizes": CheckpointSpec(
        hidden_size=55, num_heads=5, num_layers=3, vocab_size=101, max_seq_len=33
    ),
    "grouped": replace(BASE, num_heads=6, num_kv_heads=2),
    "grouped, as many as heads": replace(BASE, num_kv_heads=4),
    "multi-query": replace(BASE, num_kv_heads=1),
    "float expansion_ratio": replace(BASE, expansion_ratio=2.5),
    "expansion_ratio 2": replace(BASE, expansion_ratio=2),
    "epsilon": replace(BASE, layer_norm_epsilon=1e-6),
    "clip_qkv": replace(BASE, clip_qkv=6.0),
    "alibi_bias_max": replace(BASE, alibi_bias_max=16),
    "learned positions": replace(BASE, alibi=False),
    "inv_sqrt_d_model": replace(BASE, logit_scale="inv_sqrt_d_model"),
    "logit_scale": replace(BASE, logit_scale=0.25),
    "softmax_scale": replace(BASE, softmax_scale=0.125),
    "qk_ln": replace(BASE, qk_ln=True),
    "biases": replace(BASE, no_bias=False),
    "untied": replace(BASE, tie_word_embeddings=False),
    "rmsnorm": replace(BASE, norm_type="rmsnorm"),
    "low-precision rmsnorm": replace(BASE, norm_type="LOW_PRECISION_RMSNORM"),
    "layernorm": replace(BASE, norm_type="layernorm"),
}
NATIVE_SPECS = {
    name: spec
    for name, spec in SPECS.items()
    if spec.num_kv_heads in (None, 1) and isinstance(spec.expansion_ratio, int)
}


class TestFields:
    @pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
    def test_hub_style(self, tmp_path: Path, spec: CheckpointSpec) -> None:
        assert read(tmp_path, config_dict(spec, "hub")) == expected_of(spec)

    @pytest.mark.parametrize("spec", NATIVE_SPECS.values(), ids=NATIVE_SPECS)
    def test_native_style(self, tmp_path: Path, spec: CheckpointSpec) -> None:
        assert read(tmp_path, config_dict(spec, "native")) == expected_of(spec)

    def test_as_transformers_saves_it(self, tmp_path: Path) -> None:
        TransformersConfig(d_model=48, n_heads=3, n_layers=5, vocab_size=99).save_pretrained(
            tmp_path
        )
        assert read_hf_config(tmp_path) == MptConfig(
            hidden_size=48,
            num_heads=3,
            num_kv_heads=3,
            num_layers=5,
            intermediate_size=192,
            vocab_size=99,
            max_seq_len=2048,
            softmax_scale=0.25,
        )

    def test_mpt_7b(self, tmp_path: Path) -> None:
        assert read(tmp_path, MPT_7B) == MPT_7B_EXPECTED

    def test_mpt_7b_storywriter(self, tmp_path: Path) -> None:
        attention = MPT_7B["attn_config"] | {"alibi_bias_max": 16, "clip_qkv": 6}
        found = read(tmp_path, MPT_7B | {"max_seq_len": 65536, "attn_config": attention})
        expected = replace(MPT_7B_EXPECTED, max_seq_len=65536, alibi_bias_max=16, clip_qkv=6.0)
        assert found == expected

    def test_newer_llm_foundry_keys(self, tmp_path: Path) -> None:
        attention = MPT_7B["attn_config"] | {
            "attn_type": "grouped_query_attention",
            "attn_impl": "flash",
            "kv_n_heads": 8,
            "fused_qkv": True,
            "rope": False,
            "rope_theta": 10000,
            "rope_impl": "dail",
            "rope_dail_config": {"type": "original", "pos_idx_in_fp32": True},
            "rope_hf_config": {"type": "no_scaling", "factor": 1.0},
            "sliding_window_size": -1,
            "attn_logit_softcapping": None,
            "reuse_kv_layer_idx": None,
        }
        feed_forward = {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu", "approximate": "none"}}
        content = MPT_7B | {
            "attn_config": attention,
            "ffn_config": feed_forward,
            "norm_eps": 1e-5,
            "block_overrides": None,
            "final_logit_softcapping": None,
        }
        assert read(tmp_path, content) == replace(MPT_7B_EXPECTED, num_kv_heads=8)

    @pytest.mark.parametrize(
        ("changes", "field", "expected"),
        [
            ({"norm_eps": 1e-3}, "layer_norm_epsilon", 1e-3),
            ({"norm_eps": 1e-3, "layer_norm_epsilon": 1e-4}, "layer_norm_epsilon", 1e-3),
            ({"norm_eps": None, "layer_norm_epsilon": 1e-4}, "layer_norm_epsilon", 1e-4),
            ({"norm_eps": None, "layer_norm_epsilon": None}, "layer_norm_epsilon", 1e-5),
            ({"learned_pos_emb": True}, "position_embedding", "alibi"),
            ({"learned_pos_emb": False}, "position_embedding", "alibi"),
            (with_attention(alibi=False), "position_embedding", "learned"),
            (with_attention(clip_qkv=0), "clip_qkv", None),
            (with_attention(clip_qkv=0.5), "clip_qkv", 0.5),
            (with_attention(alibi_bias_max=16.0), "alibi_bias_max", 16),
            (with_attention(kv_n_heads=2), "num_kv_heads", 2),
            (with_attention(kv_n_heads=None), "num_kv_heads", 4),
            (with_attention(attn_type="multiquery_attention"), "num_kv_heads", 1),
            (with_attention(qk_ln=True, norm_eps=1e-2), "qk_ln_epsilon", 1e-2),
            (with_attention(sliding_window_size=0), "num_heads", 4),
            (with_attention(dtype="bfloat16", torch_dtype="bfloat16"), "num_heads", 4),
            ({"ffn_config": {"ffn_hidden_size": 100}}, "intermediate_size", 100),
            ({"ffn_config": None}, "intermediate_size", 192),
            ({"expansion_ratio": 1.5}, "intermediate_size", 72),
            ({"bos_token_id": None}, "bos_token_id", None),
            ({"eos_token_id": [7, 9]}, "eos_token_id", 7),
        ],
    )
    def test_one_field(self, tmp_path, changes: dict, field: str, expected: object) -> None:
        found = getattr(read(tmp_path, TINY | changes), field)
        assert found == expected
        assert type(found) is type(expected)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            (with_rope(), Rope(10_000.0)),
            (with_rope() | {"learned_pos_emb": False}, Rope(10_000.0)),
            (with_rope(rope_theta=500_000), Rope(500_000.0)),
            (with_rope(rope_theta=None, rope_impl=None, rope_dail_config=None), Rope(10_000.0)),
            (
                with_rope(
                    rope_impl="dail",
                    rope_dail_config={"type": "original", "pos_idx_in_fp32": True},
                    rope_hf_config={"type": "linear", "factor": 2},
                ),
                Rope(10_000.0),
            ),
            (with_hf_rope(), Rope(500.0)),
            (with_hf_rope(type="no_scaling", factor=2), Rope(500.0)),
            (with_hf_rope(type="linear", factor=2), Rope(500.0, "linear", 2.0)),
            (with_hf_rope(type="dynamic"), Rope(500.0, "dynamic", 1.0)),
            (
                with_hf_rope(**LLAMA3, low_freq_factor=1, factor=8),
                Rope(500.0, "llama3", 8.0, 1.0, 4.0, 512),
            ),
        ],
        ids=str,
    )
    def test_rope(self, tmp_path: Path, changes: dict, expected: Rope) -> None:
        config = read(tmp_path, TINY | changes)
        assert (config.position_embedding, config.rope) == ("rope", expected)

    def test_sizes_that_follow(self) -> None:
        config = replace(MPT_7B_EXPECTED, num_kv_heads=8)
        assert (config.head_dim, config.kv_size, config.qkv_size) == (128, 1024, 6144)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "field", "value"),
        [
            (with_attention(rope=True), "attn_config.alibi", True),
            (with_rope("yes"), "attn_config.rope", "yes"),
            (with_rope(rope_impl="xformers"), "attn_config.rope_impl", "xformers"),
            (with_rope(rope_theta=0), "attn_config.rope_theta", 0),
            (with_rope(rope_theta="1e4"), "attn_config.rope_theta", "1e4"),
            (with_rope(rope_theta=math.inf), "attn_config.rope_theta", math.inf),
            (with_rope(rope_dail_config=[]), "attn_config.rope_dail_config", []),
            (
                with_rope(rope_dail_config={"type": "xpos"}),
                "attn_config.rope_dail_config.type",
                "xpos",
            ),
            (
                with_rope(rope_dail_config={"pos_idx_in_fp32": False}),
                "attn_config.rope_dail_config.pos_idx_in_fp32",
                False,
            ),
            (with_hf_rope(type="yarn"), "attn_config.rope_hf_config.type", "yarn"),
            (
                with_hf_rope(rope_type="linear", factor=2),
                "attn_config.rope_hf_config.rope_type",
                "linear",
            ),
            (
                with_rope(rope_dail_config={"rope_type": "xpos"}),
                "attn_config.rope_dail_config.rope_type",
                "xpos",
            ),
            (with_hf_rope(type=["linear"]), "attn_config.rope_hf_config.type", ["linear"]),
            (
                with_hf_rope(type="linear", factor=-2),
                "attn_config.rope_hf_config.factor",
                -2,
            ),
            (
                with_hf_rope(**LLAMA3, low_freq_factor=4),
                "attn_config.rope_hf_config.low_freq_factor",
                4,
            ),
            (
                with_hf_rope(type="llama3", factor=8),
                "attn_config.rope_hf_config.low_freq_factor",
                None,
            ),
            (with_rope() | {"n_heads": 16}, "attn_config.rope", True),
            (with_attention(prefix_lm=True), "attn_config.prefix_lm", True),
            (with_attention(sliding_window_size=4096), "attn_config.sliding_window_size", 4096),
            (with_attention(attn_logit_softcapping=30), "attn_config.attn_logit_softcapping", 30),
            (with_attention(warp_drive="on"), "attn_config.warp_drive", "on"),
            (with_attention(attn_type="linear"), "attn_config.attn_type", "linear"),
            (with_attention(kv_n_heads=3), "attn_config.kv_n_heads", 3),
            (with_attention(kv_n_heads=-2), "attn_config.kv_n_heads", -2),
            (with_attention(kv_n_heads=2.0), "attn_config.kv_n_heads", 2.0),
            (with_attention(kv_n_heads=True), "attn_config.kv_n_heads", True),
            (with_attention(clip_qkv=-6), "attn_config.clip_qkv", -6),
            (with_attention(clip_qkv="6"), "attn_config.clip_qkv", "6"),
            (with_attention(softmax_scale=-0.1), "attn_config.softmax_scale", -0.1),
            (with_attention(softmax_scale=math.inf), "attn_config.softmax_scale", math.inf),
            (with_attention(alibi_bias_max=0), "attn_config.alibi_bias_max", 0),
            (with_attention(alibi_bias_max=-8), "attn_config.alibi_bias_max", -8),
            (with_attention(alibi_bias_max=8.5), "attn_config.alibi_bias_max", 8.5),
            (with_attention(qk_ln=True, norm_eps=-1), "attn_config.norm_eps", -1),
            (
                with_attention(qk_ln=True, norm_type="rmsnorm"),
                "attn_config.norm_type",
                "rmsnorm",
            ),
            (with_attention(alibi=False) | {"learned_pos_emb": False}, "learned_pos_emb", False),
            ({"attn_config": "torch"}, "attn_config", "torch"),
            ({"ffn_config": {"ffn_type": "mb_moe"}}, "ffn_config.ffn_type", "mb_moe"),
            ({"ffn_config": {"ffn_type": "mptglu"}}, "ffn_config.ffn_type", "mptglu"),
            ({"ffn_config": {"ffn_hidden_size": -1}}, "ffn_config.ffn_hidden_size", -1),
            ({"ffn_config": {"ffn_act_fn": {"name": "relu"}}}, "ffn_config.ffn_act_fn", "relu"),
            (
                {"ffn_config": {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}},
                "ffn_config.ffn_act_fn",
                "tanh",
            ),
            ({"ffn_config": {"ffn_act_fn": "gelu"}}, "ffn_config.ffn_act_fn", "gelu"),
            ({"ffn_config": "mptmlp"}, "ffn_config", "mptmlp"),
            ({"moe_num_experts": 8}, "moe_num_experts", 8),
            ({"block_overrides": {"order": []}}, "block_overrides", {"order": []}),
            ({"final_logit_softcapping": 30.0}, "final_logit_softcapping", 30.0),
            ({"model_type": "gpt_neox"}, "model_type", "gpt_neox"),
            ({"model_type": None}, "model_type", None),
            ({"n_heads": 5}, "n_heads", 5),
            ({"n_heads": 0}, "n_heads", 0),
            ({"d_model": None}, "d_model", None),
            ({"d_model": -48}, "d_model", -48),
            ({"d_model": "48"}, "d_model", "48"),
            ({"d_model": 48.0}, "d_model", 48.0),
            ({"n_layers": -1}, "n_layers", -1),
            ({"n_layers": True}, "n_layers", True),
            ({"vocab_size": 0}, "vocab_size", 0),
            ({"max_seq_len": -64}, "max_seq_len", -64),
            ({"expansion_ratio": -4}, "expansion_ratio", -4),
            ({"expansion_ratio": math.inf}, "expansion_ratio", math.inf),
            ({"expansion_ratio": math.nan}, "expansion_ratio", math.nan),
            ({"expansion_ratio": 0.001}, "expansion_ratio", 0.001),
            ({"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon", -1e-5),
            ({"norm_eps": -1e-5}, "norm_eps", -1e-5),
            ({"norm_type": "batchnorm"}, "norm_type", "batchnorm"),
            ({"logit_scale": -1}, "logit_scale", -1),
            ({"logit_scale": "sqrt"}, "logit_scale", "sqrt"),
        ],
        ids=str,
    )
    def test_file_field_and_value_are_named(
        self, tmp_path: Path, changes: dict, field: str, value: object
    ) -> None:
        with pytest.raises(MptTrtError) as error:
            read(tmp_path, TINY | changes)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'config.json'}: {field} = ")
        assert repr(value) in message
        assert "\n" not in message

    @pytest.mark.parametrize(
        "field", ["d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len", "model_type"]
    )
    def test_missing_field(self, tmp_path: Path, field: str) -> None:
        content = {key: value for key, value in TINY.items() if key != field}
        with pytest.raises(MptTrtError, match=rf"config\.json: {field} = None"):
            read(tmp_path, content)

    def test_values_that_mean_absent_are_no_reason(self, tmp_path: Path) -> None:
        absent = {"novelty": False, "other": None, "third": 0, "fourth": {}, "fifth": ""}
        content = TINY | {"attn_config": TINY["attn_config"] | absent}
        assert read(tmp_path, content) == expected_of(BASE)

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b'{"model_type": "mpt",', "not valid JSON"),
            (b"", "not valid JSON"),
            (b"[1, 2]", "expected a JSON object, found list"),
            (b"\xff\xfe{}", "cannot be read"),
        ],
    )
    def test_invalid_json(self, tmp_path: Path, content: bytes, complaint: str) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(content)
        with pytest.raises(MptTrtError) as error:
            read_hf_config(tmp_path)
        assert str(error.value).startswith(f"{path}: {complaint}")

    def test_missing_config(self, tmp_path: Path) -> None:
        with pytest.raises(MptTrtError, match=r"config\.json: no such file"):
            read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layers", 10_000_000),
        ("n_layers", 1001),
        ("d_model", 1 << 40),
        ("n_heads", 1 << 13),
        ("vocab_size", 1 << 30),
        ("max_seq_len", 1 << 40),
        ("expansion_ratio", 1e300),
    ],
)
def test_sizes_beyond_any_model_are_refused_at_once(
    field: str, value: float, tmp_path: Path
) -> None:
    content = MPT_7B | {"d_model": 1 << 14, "n_heads": 1 << 10, field: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(MptTrtError, match=f"config.json: {field} = "):
        read_hf_config(tmp_path)


# Keys besides the architecture that llm-foundry's class and transformers' class write.
FOUNDRY_SIGNS: dict[str, dict[str, Any]] = {
    "class": {"architectures": ["MPTForCausalLM"]},
    "code on the hub": {"auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}},
    "verbose": {"verbose": 0},
    "init_config": {"init_config": {"name": "kaiming_normal_"}},
    "ffn_config": {"ffn_config": {"ffn_type": "mptmlp"}},
    "fc_type": {"fc_type": {"name": "torch"}},
    "norm_eps": {"norm_eps": 1e-5},
}
TRANSFORMERS_SIGNS: dict[str, dict[str, Any]] = {
    "class": {"architectures": ["MptForCausalLM"]},
    "bare class": {"architectures": ["MptModel"]},
    "layer_norm_epsilon": {"layer_norm_epsilon": 1e-5},
    "initializer_range": {"initializer_range": 0.02},
    "no sign at all": {},
    "saved again": {"auto_map": {"AutoConfig": "x.MPTConfig"}, "initializer_range": 0.02},
    "saved again by the class": {"verbose": 0, "architectures": ["MptForCausalLM"]},
}
ATTENTIONS: dict[str, Any] = {
    "absent": None,
    "empty": {},
    "implementation only": {"attn_impl": "torch"},
}
SIZES = {
    "model_type": "mpt",
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 2,
    "vocab_size": 97,
    "max_seq_len": 64,
}


class TestFamilies:
    @pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
    @pytest.mark.parametrize("sign", FOUNDRY_SIGNS.values(), ids=FOUNDRY_SIGNS)
    def test_llm_foundry(self, tmp_path: Path, sign: dict, attention: dict | None) -> None:
        config = read(tmp_path, SIZES | sign | {"attn_config": attention})
        assert (config.position_embedding, config.bias) == ("learned", True)

    @pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
    @pytest.mark.parametrize("sign", TRANSFORMERS_SIGNS.values(), ids=TRANSFORMERS_SIGNS)
    def test_transformers(self, tmp_path: Path, sign: dict, attention: dict | None) -> None:
        config = read(tmp_path, SIZES | sign | {"attn_config": attention})
        assert (config.position_embedding, config.bias) == ("alibi", False)

    @pytest.mark.parametrize("sign", FOUNDRY_SIGNS.values(), ids=FOUNDRY_SIGNS)
    def test_difference_that_transformers_saved(self, tmp_path: Path, sign: dict) -> None:
        """Releases of 2023 save attn_config as what differs from its defaults."""
        config = read(tmp_path, SIZES | sign | {"attn_config": {"model_type": ""}})
        assert (config.position_embedding, config.bias) == ("alibi", False)

    def test_attention_keys_of_llm_foundry(self, tmp_path: Path) -> None:
        attention = {"attn_type": "grouped_query_attention", "kv_n_heads": 2}
        config = read(tmp_path, SIZES | {"attn_config": attention})
        assert (config.position_embedding, config.num_kv_heads) == ("learned", 2)

    @pytest.mark.parametrize("attention", [{"model_type": ""}, {}, None, {"attn_impl": "torch"}])
    def test_as_transformers_reads_what_it_saved(self, tmp_path: Path, attention) -> None:
        TransformersConfig(d_model=48, n_heads=3, n_layers=5, vocab_size=99).save_pretrained(
            tmp_path
        )
        content = json.loads((tmp_path / "config.json").read_text())
        theirs = TransformersConfig.from_dict(content | {"attn_config": attention or {}})
        config = read(tmp_path, content | {"attn_config": attention})
        assert (config.position_embedding == "alibi") == theirs.attn_config.alibi
        assert config.bias != theirs.no_bias

    def test_values_count_more_than_defaults(self, tmp_path: Path) -> None:
        content = SIZES | {"no_bias": False, "attn_config": {"model_type": "", "alibi": False}}
        config = read(tmp_path, content)
        assert (config.position_embedding, config.bias) == ("learned", True)

    def test_generic_keys_in_attention(self, tmp_path: Path) -> None:
        """Early releases repeat every attribute of PretrainedConfig there."""
        generic = {"max_length": 20, "top_k": 50, "temperature": 1.0, "tie_word_embeddings": True}
        assert read(tmp_path, TINY | with_attention(**generic)) == expected_of(BASE)

    def test_names_of_the_attribute_map(self, tmp_path: Path) -> None:
        names = {"d_model": "hidden_size", "n_heads": "num_attention_heads"}
        content = {names.get(key, key): value for key, value in TINY.items()}
        assert read(tmp_path, content) == expected_of(BASE)
        assert read(tmp_path, TINY | {"hidden_size": 48}) == expected_of(BASE)
        with pytest.raises(MptTrtError, match="hidden_size = 64: d_model is 48"):
            read(tmp_path, TINY | {"hidden_size": 64})

    def test_unknown_keys_are_shown_printable(self, tmp_path: Path, caplog) -> None:
        read(tmp_path, TINY | {"\x1b[31m\ud800": 1, "x" * 1000: 2})
        message = caplog.records[0].getMessage()
        assert message.isprintable()
        assert message.endswith(r"ignored: '\x1b[31m\ud800', '" + "x" * 76 + "...")

    def test_unknown_keys_are_reported_once(self, tmp_path: Path, caplog) -> None:
        for _ in range(2):
            assert read(tmp_path, TINY | {"unsloth_version": "1"}) == expected_of(BASE)
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path / 'config.json'}: keys that MPT does not have are ignored: unsloth_version"
        ]

    def test_known_keys_are_not_reported(self, tmp_path: Path, caplog) -> None:
        for content in (MPT_7B, TINY, config_dict(BASE, "native")):
            read(tmp_path, content)
        assert caplog.records == []


# config.json of mosaicml/mpt-1b-redpajama-200b and replit/replit-code-v1-3b, as on the hub.
MPT_1B = {
    "alibi": True,
    "alibi_bias_max": 8,
    "architectures": ["MosaicGPT"],
    "attn_clip_qkv": None,
    "attn_impl": "torch",
    "attn_pdrop": 0,
    "attn_qk_ln": True,
    "attn_uses_sequence_id": False,
    "d_model": 2048,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "init_device": "cpu",
    "logit_scale": None,
    "low_precision_layernorm": True,
    "max_seq_len": 2048,
    "mlp_ratio": 4,
    "model_type": "mosaic_gpt",
    "n_heads": 16,
    "n_layers": 24,
    "no_bias": True,
    "param_init_fn": "kaiming_normal_",
    "prefix_lm": False,
    "resid_pdrop": 0,
    "softmax_scale": None,
    "torch_dtype": "float32",
    "use_cache": False,
    "verbose": 0,
    "vocab_size": 50368,
}


class TestRelatives:
    @pytest.mark.parametrize("model_type", ["mosaic_gpt", "replit_lm"])
    def test_fields(self, tmp_path: Path, model_type: str) -> None:
        assert read(tmp_path, MPT_1B | {"model_type": model_type}) == MptConfig(
            hidden_size=2048,
            num_heads=16,
            num_kv_heads=16,
            num_layers=24,
            intermediate_size=8192,
            vocab_size=50368,
            max_seq_len=2048,
            softmax_scale=1 / math.sqrt(2048 / 16),
            qk_ln=True,
        )

    @pytest.mark.parametrize(
        ("changes", "field", "expected"),
        [
            ({"alibi": False}, "position_embedding", "learned"),
            ({"attn_clip_qkv": 6}, "clip_qkv", 6.0),
            ({"attn_softmax_scale": 0.5}, "softmax_scale", 0.5),
            ({"softmax_scale": 0.5, "attn_softmax_scale": None}, "softmax_scale", 0.5),
            ({"mlp_ratio": 2}, "intermediate_size", 4096),
            ({"low_precision_layernorm": False}, "norm_type", "layernorm"),
            ({"alibi_bias_max": 16}, "alibi_bias_max", 16),
            ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale", 1 / math.sqrt(2048)),
        ],
    )
    def test_one_field(self, tmp_path, changes: dict, field: str, expected: object) -> None:
        assert getattr(read(tmp_path, MPT_1B | changes), field) == expected

    @pytest.mark.parametrize("key", ["alibi", "no_bias"])
    def test_defaults_of_flags(self, tmp_path: Path, key: str) -> None:
        content = {name: value for name, value in MPT_1B.items() if name != key}
        config = read(tmp_path, content)
        assert (config.position_embedding, config.bias) == (
            ("learned", False) if key == "alibi" else ("alibi", True)
        )

    @pytest.mark.parametrize(
        ("changes", "field", "value"),
        [
            ({"attn_qk_ln": "yes"}, "attn_qk_ln", "yes"),
            ({"attn_clip_qkv": "6"}, "attn_clip_qkv", "6"),
            ({"mlp_ratio": "4"}, "mlp_ratio", "4"),
            ({"prefix_lm": True}, "prefix_lm", True),
            ({"alibi": 1}, "alibi", 1),
            ({"n_heads": 24, "d_model": 48}, "n_heads", 24),
            ({"low_precision_layernorm": "no"}, "low_precision_layernorm", "no"),
        ],
    )
    def test_refusals_name_the_fields_of_the_file(
        self, tmp_path: Path, changes: dict, field: str, value: object
    ) -> None:
        with pytest.raises(MptTrtError, match=rf"config\.json: {field} = {value!r}: "):
            read(tmp_path, MPT_1B | changes)


class TestValues:
    @pytest.mark.parametrize(
        ("changes", "field", "value"),
        [
            (with_attention(alibi="true"), "attn_config.alibi", "true"),
            (with_attention(alibi=None), "attn_config.alibi", None),
            (with_attention(qk_ln="false"), "attn_config.qk_ln", "false"),
            (with_attention(clip_qkv=""), "attn_config.clip_qkv", ""),
            (with_attention(clip_qkv=math.nan), "attn_config.clip_qkv", math.nan),
            (with_attention(softmax_scale=0), "attn_config.softmax_scale", 0),
            (with_attention(softmax_scale="0.1"), "attn_config.softmax_scale", "0.1"),
            (with_attention(softmax_scale=math.nan), "attn_config.softmax_scale", math.nan),
            (with_attention(softmax_scale=10**400), "attn_config.softmax_scale", 10**400),
            (with_attention(alibi_bias_max="8"), "attn_config.alibi_bias_max", "8"),
            (with_attention(kv_n_heads=0), "attn_config.kv_n_heads", 0),
            (with_attention(kv_n_heads="2"), "attn_config.kv_n_heads", "2"),
            (
                with_attention(attn_type="grouped_query_attention"),
                "attn_config.kv_n_heads",
                None,
            ),
            (with_attention(fused_qkv=False), "attn_config.fused_qkv", False),
            (with_attention(qk_gn=True), "attn_config.qk_gn", True),
            (with_attention(kv_dim=0), "attn_config.kv_dim", 0),
            (with_attention(reuse_kv_layer_idx=-1), "attn_config.reuse_kv_layer_idx", -1),
            (with_attention(flex_attn_mod_list=["a"]), "attn_config.flex_attn_mod_list", ["a"]),
            (with_attention(attn_logit_softcapping=0), "attn_config.attn_logit_softcapping", 0),
            ({"no_bias": "true"}, "no_bias", "true"),
            ({"learned_pos_emb": "no"}, "learned_pos_emb", "no"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings", "false"),
            ({"logit_scale": 0}, "logit_scale", 0),
            ({"logit_scale": True}, "logit_scale", True),
            ({"logit_scale": math.nan}, "logit_scale", math.nan),
            ({"expansion_ratio": "4"}, "expansion_ratio", "4"),
            ({"expansion_ratio": None}, "expansion_ratio", None),
            ({"norm_eps": "1e-5"}, "norm_eps", "1e-5"),
            ({"norm_eps": math.nan}, "norm_eps", math.nan),
            ({"norm_type": None}, "norm_type", None),
            ({"norm_type": 5}, "norm_type", 5),
            ({"n_heads": "4"}, "n_heads", "4"),
            ({"max_seq_len": "64"}, "max_seq_len", "64"),
            ({"vocab_size": math.nan}, "vocab_size", math.nan),
            ({"final_logit_softcapping": 0}, "final_logit_softcapping", 0),
            ({"residual_modification": "layer"}, "residual_modification", "layer"),
            ({"model_type": ["mpt"]}, "model_type", ["mpt"]),
            ({"fc_type": {"name": "fp8"}}, "fc_type", {"name": "fp8"}),
            ({"ffn_config": {"ffn_hidden_size": 10.5}}, "ffn_config.ffn_hidden_size", 10.5),
            ({"ffn_config": {"ffn_hidden_size": "10"}}, "ffn_config.ffn_hidden_size", "10"),
            ({"ffn_config": {"moe_top_k": 2}}, "ffn_config.moe_top_k", 2),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_no_value_is_guessed(
        self, tmp_path: Path, changes: dict, field: str, value: object
    ) -> None:
        with pytest.raises(MptTrtError) as error:
            parse_hf_config(TINY | changes, tmp_path / "config.json")
        message = str(error.value)
        assert message.startswith(f"{tmp_path / 'config.json'}: {field} = {shown(value)}: ")

    @pytest.mark.parametrize(
        "changes",
        [
            {"fc_type": "torch"},
            {"fc_type": {"name": "te"}},
            {"ffn_config": {"ffn_type": "mptmlp", "fc_type": {"name": "torch"}}},
            {"embedding_fraction": 0.1, "emb_pdrop": 0.1, "resid_pdrop": 0.1},
            {"use_pad_tok_in_ffn": False, "init_device": "meta", "residual_coeff": 0.5},
            with_attention(attn_impl="flash", attn_uses_sequence_id=True, attn_pdrop=0.1),
            with_attention(rope=False, rope_theta=500000, seq_parallel_world_size=1),
            with_attention(rope=None, rope_impl="hf", rope_hf_config={"type": "yarn"}),
        ],
        ids=str,
    )
    def test_what_has_no_effect(self, tmp_path: Path, changes: dict, caplog) -> None:
        assert read(tmp_path, TINY | changes) == expected_of(BASE)
        assert caplog.records == []
