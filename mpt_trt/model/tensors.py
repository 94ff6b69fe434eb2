"""Every tensor of an MPT: its Hugging Face name and shape, its FT name, and how ranks share it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from mpt_trt.model.config import MptConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Split(Enum):
    """How tensor-parallel ranks share a tensor.

    WHOLE: every rank reads the one file. QKV, COLUMNS: by output features (QKV per head within
    Q, K and V). ROWS: by input features.
    """

    WHOLE = "whole"
    QKV = "qkv"
    COLUMNS = "columns"
    ROWS = "rows"


@dataclass(frozen=True)
class Weight:
    """One tensor.

    name: FT name without `model.` and rank, e.g. `layers.0.attention.dense.weight`.
    hf_name: Hugging Face name without `transformer.`; None for zeros that FT expects and Hugging
        Face does not store.
    shape: as Hugging Face stores it; a linear layer's weight is `[out_features, in_features]`.
    """

    name: str
    hf_name: str | None
    shape: tuple[int, ...]
    split: Split = Split.WHOLE

    @property
    def is_linear(self) -> bool:
        """A matrix of a linear layer, which FT stores transposed: `[in_features, out_features]`."""
        return len(self.shape) == 2 and self.split is not Split.WHOLE


class WeightReader(Protocol):
    """What reads single tensors of a checkpoint."""

    def tensor(self, weight: Weight) -> NDArray[Any]:
        """`weight.shape`, in the stored type; maybe memory-mapped."""
        ...


def weights(config: MptConfig) -> list[Weight]:
    """All tensors of the model, in the order in which data flows through them."""
    found = [Weight("wte", "wte.weight", (config.vocab_size, config.hidden_size))]
    if config.position_embedding == "learned":
        found.append(Weight("wpe", "wpe.weight", (config.max_seq_len, config.hidden_size)))
    for layer in range(config.num_layers):
        found += _layer_weights(config, layer)
    found += _norm("final_layernorm", "norm_f", config.hidden_size, _has_norm_bias(config))
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        found.append(Weight("lm_head.weight", "lm_head.weight", shape))
    return found


def _layer_weights(config: MptConfig, layer: int) -> list[Weight]:
    ft, hf = f"layers.{layer}", f"blocks.{layer}"
    hidden, intermediate = config.hidden_size, config.intermediate_size
    norm_bias = _has_norm_bias(config)
    qk_norms = []
    if config.qk_ln:
        qk_norms = [
            *_norm(f"{ft}.attention.q_layernorm", f"{hf}.attn.q_ln", hidden, config.bias),
            *_norm(f"{ft}.attention.k_layernorm", f"{hf}.attn.k_ln", config.kv_size, config.bias),
        ]
    return [
        *_norm(f"{ft}.input_layernorm", f"{hf}.norm_1", hidden, norm_bias),
        *_linear(
            f"{ft}.attention.query_key_value",
            f"{hf}.attn.Wqkv",
            (config.qkv_size, hidden),
            Split.QKV,
            config,
        ),
        *qk_norms,
        *_linear(
            f"{ft}.attention.dense", f"{hf}.attn.out_proj", (hidden, hidden), Split.ROWS, config
        ),
        *_norm(f"{ft}.post_attention_layernorm", f"{hf}.norm_2", hidden, norm_bias),
        *_linear(
            f"{ft}.mlp.dense_h_to_4h",
            f"{hf}.ffn.up_proj",
            (intermediate, hidden),
            Split.COLUMNS,
            config,
        ),
        *_linear(
            f"{ft}.mlp.dense_4h_to_h",
            f"{hf}.ffn.down_proj",
            (hidden, intermediate),
            Split.ROWS,
            config,
        ),
    ]


def _has_norm_bias(config: MptConfig) -> bool:
    return config.bias and config.norm_type == "layernorm"


def _norm(name: str, hf_name: str, size: int, has_bias: bool) -> list[Weight]:
    return [
        Weight(f"{name}.weight", f"{hf_name}.weight", (size,)),
        Weight(f"{name}.bias", f"{hf_name}.bias" if has_bias else None, (size,)),
    ]


def _linear(
    name: str, hf_name: str, shape: tuple[int, int], split: Split, config: MptConfig
) -> list[Weight]:
    found = [Weight(f"{name}.weight", f"{hf_name}.weight", shape, split)]
    if config.bias:
        # A row-split layer's bias is added once, after the ranks' sums have met.
        bias_split = Split.WHOLE if split is Split.ROWS else split
        found.append(Weight(f"{name}.bias", f"{hf_name}.bias", shape[:1], bias_split))
    return found


def block_matrices(config: MptConfig, layer: int) -> dict[str, Weight]:
    """The four matrices of a block, by their FT name within it, e.g. `attention.dense`."""
    return {
        weight.name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): weight
        for weight in _layer_weights(config, layer)
        if weight.is_linear
    }


# Layers whose input is the output of a norm, within a block.
NORM_BEFORE = {
    "attention.query_key_value": "input_layernorm",
    "mlp.dense_h_to_4h": "post_attention_layernorm",
}


def preceding_norm(weight: Weight) -> str | None:
    """FT name of the norm whose output a linear layer's weight is multiplied with, if any is."""
    for layer, norm in NORM_BEFORE.items():
        if weight.name.endswith(f".{layer}.weight"):
            return weight.name.replace(f"{layer}.weight", norm)
    return None
