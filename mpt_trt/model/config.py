"""The architecture of one MPT model, independent of the files that describe it.

`checkpoint.hf_config` reads it from Hugging Face's config.json, `ft.checkpoint` from FT's
config.ini.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mpt_trt.errors import MptTrtError
from mpt_trt.model.rope import Rope

PositionEmbedding = Literal["alibi", "learned", "rope"]
NormType = Literal["layernorm", "rmsnorm"]

DTYPES = ("float32", "float16", "bfloat16")
"""Types in which weights are stored and networks compute."""

# Several times the largest models' sizes. Time and memory grow with these numbers before any weight
# is read, so a damaged or malicious file must not choose them freely.
MOST = {
    "hidden_size": 1 << 17,
    "num_heads": 1 << 12,
    "num_layers": 1000,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 22,
    "max_seq_len": 1 << 27,
    "alibi_bias_max": 1 << 10,
}
POSITIVE = ("softmax_scale", "logit_scale", "layer_norm_epsilon", "qk_ln_epsilon")


@dataclass(frozen=True)
class MptConfig:
    """Architecture of an MPT decoder; sizes are those of the whole model.

    intermediate_size: width of the feed-forward layer.
    softmax_scale: factor on `Q K^T`.
    rope: rotation of queries and keys; given if and only if position_embedding is "rope".
    qk_ln: queries and keys pass through layer norms with qk_ln_epsilon, regardless of norm_type
        (llm-foundry passes the model's norm settings only to the blocks).
    logit_scale: factor on the logits.
    bias: linear layers and norms have biases.
    bos_token_id, eos_token_id: None when neither the config nor the tokenizer names one.

    Raises MptTrtError when a size is larger than any model's, sizes do not divide each other, or a
    factor is not positive.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    intermediate_size: int
    vocab_size: int
    max_seq_len: int
    softmax_scale: float
    position_embedding: PositionEmbedding = "alibi"
    rope: Rope | None = None
    alibi_bias_max: int = 8
    clip_qkv: float | None = None
    qk_ln: bool = False
    logit_scale: float = 1.0
    norm_type: NormType = "layernorm"
    layer_norm_epsilon: float = 1e-5
    qk_ln_epsilon: float = 1e-5
    bias: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise MptTrtError(f"{name} = {getattr(self, name)}: 1 to {most} are supported")
        for name, whole in (("num_heads", "hidden_size"), ("num_kv_heads", "num_heads")):
            part, total = getattr(self, name), getattr(self, whole)
            if part < 1 or total % part:
                raise MptTrtError(f"{name} = {part}: it must divide {whole} ({total})")
        for name in POSITIVE:
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise MptTrtError(f"{name} = {value}: a positive number is required")
        if (self.position_embedding == "rope") != (self.rope is not None):
            raise MptTrtError(
                f"position_embedding = {self.position_embedding}: "
                f"the settings of rope are {'missing' if self.rope is None else 'also given'}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise MptTrtError(f"rope rotates pairs of features, but a head has {self.head_dim}")

    @property
    def max_positions(self) -> int | None:
        """Maximum number of positions; None if there is no limit."""
        is_dynamic = self.rope is not None and self.rope.scaling == "dynamic"
        return self.max_seq_len if self.position_embedding == "learned" or is_dynamic else None

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Columns of K (and of V) in the QKV projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Output features of the QKV projection: columns Q | K | V."""
        return self.hidden_size + 2 * self.kv_size


def alibi_slopes(num_heads: int, alibi_bias_max: int) -> list[float]:
    """Computes the ALiBi slope of each head, `[num_heads]`.

    Formula: Press et al. 2021 (arXiv:2108.12409), section 3, with MPT's `alibi_bias_max` instead of
    8. If num_heads is a power of two, head i (from 1) has 2^(-i * alibi_bias_max / num_heads).
    Otherwise the slopes of the next power of two are used: first every second one, then the rest
    (llm-foundry).
    """
    rounded_up = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-i * alibi_bias_max / rounded_up) for i in range(1, rounded_up + 1)]
    if rounded_up == num_heads:
        return slopes
    return (slopes[1::2] + slopes[::2])[:num_heads]
