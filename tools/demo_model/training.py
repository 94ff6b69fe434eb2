"""The network of the demo model and its training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpt_trt.errors import MptTrtError
from tools.demo_model.recipe import Architecture, Recipe

log = logging.getLogger(__name__)


class Attention(nn.Module):
    """Causal self-attention with ALiBi, with a flash kernel that does not support a bias.

    ALiBi adds `-slope * (i - j)` to the score of query i and key j. A softmax ignores terms that
    are constant in j, so `slope * j` has the same effect. It is a product of additional columns of
    the query (slope) and of the key (j). There are two such columns, j // 256 and j % 256, because
    each is exact in bfloat16. `EXTRA` columns keep the head size a multiple of 8.
    """

    EXTRA = 8
    slopes: Tensor
    positions: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.num_heads, self.head_dim = architecture.num_heads, architecture.head_dim
        hidden_size = architecture.hidden_size
        self.Wqkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        slopes, positions = self.alibi_columns(architecture)
        self.register_buffer("slopes", slopes, persistent=False)
        self.register_buffer("positions", positions, persistent=False)

    def alibi_columns(self, architecture: Architecture) -> tuple[Tensor, Tensor]:
        """Makes query columns [1, heads, 1, EXTRA] and key columns [1, 1, max_seq_len, EXTRA]."""
        heads, length = architecture.num_heads, architecture.max_seq_len
        exponents = torch.arange(1, heads + 1) * (architecture.alibi_bias_max / heads)
        slopes = torch.zeros(1, heads, 1, self.EXTRA)
        # Compensates for the kernel's scale of 1 / sqrt(head_dim).
        slopes[..., :2] = (2.0**-exponents * math.sqrt(self.head_dim)).view(1, heads, 1, 1)
        positions = torch.zeros(1, 1, length, self.EXTRA)
        positions[..., 0] = torch.arange(length) // 256 * 256
        positions[..., 1] = torch.arange(length) % 256
        return slopes, positions

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps [batch, length, hidden] to the same shape."""
        batch, length, hidden_size = hidden.shape
        qkv = self.Wqkv(hidden).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        slopes = self.slopes.to(query.dtype).expand(batch, -1, length, -1)
        positions = self.positions[:, :, :length].to(query.dtype)
        positions = positions.expand(batch, self.num_heads, -1, -1)
        context = F.scaled_dot_product_attention(
            torch.cat([query, slopes], dim=-1),
            torch.cat([key, positions], dim=-1),
            F.pad(value, (0, self.EXTRA)),
            is_causal=True,
            scale=1 / math.sqrt(self.head_dim),
        )[..., : self.head_dim]
        return self.out_proj(context.transpose(1, 2).reshape(batch, length, hidden_size))


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        inner = architecture.expansion_ratio * architecture.hidden_size
        self.up_proj = nn.Linear(architecture.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, architecture.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden)))


class Block(nn.Module):
    """A block: attention and feed-forward, each after a norm and with a residual connection."""

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        size, epsilon = architecture.hidden_size, architecture.layer_norm_epsilon
        self.norm_1 = nn.LayerNorm(size, eps=epsilon, bias=False)
        self.attn = Attention(architecture)
        self.norm_2 = nn.LayerNorm(size, eps=epsilon, bias=False)
        self.ffn = FeedForward(architecture)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attn(self.norm_1(hidden)))
        return hidden + self.dropout(self.ffn(self.norm_2(hidden)))


class DemoMpt(nn.Module):
    """An MPT whose parameters have the names of transformers' MptForCausalLM."""

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        blocks = [Block(architecture, dropout) for _ in range(architecture.num_layers)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(architecture.vocab_size, architecture.hidden_size),
                "blocks": nn.ModuleList(blocks),
                "norm_f": nn.LayerNorm(
                    architecture.hidden_size, eps=architecture.layer_norm_epsilon, bias=False
                ),
            }
        )
        self.dropout = nn.Dropout(dropout)
        self.initialize(architecture.num_layers)

    def initialize(self, num_layers: int) -> None:
        """Initializes like GPT-2: weights before the residual stream shrink with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * num_layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens int64 [batch, length] to logits [batch, length, vocab]."""
        hidden = self.dropout(self.transformer["wte"](tokens))
        for block in cast(nn.ModuleList, self.transformer["blocks"]):
            hidden = block(hidden)
        hidden = self.transformer["norm_f"](hidden)
        return F.linear(hidden, cast(nn.Embedding, self.transformer["wte"]).weight)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Computes mean nats per token. tokens: int64 [batch, length + 1]."""
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) for matrices, with batched products for matrices of one shape.

    The momentum of each matrix is made orthogonal and scaled to the size of AdamW's updates (Liu et
    al., 2025, arXiv 2502.16982), so that one learning rate serves both optimizers. torch.optim.Muon
    computes the same for one matrix at a time, which made training steps of such small matrices 1.5
    times as long.
    """

    MOMENTUM = 0.95
    ADAMW_UPDATE_SIZE = 0.2

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        groups = [{"params": [m for m in matrices if m.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices, lr = group["params"], group["lr"]
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            momentum = state.setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - self.MOMENTUM)
            updates = orthogonalized(gradients.lerp(momentum, self.MOMENTUM))
            scale = lr * self.ADAMW_UPDATE_SIZE * math.sqrt(max(gradients.shape[1:]))
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Moves all singular values near 1 with five Newton-Schulz steps in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def make_optimizers(model: DemoMpt, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Makes Muon for the blocks' matrices, and AdamW for the embedding and the norms' weights."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    matrices = [p for p in model.transformer["blocks"].parameters() if p.ndim == 2]
    groups = [
        {"params": [model.transformer["wte"].weight], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(matrices, lr=rate, weight_decay=decay)]


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Computes linear warm-up, then linear decay to zero after the last step. step: from 1."""
    rising = step / max(1, recipe.warmup_steps)
    falling = (recipe.steps + 1 - step) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * min(1.0, rising, falling)


def batches(stream: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields int64 [batch, length + 1] endlessly; each epoch cuts and shuffles anew."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(length + 1, device=stream.device)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        if not len(starts):
            raise MptTrtError(f"{len(stream)} training tokens are too few for windows of {length}")
        starts = starts[torch.randperm(len(starts), generator=generator)]
        usable = len(starts) - len(starts) % batch_size or len(starts)
        for chosen in starts[:usable].to(stream.device).split(batch_size):
            yield stream[chosen[:, None] + within]


def mixed_batches(streams: dict[str, Tensor], recipe: Recipe, length: int) -> Iterator[Tensor]:
    """Yields batches of the corpus whose last `snippet_windows` start with a snippet."""
    size = recipe.batch_size - recipe.snippet_windows
    corpus = batches(streams["training"], length, size, recipe.seed)
    if not recipe.snippet_windows:
        yield from corpus
    snippets = streams["snippets"]
    beginnings = (snippets[:-length] == 0).nonzero()
    if not len(beginnings):
        raise MptTrtError(f"too few snippets for windows of {length} tokens")
    generator = torch.Generator(snippets.device).manual_seed(recipe.seed)
    within, shape = torch.arange(length + 1, device=snippets.device), (recipe.snippet_windows,)
    for batch in corpus:
        chosen = torch.randint(len(beginnings), shape, generator=generator, device=snippets.device)
        yield torch.cat([batch, snippets[beginnings[chosen] + within]])


def mean_loss(logits_of: Callable[[Tensor], Tensor], stream: Tensor, length: int) -> float:
    """Computes nats per token over all tokens except the first, in windows without overlap."""
    full = (len(stream) - 1) // length
    pieces = list(stream.unfold(0, length + 1, length).split(16)) if full else []
    rest = stream[full * length :]
    pieces += [rest[None]] if len(rest) > 1 else []
    total = 0.0
    with torch.no_grad():
        for piece in pieces:
            logits = logits_of(piece[:, :-1]).float()
            targets = piece[:, 1:].flatten()
            total += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return total / (len(stream) - 1)


def train(model: DemoMpt, streams: dict[str, Tensor], recipe: Recipe, length: int) -> float:
    """Trains in place; returns the seconds that it took.

    Streams are int64 [tokens] on the model's device. Raises MptTrtError when the loss is NaN.
    """
    device = streams["training"].device.type
    # cuDNN's backward pass gives NaN if a query's scores are far below zero (PyTorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    loss_of = torch.compile(next_token_loss, dynamic=False, disable=device != "cuda")
    optimizers = make_optimizers(model, recipe)
    data = mixed_batches(streams, recipe, length)
    losses, started = [], time.monotonic()
    for step in range(1, recipe.steps + 1):
        with autocast:
            loss = loss_of(model, next(data))
        update(model, loss, optimizers, learning_rate_at(step, recipe))
        losses.append(loss.detach())
        if step % recipe.evaluate_every and step < recipe.steps:
            continue
        model.eval()
        with autocast:
            validation_loss = mean_loss(model, streams["validation"], length)
        model.train()
        seconds = time.monotonic() - started
        log.info(
            f"step {step:6d}/{recipe.steps}  training {torch.stack(losses).mean().item():.4f}  "
            f"validation {validation_loss:.4f}  {seconds:.0f} s"
        )
        losses.clear()
        if not math.isfinite(validation_loss):
            raise MptTrtError("the loss is no longer a number; lower --learning_rate")
    return time.monotonic() - started


def update(
    model: nn.Module, loss: Tensor, optimizers: list[torch.optim.Optimizer], learning_rate: float
) -> None:
    """Makes one step of every optimizer, with gradients clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
