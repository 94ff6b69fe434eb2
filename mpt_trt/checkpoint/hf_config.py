"""Reads the architecture of an MPT model from a Hugging Face `config.json`.

Models that the network does not support are rejected here, before any work.
"""

from __future__ import annotations

import functools
import logging
import math
import sys
from pathlib import Path
from typing import Any

from mpt_trt.checkpoint.config_families import BY_MODEL_TYPE, family_of, nest_attention
from mpt_trt.checkpoint.config_keys import (
    ABSENT,
    ALIASES,
    ATTENTION_KEYS,
    LIMITED,
    TOP_LEVEL_KEYS,
    USED_IN_FEED_FORWARD,
)
from mpt_trt.checkpoint.foreign import require_plain_checkpoint
from mpt_trt.checkpoint.other_folders import describe_folder, hint
from mpt_trt.checkpoint.rope_config import read_rope
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MOST, MptConfig, NormType, PositionEmbedding
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown

NORM_TYPES: dict[str, NormType] = {
    "layernorm": "layernorm",
    "low_precision_layernorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "low_precision_rmsnorm": "rmsnorm",
}
log = logging.getLogger(__name__)

ATTENTION_TYPES = ("multihead_attention", "grouped_query_attention", "multiquery_attention")


def read_hf_config(folder: Path) -> MptConfig:
    """Reads `folder/config.json`, in hub (llm-foundry) or native transformers style.

    Raises MptTrtError, naming file, field and value, when a field is missing, malformed or
    unsupported, or when the folder is not a plain checkpoint.
    """
    require_plain_checkpoint(folder)
    path = folder / "config.json"
    if folder.is_dir() and not path.exists():
        raise MptTrtError(
            f"{path}: no such file{hint(folder) or '; give the folder of a checkpoint'}"
        )
    content = read_json(path)
    if "model_type" not in content and (kind := describe_folder(folder)):
        raise MptTrtError(f"{folder}: not a checkpoint in Hugging Face format, but {kind}")
    return parse_hf_config(content, path)


def parse_hf_config(content: dict[str, Any], path: Path) -> MptConfig:
    """Reads a config.json's content; `path` is its name in error messages."""
    return _Reader(path, content).config()


def _token_id(value: object) -> int | None:
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) else None


class _Reader:
    """Reads one `config.json`; keeps its path for error messages."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.family = family_of(content)
        self.top = content
        self.spellings: dict[str, str] = {}
        if not self.family.nested:
            self.top, self.spellings = nest_attention(content)
        self._use_aliases()
        self.attention = self._object("attn_config", self.top.get("attn_config"))
        self.feed_forward = self._object("ffn_config", self.top.get("ffn_config"))

    def config(self) -> MptConfig:
        self._refuse_unsupported()
        hidden_size = self._positive("d_model", MOST["hidden_size"])
        num_heads = self._positive("n_heads", MOST["num_heads"])
        if hidden_size % num_heads:
            raise self.refused("n_heads", num_heads, f"it must divide d_model ({hidden_size})")
        position_embedding = self._position_embedding(hidden_size // num_heads)
        has_rope = position_embedding == "rope"
        return MptConfig(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads(num_heads),
            num_layers=self._positive("n_layers", MOST["num_layers"]),
            intermediate_size=self._intermediate_size(hidden_size),
            vocab_size=self._positive("vocab_size", MOST["vocab_size"]),
            max_seq_len=self._positive("max_seq_len", MOST["max_seq_len"]),
            softmax_scale=self._softmax_scale(hidden_size // num_heads),
            position_embedding=position_embedding,
            rope=read_rope(self.attention, self.refused) if has_rope else None,
            alibi_bias_max=self._alibi_bias_max(),
            clip_qkv=self._clip_qkv(),
            qk_ln=self._attention_flag("qk_ln", False),
            logit_scale=self._logit_scale(hidden_size),
            norm_type=self._norm_type(),
            layer_norm_epsilon=self._epsilon(),
            qk_ln_epsilon=self._qk_ln_epsilon(),
            bias=not self._flag("no_bias", self.top, self.family.no_bias),
            tie_word_embeddings=self._flag("tie_word_embeddings", self.top, True),
            bos_token_id=_token_id(self.top.get("bos_token_id")),
            eos_token_id=_token_id(self.top.get("eos_token_id")),
        )

    def refused(self, field: str, value: object, why: str) -> MptTrtError:
        return MptTrtError(
            f"{self.path}: {self.spellings.get(field, field)} = {shown(value)}: {why}"
        )

    def _use_aliases(self) -> None:
        for alias, name in ALIASES.items():
            value = self.top.get(alias)
            if value is None:
                continue
            if self.top.get(name, value) != value:
                raise self.refused(
                    alias, value, f"{name} is {shown(self.top[name])}; correct one of them"
                )
            self.top = self.top | {name: value}
            if name not in self.spellings:
                self.spellings = self.spellings | {name: alias}

    def _refuse_unsupported(self) -> None:
        kind = self.top.get("model_type")
        if kind not in ("mpt", *BY_MODEL_TYPE):
            others = ", ".join(BY_MODEL_TYPE)
            raise self.refused(
                "model_type",
                kind,
                f"only MPT checkpoints ('mpt') and their relatives ({others}) are read",
            )
        for owner, keys in (
            ("", self.top),
            ("attn_config.", self.attention),
            ("ffn_config.", self.feed_forward),
        ):
            for key, value in keys.items():
                self._refuse_unsupported_value(owner + key, value)
        self._refuse_unknown("attn_config", self.attention, ATTENTION_KEYS)
        self._refuse_unknown("ffn_config", self.feed_forward, USED_IN_FEED_FORWARD)
        self._refuse_other_activations()
        self._refuse_other_slopes()
        unknown = [key for key in self.top if key not in TOP_LEVEL_KEYS and key not in LIMITED]
        if unknown:
            names = (key if key.isprintable() and len(key) < 80 else shown(key) for key in unknown)
            _warn_of_unknown_keys(self.path, ", ".join(names))

    def _refuse_unsupported_value(self, field: str, value: object) -> None:
        allowed, feature = LIMITED.get(field, ((), ""))
        # 1 == True in Python, so types are compared as well.
        if feature and not any(type(value) is type(v) and value == v for v in allowed):
            raise self.refused(field, value, f"{feature}: this feature is not supported")

    def _refuse_unknown(self, owner: str, keys: dict[str, Any], known: frozenset[str]) -> None:
        for key, value in keys.items():
            field = f"{owner}.{key}"
            if key not in known and field not in LIMITED and value not in ABSENT:
                raise self.refused(field, value, "this feature is not supported")

    def _refuse_other_activations(self) -> None:
        field = "ffn_config.ffn_act_fn"
        activation = self._object(field, self.feed_forward.get("ffn_act_fn")) or {"name": "gelu"}
        if (activation.get("name"), activation.get("approximate", "none")) != ("gelu", "none"):
            raise self.refused(field, activation, "only exact GELU is supported")

    def _refuse_other_slopes(self) -> None:
        heads = self.top.get("n_heads")
        if self.family.nested or not isinstance(heads, int) or not self.attention.get("alibi"):
            return
        if heads & (heads - 1):
            raise self.refused(
                "n_heads",
                heads,
                f"the ALiBi of {self.family.name} is supported for powers of two only, since its "
                "slopes for other numbers are not those of MPT",
            )

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
        largest = sys.float_info.max
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest:
            return float(value)
        raise self.refused(field, value, "a positive number is required")

    def _num_kv_heads(self, num_heads: int) -> int:
        kind = self.attention.get("attn_type", "multihead_attention")
        if kind not in ATTENTION_TYPES:
            known = ", ".join(ATTENTION_TYPES)
            raise self.refused("attn_config.attn_type", kind, f"known types are {known}")
        value = self.attention.get("kv_n_heads")
        if value is None:
            if kind == "grouped_query_attention":
                raise self.refused("attn_config.kv_n_heads", None, f"{kind} requires a number")
            value = 1 if kind == "multiquery_attention" else num_heads
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or value < 1 or num_heads % value:
            why = f"it must divide n_heads ({num_heads})"
            raise self.refused("attn_config.kv_n_heads", value, why)
        return int(value)

    def _intermediate_size(self, hidden_size: int) -> int:
        explicit = self.feed_forward.get("ffn_hidden_size")
        if explicit is not None:
            if not isinstance(explicit, int) or isinstance(explicit, bool) or explicit < 1:
                why = "a positive integer is required"
                raise self.refused("ffn_config.ffn_hidden_size", explicit, why)
            return self._at_most("ffn_config.ffn_hidden_size", explicit, MOST["intermediate_size"])
        ratio = self._number("expansion_ratio", self.top.get("expansion_ratio", 4))
        size = int(hidden_size * ratio)
        if size < 1:
            raise self.refused("expansion_ratio", ratio, "the feed-forward layer would be empty")
        if size > MOST["intermediate_size"]:
            raise self.refused(
                "expansion_ratio", ratio, f"the feed-forward layer would have {size}"
            )
        return size

    def _position_embedding(self, head_dim: int) -> PositionEmbedding:
        # The hub's configs have learned_pos_emb: true and alibi: true; alibi has precedence.
        is_learned = self._flag("learned_pos_emb", self.top, True)
        has_alibi = self._attention_flag("alibi", self.family.alibi)
        if self.attention.get("rope") is not None and self._attention_flag("rope", False):
            if has_alibi:
                raise self.refused(
                    "attn_config.alibi", True, "not supported together with rope: true"
                )
            if head_dim % 2:
                raise self.refused(
                    "attn_config.rope", True, f"heads of {head_dim} features cannot be rotated"
                )
            return "rope"
        if has_alibi:
            return "alibi"
        if not is_learned:
            raise self.refused(
                "learned_pos_emb", False, "without alibi there would be no positions at all"
            )
        return "learned"

    def _attention_flag(self, key: str, default: bool) -> bool:
        return self._flag(f"attn_config.{key}", self.attention, default)

    def _flag(self, field: str, keys: dict[str, Any], default: bool) -> bool:
        value = keys.get(field.rpartition(".")[2], default)
        if not isinstance(value, bool):
            raise self.refused(field, value, "true or false is required")
        return value

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
        if value is None or value == 0:
            return None
        return self._number("attn_config.clip_qkv", value)

    def _logit_scale(self, hidden_size: int) -> float:
        value = self.top.get("logit_scale")
        if value is None:
            return 1.0
        if value == "inv_sqrt_d_model":
            return 1.0 / math.sqrt(hidden_size)
        return self._number("logit_scale", value)

    def _norm_type(self) -> NormType:
        name = self.top.get("norm_type", "low_precision_layernorm")
        if not isinstance(name, str) or name.lower() not in NORM_TYPES:
            raise self.refused("norm_type", name, f"known types are {', '.join(NORM_TYPES)}")
        return NORM_TYPES[name.lower()]

    def _epsilon(self) -> float:
        # llm-foundry's key, then transformers'.
        for field in ("norm_eps", "layer_norm_epsilon"):
            if self.top.get(field) is not None:
                return self._number(field, self.top[field])
        return 1e-5

    def _qk_ln_epsilon(self) -> float:
        name = self.attention.get("norm_type") or "low_precision_layernorm"
        if self.attention.get("qk_ln") and NORM_TYPES.get(str(name).lower()) != "layernorm":
            raise self.refused(
                "attn_config.norm_type", name, "with qk_ln, only layer norm is supported"
            )
        value = self.attention.get("norm_eps")
        return 1e-5 if value is None else self._number("attn_config.norm_eps", value)


@functools.cache
def _warn_of_unknown_keys(path: Path, keys: str) -> None:
    """Warns once per file, because a run may read a file several times."""
    log.warning("%s: keys that MPT does not have are ignored: %s", path, keys)
