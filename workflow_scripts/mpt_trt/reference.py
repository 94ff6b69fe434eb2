"""float32 logits straight from a Hugging Face checkpoint, by transformers' own modules.

The blocks are run one after the other, each filled with its weights when its turn comes: memory is
that of one block, so that a 30B model is checked on a laptop. What is computed is
`transformers.MptForCausalLM.forward` in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mpt_trt.config import MptConfig, read_hf_config
from mpt_trt.errors import MptTrtError
from mpt_trt.hf_checkpoint import HfCheckpoint
from mpt_trt.weight_map import Weight, weights


def reference_logits(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """Logits of every token of one sequence, float32 `[len(token_ids), vocab]`.

    Raises MptTrtError when transformers does not have the checkpoint's architecture.
    """
    config = read_hf_config(folder)
    _require_known_to_transformers(folder, config)
    found = {w.hf_name: w for w in weights(config) if w.hf_name is not None}
    checkpoint = HfCheckpoint(folder, list(found.values()))
    with torch.inference_mode():
        return _forward(config, _Source(checkpoint, found), token_ids)


def reference_name() -> str:
    """What computed the reference, for reports."""
    import transformers

    return f"transformers {transformers.__version__}, float32"


class _Source:
    """Tensors by Hugging Face name, in float32."""

    def __init__(self, checkpoint: HfCheckpoint, found: dict[str, Weight]):
        self._checkpoint = checkpoint
        self._found = found

    def tensor(self, name: str) -> torch.Tensor:
        return self._checkpoint.tensor(self._found[name]).float()

    def state_dict(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self._found if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}


def _forward(config: MptConfig, source: _Source, token_ids: list[int]) -> torch.Tensor:
    from transformers.models.mpt.modeling_mpt import MptBlock, build_mpt_alibi_tensor

    length = len(token_ids)
    alibi = build_mpt_alibi_tensor(config.num_heads, length, config.alibi_bias_max)
    is_hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.device("meta"):
        block = MptBlock(_transformers_config(config)).eval()
    embedding = source.tensor("wte.weight")
    hidden = embedding[torch.tensor(token_ids)][None]
    for layer in range(config.num_layers):
        block.load_state_dict(source.state_dict(f"blocks.{layer}."), strict=True, assign=True)
        hidden = block(hidden, position_bias=alibi, attention_mask=is_hidden)[0]
    norm = source.tensor("norm_f.weight")
    hidden = torch.nn.functional.layer_norm(
        hidden[0], norm.shape, norm, eps=config.layer_norm_epsilon
    )
    head = embedding if config.tie_word_embeddings else source.tensor("lm_head.weight")
    return hidden @ head.T


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


def _require_known_to_transformers(folder: Path, config: MptConfig) -> None:
    unknown = {
        "attn_config.kv_n_heads": config.num_kv_heads != config.num_heads,
        "attn_config.qk_ln": config.qk_ln,
        "attn_config.alibi = false": config.position_embedding != "alibi",
        "no_bias = false": config.bias,
        "norm_type": config.norm_type != "layernorm",
        "expansion_ratio": config.intermediate_size != 4 * config.hidden_size,
        "logit_scale": config.logit_scale != 1.0,
    }
    if names := [name for name, is_used in unknown.items() if is_used]:
        raise MptTrtError(
            f"{folder / 'config.json'}: {', '.join(names)}: transformers' MPT does not have this "
            "feature, so there is no reference to compare with"
        )
