"""The architecture of one MPT model, independent of the files that describe it.

`checkpoint.hf_config` reads it from Hugging Face's config.json, `ft.checkpoint` from FT's
config.ini.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

PositionEmbedding = Literal["alibi", "learned"]
NormType = Literal["layernorm", "rmsnorm"]


@dataclass(frozen=True)
class MptConfig:
    """Architecture of an MPT decoder; sizes are of the whole model, not of a rank.

    intermediate_size: width of the feed-forward layer.
    softmax_scale: factor on `Q K^T`.
    qk_ln: queries and keys go through a layer norm of their own, whatever norm_type says; it has
        qk_ln_epsilon (llm-foundry hands the model's norm settings to the blocks only).
    logit_scale: factor on the logits.
    bias: linear layers and norms have biases.
    bos_token_id, eos_token_id: None when neither the config nor the tokenizer names one.
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Columns of K (and of V) in the QKV projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.hidden_size + 2 * self.kv_size


def alibi_slopes(num_heads: int, alibi_bias_max: int) -> list[float]:
    """ALiBi slope of each head, `[num_heads]`.

    Press et al. 2021 (arXiv:2108.12409), section 3, with MPT's `alibi_bias_max` in place of 8: of a
    power of two of heads, head i (from 1) has 2^(-i * alibi_bias_max / num_heads). Other counts
    take the slopes of the next power of two, first every second one, then the rest (llm-foundry).
    """
    rounded_up = 2 ** math.ceil(math.log2(num_heads))
    slopes = [2.0 ** (-i * alibi_bias_max / rounded_up) for i in range(1, rounded_up + 1)]
    if rounded_up == num_heads:
        return slopes
    return (slopes[1::2] + slopes[::2])[:num_heads]
