"""A plain PyTorch MPT that decodes greedily with a static cache, compiled and as a CUDA graph.

The peer of gpu_decode.py and gpu_ranks.py, written as a careful user of PyTorch would: float16,
batch 1, no biases, ALiBi, tied head. Several ranks divide heads, feed-forward columns and the
vocabulary, and meet through torch.distributed's NCCL.
"""

from __future__ import annotations

import os
import time

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor

from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.config import MptConfig, alibi_slopes
from mpt_trt.model.sharding import Rank, query_heads, vocabulary_rows

ONLY_RANK = Rank(0, 1)
LAYERS = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


class Block(torch.nn.Module):
    """A rank's part of a layer; matrices are `[in_features, out_features]`."""

    def __init__(self, config: MptConfig, weights: dict[str, Tensor], cache_len: int, tp_size: int):
        super().__init__()
        self.heads, self.head_dim = config.num_heads // tp_size, config.head_dim
        self.epsilon, self.scale = config.layer_norm_epsilon, config.softmax_scale
        for name, value in weights.items():
            self.register_buffer(name, value)
        shape = (1, self.heads, cache_len, config.head_dim)
        self.register_buffer("keys", torch.zeros(shape, dtype=torch.float16, device="cuda"))
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float16, device="cuda"))

    def forward(self, hidden: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """The layer of a single rank."""
        hidden = hidden + self.attend(hidden, position, bias)
        return hidden + self.feed_forward(hidden)

    def add_and_attend(
        self, hidden: Tensor, total: Tensor, position: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual with the last sum over ranks, and this rank's part of the next one."""
        hidden = hidden + total
        return hidden, self.attend(hidden, position, bias)

    def add_and_feed_forward(self, hidden: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the feed-forward."""
        hidden = hidden + total
        return hidden, self.feed_forward(hidden)

    def attend(self, hidden: Tensor, position: Tensor, bias: Tensor) -> Tensor:
        """This rank's part of the attention's output."""
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
        return context.reshape(1, -1) @ self.dense

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """This rank's part of the feed-forward's output."""
        normed = functional.layer_norm(
            hidden, hidden.shape[-1:], self.post_attention_layernorm, None, self.epsilon
        )
        return functional.gelu(normed @ self.dense_h_to_4h) @ self.dense_4h_to_h


class Decoder:
    """A whole step, which updates token and position in place, so that it can be replayed."""

    def __init__(self, checkpoint: FtCheckpoint, cache_len: int, rank: Rank):
        config = self.config = checkpoint.config
        self.tp_size = rank.tp_size
        files = checkpoint.rank_files(rank)

        def read(name: str) -> Tensor:
            file = files[name]
            content = np.fromfile(checkpoint.folder / file.name, np.float16).reshape(file.shape)
            return torch.from_numpy(content).cuda()

        self.table, self.norm = read("wte"), read("final_layernorm.weight")
        rows = vocabulary_rows(config, rank)
        self.head = self.table[rows.start : rows.stop]
        self.parts = torch.empty(config.vocab_size, dtype=torch.float16, device="cuda")
        self.blocks = []
        for layer in range(config.num_layers):
            prefix = f"layers.{layer}"
            weights = {name.split(".")[-1]: read(f"{prefix}.{name}.weight") for name in LAYERS}
            for name in ("input_layernorm", "post_attention_layernorm"):
                weights[name] = read(f"{prefix}.{name}.weight")
            self.blocks.append(Block(config, weights, cache_len, rank.tp_size))
        self.positions = torch.arange(cache_len, device="cuda")
        heads = query_heads(config, rank)
        slopes = alibi_slopes(config.num_heads, config.alibi_bias_max)[heads.start : heads.stop]
        self.slopes = torch.tensor(slopes, device="cuda", dtype=torch.float32).view(1, -1, 1, 1)
        self.token = torch.full((1,), 100, device="cuda")
        self.position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def step(self) -> None:
        distance = (self.positions - self.position).float()
        bias = (self.slopes * distance).masked_fill(distance > 0, -torch.inf).half()
        hidden = self.table[self.token]
        hidden = self.layers(hidden, bias)
        hidden = functional.layer_norm(
            hidden, hidden.shape[-1:], self.norm, None, self.config.layer_norm_epsilon
        )
        logits = (hidden @ self.head.T).ravel()
        if self.tp_size > 1:
            distributed.all_gather_into_tensor(self.parts, logits)
            logits = self.parts
        self.token.copy_(logits.float().argmax(dim=-1, keepdim=True))
        self.position += 1

    def layers(self, hidden: Tensor, bias: Tensor) -> Tensor:
        if self.tp_size == 1:
            for block in self.blocks:
                hidden = block(hidden, self.position, bias)
            return hidden
        total = torch.zeros_like(hidden)
        for block in self.blocks:
            hidden, total = block.add_and_attend(hidden, total, self.position, bias)
            distributed.all_reduce(total)
            hidden, total = block.add_and_feed_forward(hidden, total)
            distributed.all_reduce(total)
        return hidden + total

    def compile(self) -> None:
        for block in self.blocks:
            block.compile(dynamic=False)
            block.add_and_attend = torch.compile(block.add_and_attend, dynamic=False)
            block.add_and_feed_forward = torch.compile(block.add_and_feed_forward, dynamic=False)


@torch.no_grad()
def decode_ms(
    checkpoint: FtCheckpoint, cache_len: int, steps: int, rank: Rank = ONLY_RANK
) -> dict[str, float]:
    """Measures milliseconds per token as a CUDA graph, with PyTorch's kernels and compiled ones.

    rank: this process's, in a job of mpirun on one host.
    """
    if rank.tp_size > 1:
        torch.cuda.set_device(rank.index)
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
        distributed.init_process_group("nccl", rank=rank.index, world_size=rank.tp_size)
    decoder = Decoder(checkpoint, cache_len, rank)
    found = {"graph": _replayed_ms(decoder, steps)}
    decoder.compile()
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
    # PyTorch's watchdog of NCCL makes calls in another thread.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        decoder.step()
    for _ in range(8):
        graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - started) / steps
