"""Computes float32 reference logits from a Hugging Face checkpoint, without code of the engines.

The blocks are transformers' own if it supports the architecture, otherwise those of
`model.torch_block`. They run one after the other, and weights are read block by block. Memory is
that of one block or of the embedding, so a laptop can check a 30B model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import weights
from mpt_trt.model.torch_block import PlainBlock, causal_bias, model_norm, with_weights
from mpt_trt.model.torch_tensors import ModelTensors, embed
from mpt_trt.system.progress_lines import Advance, no_progress

# (tensors by name within the block, hidden `[seq, hidden]`) -> hidden `[seq, hidden]`
Block = Callable[[dict[str, Tensor], Tensor], Tensor]


def reference_logits(folder: Path, token_ids: list[int], adapter: Path | None = None) -> Tensor:
    """Computes logits at every token of one sequence, float32 `[len(token_ids), vocab]`.

    adapter: folder of a LoRA adapter to merge.

    Raises MptTrtError when the model has learned positions and the sequence is longer.
    """
    hidden = reference_hidden(folder, np.array([token_ids]), adapter)[0]
    return read_head(folder, adapter).logits(hidden)


def reference_hidden(
    folder: Path,
    token_ids: NDArray[np.int64],
    adapter: Path | None = None,
    advance: Advance = no_progress,
) -> Tensor:
    """Computes the inputs of the head (the last norm's output), float32 `[sequences, seq, hidden]`.

    token_ids: `[sequences, seq]`. Each block is read once and runs on one sequence after the other.
    advance: counts the blocks.

    Raises MptTrtError when the model has learned positions and the sequences are longer.
    """
    model = open_checkpoint(folder, adapter)
    with torch.inference_mode():
        block = reference_block(model.config, token_ids.shape[1])
        return _hidden(model, block, torch.from_numpy(token_ids), advance)


@dataclass(frozen=True)
class Head:
    """The last matrix product. weight: float32 `[vocab, hidden]`. scale: factor of the result."""

    weight: Tensor
    scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """Computes logits, float32 `[..., vocab]`, from hidden states `[..., hidden]`."""
        with torch.inference_mode():
            return hidden @ self.weight.T * self.scale


def read_head(folder: Path, adapter: Path | None = None) -> Head:
    """Reads the head of a checkpoint, which turns `reference_hidden` into logits."""
    return head_of(open_checkpoint(folder, adapter))


def head_of(model: ModelTensors) -> Head:
    """The head of an open checkpoint."""
    name = "wte.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    return Head(model.tensor(name), model.config.logit_scale)


def reference_name(folder: Path) -> str:
    """Name of the software that computes the reference of a checkpoint, for reports."""
    if not is_in_transformers(read_hf_config(folder)):
        # Without the part after `+`, the hardware that PyTorch was built for.
        return f"plain PyTorch {torch.__version__.split('+')[0]}, float32"
    import transformers  # seconds to import, and not needed for other architectures

    return f"transformers {transformers.__version__}, float32"


def is_in_transformers(config: MptConfig) -> bool:
    """Returns whether transformers' MPT has every feature of the architecture."""
    return (
        config.num_kv_heads == config.num_heads
        and config.intermediate_size == 4 * config.hidden_size
        and config.position_embedding == "alibi"
        and config.norm_type == "layernorm"
        and config.logit_scale == 1.0
        and not config.qk_ln
        and not config.bias
    )


def open_checkpoint(folder: Path, adapter: Path | None) -> ModelTensors:
    """A checkpoint's tensors in float32, with an adapter merged."""
    config = read_hf_config(folder)
    return ModelTensors(config, HfCheckpoint(folder, weights(config), adapter))


def reference_block(config: MptConfig, length: int) -> Block:
    """The block of the reference, for sequences of `length` tokens."""
    make_block = _transformers_block if is_in_transformers(config) else _plain_block
    return make_block(config, length)


def _hidden(model: ModelTensors, block: Block, token_ids: Tensor, advance: Advance) -> Tensor:
    config = model.config
    hidden = embed(model, model.tensor("wte.weight"), token_ids)
    for layer in range(config.num_layers):
        # No variable holds the weights, so they are freed before the next block's are read.
        hidden = _each_sequence(block, model.tensors(f"blocks.{layer}."), hidden)
        advance(1)
    return last_norm(model)(hidden)


def last_norm(model: ModelTensors) -> nn.Module:
    """The norm between the last block and the head."""
    return with_weights(partial(model_norm, model.config), model.tensors("norm_f."))


def _each_sequence(block: Block, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
    return torch.stack([block(tensors, sequence) for sequence in hidden])


def _plain_block(config: MptConfig, length: int) -> Block:
    attention_bias = causal_bias(config, length)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        block = with_weights(partial(PlainBlock, config), tensors)
        return block(hidden[None], attention_bias)[0]

    return run


def _transformers_block(config: MptConfig, length: int) -> Block:
    # Seconds to import, and not needed for other architectures.
    from transformers.models.mpt.modeling_mpt import MptBlock, build_mpt_alibi_tensor

    # transformers' whole model would always use 8 for alibi_bias_max.
    alibi = build_mpt_alibi_tensor(config.num_heads, length, config.alibi_bias_max)
    is_hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    settings = _transformers_config(config)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        block = with_weights(partial(MptBlock, settings), tensors)
        return block(hidden[None], position_bias=alibi, attention_mask=is_hidden)[0][0]

    return run


def _transformers_config(config: MptConfig):
    from transformers import MptConfig as TransformersConfig  # as above

    return TransformersConfig(
        d_model=config.hidden_size,
        n_heads=config.num_heads,
        n_layers=config.num_layers,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
        attn_config={"clip_qkv": config.clip_qkv, "softmax_scale": config.softmax_scale},
    )
