"""Lists the tensors of an MPT: Hugging Face name and shape, FT name, and division among ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from mpt_trt.model.config import MptConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Split(Enum):
    """Division of a tensor among tensor-parallel ranks.

    WHOLE: every rank reads the same file. QKV, COLUMNS: by output features (QKV by heads within Q,
    K and V). ROWS: by input features.
    """

    WHOLE = "whole"
    QKV = "qkv"
    COLUMNS = "columns"
    ROWS = "rows"


class BlockMatrix(StrEnum):
    """One of the four matrices of a block, named like its layer in FasterTransformer.

    Readers and writers of formats with other names have a table of these members.

    hf_name: Hugging Face name of the layer within a block. split_by: division among ranks. norm:
    name of the norm before it; None if its input comes from another layer.
    """

    hf_name: str
    split_by: Split
    norm: str | None

    QKV = "attention.query_key_value", "attn.Wqkv", Split.QKV, "input_layernorm"
    OUTPUT = "attention.dense", "attn.out_proj", Split.ROWS, None
    UP = "mlp.dense_h_to_4h", "ffn.up_proj", Split.COLUMNS, "post_attention_layernorm"
    DOWN = "mlp.dense_4h_to_h", "ffn.down_proj", Split.ROWS, None

    def __new__(cls, name: str, hf_name: str, split_by: Split, norm: str | None) -> BlockMatrix:
        """Makes a member that is equal to its name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.hf_name, member.split_by, member.norm = hf_name, split_by, norm
        return member

    def shape(self, config: MptConfig) -> tuple[int, int]:
        """`[out_features, in_features]`."""
        hidden = config.hidden_size
        return {
            BlockMatrix.QKV: (config.qkv_size, hidden),
            BlockMatrix.OUTPUT: (hidden, hidden),
            BlockMatrix.UP: (config.intermediate_size, hidden),
            BlockMatrix.DOWN: (hidden, config.intermediate_size),
        }[self]


@dataclass(frozen=True)
class Weight:
    """One tensor.

    name: FT name without `model.` and rank, e.g. `layers.0.attention.dense.weight`.
    hf_name: Hugging Face name without `transformer.`; None for zeros that FT expects and Hugging
        Face does not store.
    shape: as Hugging Face stores it; a linear layer's weight is `[out_features, in_features]`.
    layer, matrix: place of a block's matrix, which FT stores transposed: `[in_features,
        out_features]`; None for all other tensors.
    """

    name: str
    hf_name: str | None
    shape: tuple[int, ...]
    split: Split = Split.WHOLE
    layer: int | None = None
    matrix: BlockMatrix | None = None

    @property
    def is_linear(self) -> bool:
        """Returns whether the tensor is a block's matrix."""
        return self.matrix is not None

    @property
    def place(self) -> tuple[int, BlockMatrix]:
        """Layer and matrix; raises ValueError for a tensor that is not a block's matrix."""
        if self.layer is None or self.matrix is None:
            raise ValueError(f"{self.name}: not a matrix of a block")
        return self.layer, self.matrix


BlockMatrices = Mapping[BlockMatrix, Weight]
"""The four matrices of a block."""


class WeightReader(Protocol):
    """Reader of single tensors of a checkpoint."""

    def tensor(self, weight: Weight) -> NDArray[Any]:
        """Reads a tensor `weight.shape` in the stored type; it may be memory-mapped."""
        ...


def weights(config: MptConfig) -> list[Weight]:
    """Lists all tensors of the model in the order of computation."""
    tensors = [Weight("wte", "wte.weight", (config.vocab_size, config.hidden_size))]
    if config.position_embedding == "learned":
        tensors.append(Weight("wpe", "wpe.weight", (config.max_seq_len, config.hidden_size)))
    for layer in range(config.num_layers):
        tensors += _layer_weights(config, layer)
    tensors += _norm("final_layernorm", "norm_f", config.hidden_size, _has_norm_bias(config))
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        tensors.append(Weight("lm_head.weight", "lm_head.weight", shape))
    return tensors


def vocabulary_tables(config: MptConfig) -> list[Weight]:
    """The embedding and, unless it is the same table, the head: one row per token."""
    return [each for each in weights(config) if each.name in ("wte", "lm_head.weight")]


def _layer_weights(config: MptConfig, layer: int) -> list[Weight]:
    ft, hf = f"layers.{layer}", f"blocks.{layer}"
    hidden, norm_bias = config.hidden_size, _has_norm_bias(config)
    qk_norms = []
    if config.qk_ln:
        qk_norms = [
            *_norm(f"{ft}.attention.q_layernorm", f"{hf}.attn.q_ln", hidden, config.bias),
            *_norm(f"{ft}.attention.k_layernorm", f"{hf}.attn.k_ln", config.kv_size, config.bias),
        ]
    return [
        *_norm(f"{ft}.{BlockMatrix.QKV.norm}", f"{hf}.norm_1", hidden, norm_bias),
        *_linear(config, layer, BlockMatrix.QKV),
        *qk_norms,
        *_linear(config, layer, BlockMatrix.OUTPUT),
        *_norm(f"{ft}.{BlockMatrix.UP.norm}", f"{hf}.norm_2", hidden, norm_bias),
        *_linear(config, layer, BlockMatrix.UP),
        *_linear(config, layer, BlockMatrix.DOWN),
    ]


def _has_norm_bias(config: MptConfig) -> bool:
    return config.bias and config.norm_type == "layernorm"


def _norm(name: str, hf_name: str, size: int, has_bias: bool) -> list[Weight]:
    return [
        Weight(f"{name}.weight", f"{hf_name}.weight", (size,)),
        Weight(f"{name}.bias", f"{hf_name}.bias" if has_bias else None, (size,)),
    ]


def _linear(config: MptConfig, layer: int, matrix: BlockMatrix) -> list[Weight]:
    name, hf_name = f"layers.{layer}.{matrix}", f"blocks.{layer}.{matrix.hf_name}"
    shape, split = matrix.shape(config), matrix.split_by
    tensors = [Weight(f"{name}.weight", f"{hf_name}.weight", shape, split, layer, matrix)]
    if config.bias:
        # A row-split layer's bias is added once, after the ranks' sums are added.
        bias_split = Split.WHOLE if split is Split.ROWS else split
        tensors.append(Weight(f"{name}.bias", f"{hf_name}.bias", shape[:1], bias_split))
    return tensors


def block_matrices(config: MptConfig, layer: int) -> dict[BlockMatrix, Weight]:
    """Matrices of a block."""
    return {
        weight.matrix: weight
        for weight in _layer_weights(config, layer)
        if weight.matrix is not None
    }


def preceding_norm(weight: Weight) -> str | None:
    """FT name of the norm directly before a block's matrix; None if there is none."""
    layer, matrix = weight.place
    return None if matrix.norm is None else f"layers.{layer}.{matrix.norm}"
