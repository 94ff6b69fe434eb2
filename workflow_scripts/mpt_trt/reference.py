"""float32 logits straight from a Hugging Face checkpoint, computed without any code of the engines.

The blocks are transformers' own where it has the architecture, and `plain_block`'s where it has
not. They are run one after the other, each with its weights when its turn comes: memory is that of
one block and of the embedding, so that a 30B model is checked on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mpt_trt.config import MptConfig, read_hf_config
from mpt_trt.hf_checkpoint import HfCheckpoint
from mpt_trt.model_tensors import ModelTensors, embed
from mpt_trt.plain_block import PlainBlock, causal_bias, model_norm, with_weights
from mpt_trt.weight_map import weights

# (tensors by name within the block, hidden `[seq, hidden]`) -> hidden `[seq, hidden]`
Block = Callable[[dict[str, Tensor], Tensor], Tensor]


def reference_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """Logits of every token of one sequence, float32 `[len(token_ids), vocab]`.

    Raises MptTrtError when the model has learned positions and the sequence is longer.
    """
    config = read_hf_config(folder)
    model = ModelTensors(config, HfCheckpoint(folder, weights(config)))
    make_block = _transformers_block if is_in_transformers(config) else _plain_block
    with torch.inference_mode():
        return _forward(model, make_block(config, len(token_ids)), torch.tensor(token_ids))


def reference_name(folder: Path) -> str:
    """What computes the reference of a checkpoint, for reports."""
    if not is_in_transformers(read_hf_config(folder)):
        # Without what follows the `+`, which says for what hardware PyTorch was built.
        return f"plain PyTorch {torch.__version__.split('+')[0]}, float32"
    import transformers

    return f"transformers {transformers.__version__}, float32"


def is_in_transformers(config: MptConfig) -> bool:
    """Whether transformers' MPT has every feature of the architecture."""
    return (
        config.num_kv_heads == config.num_heads
        and config.intermediate_size == 4 * config.hidden_size
        and config.position_embedding == "alibi"
        and config.norm_type == "layernorm"
        and config.logit_scale == 1.0
        and not config.qk_ln
        and not config.bias
    )


def _forward(model: ModelTensors, block: Block, token_ids: Tensor) -> Tensor:
    config = model.config
    embedding = model.tensor("wte.weight")
    hidden = embed(model, embedding, token_ids)
    for layer in range(config.num_layers):
        # Not kept in a variable: this block's weights are freed before the next one's are read.
        hidden = block(model.tensors(f"blocks.{layer}."), hidden)
    norm = with_weights(partial(model_norm, config), model.tensors("norm_f."))
    head = embedding if config.tie_word_embeddings else model.tensor("lm_head.weight")
    return norm(hidden) @ head.T * config.logit_scale


def _plain_block(config: MptConfig, length: int) -> Block:
    attention_bias = causal_bias(config, length)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        block = with_weights(partial(PlainBlock, config), tensors)
        return block(hidden[None], attention_bias)[0]

    return run


def _transformers_block(config: MptConfig, length: int) -> Block:
    from transformers.models.mpt.modeling_mpt import MptBlock, build_mpt_alibi_tensor

    # transformers' whole model would leave alibi_bias_max at 8 whatever the checkpoint says.
    alibi = build_mpt_alibi_tensor(config.num_heads, length, config.alibi_bias_max)
    is_hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    settings = _transformers_config(config)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        block = with_weights(partial(MptBlock, settings), tensors)
        return block(hidden[None], position_bias=alibi, attention_mask=is_hidden)[0][0]

    return run


def _transformers_config(config: MptConfig):
    from transformers import MptConfig as TransformersConfig

    return TransformersConfig(
        d_model=config.hidden_size,
        n_heads=config.num_heads,
        n_layers=config.num_layers,
        max_seq_len=config.max_seq_len,
        vocab_size=config.vocab_size,
        layer_norm_epsilon=config.layer_norm_epsilon,
        attn_config={"clip_qkv": config.clip_qkv, "softmax_scale": config.softmax_scale},
    )
