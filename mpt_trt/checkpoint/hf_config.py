"""Reads the architecture of an MPT model from a Hugging Face `config.json`.

A model that the network cannot express is refused here, before any work.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MOST, MptConfig, NormType
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

NORM_TYPES: dict[str, NormType] = {
    "layernorm": "layernorm",
    "low_precision_layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "low_precision_rmsnorm": "rmsnorm",
}
ATTENTION_TYPES = ("multihead_attention", "grouped_query_attention", "multiquery_attention")


def read_hf_config(folder: Path) -> MptConfig:
    """Reads `folder/config.json`, in hub (llm-foundry) or native transformers style.

    Raises MptTrtError, naming file, field and value, when a field is missing, malformed or asks for
    something that the network does not have.
    """
    path = folder / "config.json"
    return parse_hf_config(read_json(path), path)


def parse_hf_config(content: dict[str, Any], path: Path) -> MptConfig:
    """Reads a config.json's content; `path` is its name in error messages."""
    return _Reader(path, content).config()


def _token_id(value: object) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None


class _Reader:
    """Reads one `config.json`; keeps its path for error messages."""

    # Keys that are read below, or that do not affect inference.
    KNOWN_ATTENTION_KEYS = frozenset(
        {
            "_name_or_path",
            "alibi",
            "alibi_bias_max",
            "architectures",
            "attn_impl",
            "attn_pdrop",
            "attn_type",
            "attn_uses_sequence_id",
            "chunk_size_feed_forward",
            "clip_qkv",
            "dtype",
            "id2label",
            "is_decoder",
            "is_encoder_decoder",
            "kv_n_heads",
            "label2id",
            "model_type",
            "norm_eps",
            "norm_type",
            "output_attentions",
            "output_hidden_states",
            "problem_type",
            "pruned_heads",
            "qk_ln",
            "return_dict",
            "rope_dail_config",
            "rope_hf_config",
            "rope_impl",
            "rope_theta",
            "softmax_scale",
            "tf_legacy_loss",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "use_bfloat16",
        }
    )
    # Values of other attention keys that mean "not used".
    ABSENT: tuple[object, ...] = (None, False, 0, -1, "", [], {})
    UNSUPPORTED_TOP_LEVEL = {
        "moe_num_experts": "mixture of experts",
        "block_overrides": "per-block overrides",
        "final_logit_softcapping": "soft-capped logits",
    }

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.top = content
        self.attention = self._object("attn_config", content.get("attn_config"))
        self.feed_forward = self._object("ffn_config", content.get("ffn_config"))

    def config(self) -> MptConfig:
        self._refuse_unsupported()
        hidden_size = self._positive("d_model", MOST["hidden_size"])
        num_heads = self._positive("n_heads", MOST["num_heads"])
        if hidden_size % num_heads:
            raise self.refused("n_heads", num_heads, f"it must divide d_model ({hidden_size})")
        return MptConfig(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads(num_heads),
            num_layers=self._positive("n_layers", MOST["num_layers"]),
            intermediate_size=self._intermediate_size(hidden_size),
            vocab_size=self._positive("vocab_size", MOST["vocab_size"]),
            max_seq_len=self._positive("max_seq_len", MOST["max_seq_len"]),
            softmax_scale=self._softmax_scale(hidden_size // num_heads),
            position_embedding="alibi" if self._uses_alibi() else "learned",
            alibi_bias_max=self._alibi_bias_max(),
            clip_qkv=self._clip_qkv(),
            qk_ln=bool(self.attention.get("qk_ln")),
            logit_scale=self._logit_scale(hidden_size),
            norm_type=self._norm_type(),
            layer_norm_epsilon=self._epsilon(),
            qk_ln_epsilon=self._qk_ln_epsilon(),
            bias=not self.top.get("no_bias", False),
            tie_word_embeddings=bool(self.top.get("tie_word_embeddings", True)),
            bos_token_id=_token_id(self.top.get("bos_token_id")),
            eos_token_id=_token_id(self.top.get("eos_token_id")),
        )

    def refused(self, field: str, value: object, why: str) -> MptTrtError:
        return MptTrtError(f"{self.path}: {field} = {shown(value)}: {why}")

    def _refuse_unsupported(self) -> None:
        if self.top.get("model_type") != "mpt":
            raise self.refused(
                "model_type", self.top.get("model_type"), "only MPT checkpoints ('mpt') are read"
            )
        for key, value in self.attention.items():
            if key not in self.KNOWN_ATTENTION_KEYS and value not in self.ABSENT:
                if (key, value) == ("fused_qkv", True):
                    continue
                raise self.refused(f"attn_config.{key}", value, "this feature is not supported")
        for key, feature in self.UNSUPPORTED_TOP_LEVEL.items():
            if self.top.get(key) not in self.ABSENT:
                raise self.refused(key, self.top[key], f"{feature} is not supported")
        self._refuse_other_feed_forwards()

    def _refuse_other_feed_forwards(self) -> None:
        kind = self.feed_forward.get("ffn_type", "mptmlp")
        if kind != "mptmlp":
            raise self.refused("ffn_config.ffn_type", kind, "only 'mptmlp' is supported")
        field = "ffn_config.ffn_act_fn"
        activation = self._object(field, self.feed_forward.get("ffn_act_fn")) or {"name": "gelu"}
        if (activation.get("name"), activation.get("approximate", "none")) != ("gelu", "none"):
            raise self.refused(field, activation, "only exact GELU is supported")

    def _object(self, field: str, value: object) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise self.refused(field, value, "an object is expected")
        return value or {}

    def _positive(self, field: str, most: int) -> int:
        value = self.top.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(field, value, "a positive integer is required")
        return self._at_most(field, value, most)

    def _at_most(self, field: str, value: int, most: int) -> int:
        if value > most:
            raise self.refused(field, value, f"at most {most} is supported")
        return value

    def _number(self, field: str, value: object) -> float:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            return float(value)
        raise self.refused(field, value, "a positive number is required")

    def _num_kv_heads(self, num_heads: int) -> int:
        kind = self.attention.get("attn_type", "multihead_attention")
        if kind not in ATTENTION_TYPES:
            known = ", ".join(ATTENTION_TYPES)
            raise self.refused("attn_config.attn_type", kind, f"known types are {known}")
        default = 1 if kind == "multiquery_attention" else num_heads
        value = self.attention.get("kv_n_heads") or default
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < 1 or num_heads % value:
            why = f"it must divide n_heads ({num_heads})"
            raise self.refused("attn_config.kv_n_heads", value, why)
        return int(value)

    def _intermediate_size(self, hidden_size: int) -> int:
        explicit = self.feed_forward.get("ffn_hidden_size")
        if explicit is not None:
            size = int(self._number("ffn_config.ffn_hidden_size", explicit))
            return self._at_most("ffn_config.ffn_hidden_size", size, MOST["intermediate_size"])
        ratio = self._number("expansion_ratio", self.top.get("expansion_ratio", 4))
        size = int(hidden_size * ratio)
        if size < 1:
            raise self.refused("expansion_ratio", ratio, "the feed-forward layer would be empty")
        if size > MOST["intermediate_size"]:
            raise self.refused(
                "expansion_ratio", ratio, f"the feed-forward layer would have {size}"
            )
        return size

    def _uses_alibi(self) -> bool:
        # The hub's configs say learned_pos_emb: true beside alibi: true; alibi wins there.
        if self.attention.get("alibi", False):
            return True
        if not self.top.get("learned_pos_emb", True):
            raise self.refused(
                "learned_pos_emb", False, "without alibi there would be no positions at all"
            )
        return False

    def _alibi_bias_max(self) -> int:
        value = self._number("attn_config.alibi_bias_max", self.attention.get("alibi_bias_max", 8))
        if value != int(value):
            raise self.refused("attn_config.alibi_bias_max", value, "an integer is required")
        return self._at_most("attn_config.alibi_bias_max", int(value), MOST["alibi_bias_max"])

    def _softmax_scale(self, head_dim: int) -> float:
        value = self.attention.get("softmax_scale")
        if value is None:
            return 1.0 / math.sqrt(head_dim)
        return self._number("attn_config.softmax_scale", value)

    def _clip_qkv(self) -> float | None:
        value = self.attention.get("clip_qkv")
        return None if not value else self._number("attn_config.clip_qkv", value)

    def _logit_scale(self, hidden_size: int) -> float:
        value = self.top.get("logit_scale")
        if value is None:
            return 1.0
        if value == "inv_sqrt_d_model":
            return 1.0 / math.sqrt(hidden_size)
        return self._number("logit_scale", value)

    def _norm_type(self) -> NormType:
        name = str(self.top.get("norm_type", "low_precision_layernorm")).lower()
        if name not in NORM_TYPES:
            raise self.refused("norm_type", name, f"known types are {', '.join(NORM_TYPES)}")
        return NORM_TYPES[name]

    def _epsilon(self) -> float:
        # llm-foundry's key, then transformers'.
        for field in ("norm_eps", "layer_norm_epsilon"):
            if self.top.get(field) is not None:
                return self._number(field, self.top[field])
        return 1e-5

    def _qk_ln_epsilon(self) -> float:
        name = self.attention.get("norm_type") or "low_precision_layernorm"
        if self.attention.get("qk_ln") and NORM_TYPES.get(str(name).lower()) != "layernorm":
            raise self.refused("attn_config.norm_type", name, "with qk_ln only layer norm is known")
        value = self.attention.get("norm_eps")
        return 1e-5 if value is None else self._number("attn_config.norm_eps", value)
