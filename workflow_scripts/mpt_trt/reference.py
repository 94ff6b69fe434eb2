"""float32 logits straight from a Hugging Face checkpoint, computed without any code of the engines.

The blocks are transformers' own where it has the architecture, and `plain_block`'s where it has
not. They are run one after the other, each with its weights when its turn comes: memory is that of
one block and of the embedding, so that a 30B model is checked on a laptop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpt_trt.config import MptConfig, read_hf_config
from mpt_trt.errors import MptTrtError
from mpt_trt.hf_checkpoint import HfCheckpoint
from mpt_trt.plain_block import PlainBlock, causal_bias, model_norm
from mpt_trt.weight_map import Weight, weights

# (tensors by name within the block, hidden `[seq, hidden]`) -> hidden `[seq, hidden]`
Block = Callable[[dict[str, Tensor], Tensor], Tensor]


def reference_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """Logits of every token of one sequence, float32 `[len(token_ids), vocab]`.

    Raises MptTrtError when the model has learned positions and the sequence is longer.
    """
    config = read_hf_config(folder)
    found = {w.hf_name: w for w in weights(config) if w.hf_name is not None}
    source = _Source(HfCheckpoint(folder, list(found.values())), found)
    length = len(token_ids)
    if is_in_transformers(config):
        block = _transformers_block(config, length)
    else:
        block = PlainBlock(config, causal_bias(config, length))
    with torch.inference_mode():
        return _forward(config, source, block, torch.tensor(token_ids))


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


class _Source:
    """Tensors by Hugging Face name, in float32."""

    def __init__(self, checkpoint: HfCheckpoint, found: dict[str, Weight]):
        self._checkpoint = checkpoint
        self._found = found

    def tensor(self, name: str) -> Tensor:
        stored = self._checkpoint.tensor(self._found[name])
        # A copy in any case: the file is mapped for reading only.
        return torch.from_numpy(stored.astype(np.float32))

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names start with `prefix`, by what follows it."""
        names = [name for name in self._found if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}


def _forward(config: MptConfig, source: _Source, block: Block, token_ids: Tensor) -> Tensor:
    embedding = source.tensor("wte.weight")
    hidden = embedding[token_ids]
    if config.position_embedding == "learned":
        hidden = hidden + _learned_positions(config, source, len(token_ids))
    for layer in range(config.num_layers):
        # Not kept in a variable: this block's weights are freed before the next one's are read.
        hidden = block(source.tensors(f"blocks.{layer}."), hidden)
    hidden = model_norm(config, source.tensors("norm_f."), hidden)
    head = embedding if config.tie_word_embeddings else source.tensor("lm_head.weight")
    return hidden @ head.T * config.logit_scale


def _learned_positions(config: MptConfig, source: _Source, length: int) -> Tensor:
    if length > config.max_seq_len:
        raise MptTrtError(
            f"{length} tokens, but the model has learned positions for {config.max_seq_len}; "
            "take a shorter prompt or fewer new tokens"
        )
    return source.tensor("wpe.weight")[:length]


def _transformers_block(config: MptConfig, length: int) -> Block:
    from transformers.models.mpt.modeling_mpt import MptBlock, build_mpt_alibi_tensor

    # transformers' whole model would leave alibi_bias_max at 8 whatever the checkpoint says.
    alibi = build_mpt_alibi_tensor(config.num_heads, length, config.alibi_bias_max)
    is_hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    settings = _transformers_config(config)

    def run(tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        with torch.device("meta"):
            block = MptBlock(settings).eval()
        block.load_state_dict(tensors, strict=True, assign=True)
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
