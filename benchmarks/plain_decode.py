"""A plain PyTorch MPT that decodes greedily with a static cache, compiled and as a CUDA graph.

The peer of gpu_decode.py, written as a careful user of PyTorch would: float16, batch 1, no biases,
ALiBi, tied head.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.config import MptConfig, alibi_slopes
from mpt_trt.model.sharding import Rank

LAYERS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


class Block(torch.nn.Module):
    """A layer; matrices are `[in_features, out_features]`, as in the FT checkpoint."""

    def __init__(self, config: MptConfig, weights: dict[str, Tensor], cache_len: int):
        super().__init__()
        self.heads, self.head_dim = config.num_heads, config.head_dim
        self.epsilon, self.scale = config.layer_norm_epsilon, config.softmax_scale
        for name, value in weights.items():
            self.register_buffer(name, value)
        shape = (1, config.num_heads, cache_len, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=torch.float16, device="cuda"))
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float16, device="cuda"))

    def forward(self, hidden: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        normed = functional.layer_norm(
            hidden, hidden.shape[-1:], self.input_layernorm, None, self.epsilon
        )
        packed = (normed @ self.query_key_value).view(1, 3, self.heads, 1, self.head_dim)
        query, key, value = packed.unbind(1)
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)
        context = functional.scaled_dot_product_attention(
            query, self.keys, self.values, attn_mask=bias, scale=self.scale
        )
        hidden = hidden + context.reshape(1, -1) @ self.dense
        normed = functional.layer_norm(
            hidden, hidden.shape[-1:], self.post_attention_layernorm, None, self.epsilon
        )
        return hidden + functional.gelu(normed @ self.dense_h_to_4h) @ self.dense_4h_to_h


class Decoder:
    """A whole step, which updates token and position in place, so that it can be replayed."""

    def __init__(self, checkpoint: FtCheckpoint, cache_len: int):
        config = self.config = checkpoint.config
        files = checkpoint.rank_files(Rank(0, 1))

        def read(name: str) -> Tensor:
            file = files[name]
            content = np.fromfile(checkpoint.folder / file.name, np.float16).reshape(file.shape)
            return torch.from_numpy(content).cuda()

        self.table, self.norm = read("wte"), read("final_layernorm.weight")
        self.blocks = []
        for layer in range(config.num_layers):
            prefix = f"layers.{layer}"
            weights = {name.split(".")[-1]: read(f"{prefix}.{name}.weight") for name in LAYERS}
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[name] = read(f"{prefix}.{name}.weight")
            self.blocks.append(Block(config, weights, cache_len))
        self.positions = torch.arange(cache_len, device="cuda")
        slopes = alibi_slopes(config.num_heads, config.alibi_bias_max)
        self.slopes = torch.tensor(slopes, device="cuda", dtype=torch.float32).view(1, -1, 1, 1)
        self.token = torch.full((1,), 100, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(self) -> None:
        distance = (self.positions - self.position).float()
        bias = (self.slopes * distance).masked_fill(distance > 0, -torch.inf).half()
        hidden = self.table[self.token]
        for block in self.blocks:
            hidden = block(hidden, self.position, bias)
        hidden = functional.layer_norm(
            hidden, hidden.shape[-1:], self.norm, None, self.config.layer_norm_epsilon
        )
        logits = (hidden @ self.table.T).float()
        self.token.copy_(logits.argmax(dim=-1))
        self.position += 1


@torch.no_grad()
def decode_ms(checkpoint: FtCheckpoint, cache_len: int, steps: int) -> dict[str, float]:
    """Measures milliseconds per token as a CUDA graph, with PyTorch's kernels and compiled ones."""
    decoder = Decoder(checkpoint, cache_len)
    found = {"graph": _replayed_ms(decoder, steps)}
    for block in decoder.blocks:
        block.compile(dynamic=False)
    found["compiled_graph"] = _replayed_ms(decoder, steps)
    del decoder
    torch.cuda.empty_cache()
    return found


def _replayed_ms(decoder: Decoder, steps: int) -> float:
    decoder.position.zero_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            decoder.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    for _ in range(8):
        graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps
