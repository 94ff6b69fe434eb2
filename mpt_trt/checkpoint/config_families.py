"""Finds the program that wrote a `config.json`, which decides the meaning of missing keys.

Sources: llm-foundry's `models/mpt/configuration_mpt.py`, `models/utils/config_defaults.py` and
`scripts/misc/convert_examples_ckpt.py`; `configuration_mosaic_gpt.py` of MosaicML's examples 0.0.4;
transformers' `models/mpt/configuration_mpt.py`. `docs/models.md` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A program that writes MPT configurations, and its defaults.

    alibi, no_bias: defaults of these keys; all other defaults are shared. nested: attention keys
    are in `attn_config`, as in all later families.
    """

    name: str
    alibi: bool = False
    no_bias: bool = False
    nested: bool = True


LLM_FOUNDRY = Family("llm-foundry")
TRANSFORMERS = Family("transformers", alibi=True, no_bias=True)
MOSAIC_GPT = Family("mosaic_gpt", nested=False)
REPLIT_LM = Family("replit_lm", nested=False)
BY_MODEL_TYPE = {"mosaic_gpt": MOSAIC_GPT, "replit_lm": REPLIT_LM}

# transformers writes these keys into every file; llm-foundry does not have them.
TRANSFORMERS_KEYS = frozenset({"layer_norm_epsilon", "initializer_range"})
# llm-foundry writes these keys; transformers only keeps them when it saves a file again.
FOUNDRY_KEYS = frozenset(
    {
        "auto_map",
        "block_overrides",
        "fc_type",
        "ffn_config",
        "final_logit_softcapping",
        "init_config",
        "norm_eps",
        "tokenizer_name",
        "use_pad_tok_in_ffn",
        "verbose",
    }
)
FOUNDRY_ATTENTION_KEYS = frozenset(
    {
        "attn_logit_softcapping",
        "flex_attn_mod_list",
        "fused_qkv",
        "kv_dim",
        "kv_n_heads",
        "qk_gn",
        "rope",
        "rope_dail_config",
        "rope_hf_config",
        "rope_impl",
        "rope_theta",
        "sliding_window_size",
    }
)
# llm-foundry's keys by their names in mosaic_gpt and replit_lm.
FLAT_SPELLINGS = {
    "mlp_ratio": "expansion_ratio",
    "alibi": "attn_config.alibi",
    "alibi_bias_max": "attn_config.alibi_bias_max",
    "attn_clip_qkv": "attn_config.clip_qkv",
    "attn_impl": "attn_config.attn_impl",
    "attn_pdrop": "attn_config.attn_pdrop",
    "attn_qk_ln": "attn_config.qk_ln",
    "attn_softmax_scale": "attn_config.softmax_scale",
    "attn_uses_sequence_id": "attn_config.attn_uses_sequence_id",
    "prefix_lm": "attn_config.prefix_lm",
    "softmax_scale": "attn_config.softmax_scale",
}


def family_of(content: dict[str, Any]) -> Family:
    """Finds the family that wrote a config.json.

    For a file that was saved again, the last program counts. A file without any sign is read like
    transformers' own class, which reads every file without `auto_map`.
    """
    if family := BY_MODEL_TYPE.get(str(content.get("model_type"))):
        return family
    attention = content.get("attn_config")
    attention_keys = attention.keys() if isinstance(attention, dict) else set()
    if "model_type" in attention_keys or TRANSFORMERS_KEYS & content.keys():
        return TRANSFORMERS
    classes = content.get("architectures")
    names = [str(name) for name in classes] if isinstance(classes, list) else []
    if any(name.startswith("Mpt") for name in names):
        return TRANSFORMERS
    is_foundry = any(name.startswith("MPT") for name in names)
    if is_foundry or FOUNDRY_KEYS & content.keys() or FOUNDRY_ATTENTION_KEYS & attention_keys:
        return LLM_FOUNDRY
    return TRANSFORMERS


def nest_attention(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Converts a config.json of mosaic_gpt or replit_lm to llm-foundry's form.

    Also returns the file's own names of the renamed keys.
    """
    nested: dict[str, Any] = {"attn_config": {}}
    spellings = {}
    for key, value in content.items():
        name = FLAT_SPELLINGS.get(key, key)
        owner, _, short = name.rpartition(".")
        target = nested[owner] if owner else nested
        if target.get(short) is None:  # there are two spellings of softmax_scale
            target[short], spellings[name] = value, key
    low_precision = nested.pop("low_precision_layernorm", True)
    spellings["norm_type"] = "low_precision_layernorm"
    norm_types = {True: "low_precision_layernorm", False: "layernorm"}
    is_flag = isinstance(low_precision, bool)
    nested["norm_type"] = norm_types[low_precision] if is_flag else low_precision
    # Their code always has learned positions without ALiBi, and always ties the head.
    return nested | {"learned_pos_emb": True, "tie_word_embeddings": True}, spellings
