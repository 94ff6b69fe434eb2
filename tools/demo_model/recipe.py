"""Sizes and training settings of the demo model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Sizes of the MPT, which always has no biases, exact GELU, ALiBi and tied embeddings."""

    hidden_size: int = 256
    num_heads: int = 4
    num_layers: int = 7
    vocab_size: int = 4096
    max_seq_len: int = 1024
    expansion_ratio: int = 4
    alibi_bias_max: int = 8
    layer_norm_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Recipe:
    """Training settings. Steps are the optimizer's; a batch has windows of max_seq_len tokens."""

    steps: int = 19_750
    batch_size: int = 64
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    warmup_steps: int = 300
    evaluate_every: int = 250
    snippet_windows: int = 0
    seed: int = 0
