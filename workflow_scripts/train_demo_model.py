"""Trains the small MPT that ships in resources/mpt-demo, and writes its whole folder.

Reads   the sources of a Python standard library (--stdlib) and its pydoc topics.
Writes  --output: config.json, generation_config.json, model.safetensors (float16),
        tokenizer.json, tokenizer_config.json, heldout.txt, training.json (every figure, for
        programs), README.md (the model card, from the same figures) and LICENSE.txt.

The folder appears in one rename, after transformers has loaded it and agreed on its loss. Runs
on a GPU (bfloat16, compiled) or, for a few steps, on a CPU. One seed fixes everything random;
two GPUs of different kinds still round differently, so figures agree closely, not exactly.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
TOPICS_FILE = "pydoc_data/topics.py"

# Generated files, tables of data, and fixtures that are broken on purpose. Paths in the library.
EXCLUDED_PATTERNS = (
    "site-packages/*", "dist-packages/*", "lib-dynload/*", "config-*", "*/__pycache__/*",
    "_sysconfigdata*", "__phello__*", "keyword.py", "token.py", "stringprep.py", "re/_casefix.py",
    "html/entities.py", TOPICS_FILE, "test/test_stable_abi_ctypes.py",
    "encodings/cp*.py", "encodings/iso8859_*.py", "encodings/mac_*.py", "encodings/koi8_*.py",
    "encodings/kz1048.py", "encodings/ptcp154.py", "encodings/tis_620.py",
    "encodings/hp_roman8.py", "encodings/palmos.py", "encodings/aliases.py",
    "lib2to3/tests/data/*", "test/bad*", "test/*/bad*", "test/encoded_modules/*",
)  # fmt: skip
# Of a file's non-blank characters, how many stand in words: code is above, number tables below.
LEAST_WORD_SHARE = 0.45

# Held-back documents are of a size that gives many of them, and are not copied from elsewhere.
HELD_BACK_BYTES = (1_000, 16_000)
HELD_BACK_TOPICS_SHARE = 0.3
MOST_SHARED_LINES = 0.2
SHORTEST_COUNTED_LINE = 30

LARGEST_LOSS_DIFFERENCE = 1e-3
FIRST_WINDOWS = 4
PROMPTS = ("def fibonacci", "def read_file", "class Stack:\n    def __init__(self")
SAMPLE_TOKENS = 64

log = logging.getLogger("train_demo_model")
Settings = TypeVar("Settings", "Architecture", "Recipe")


class DemoModelError(Exception):
    """The input cannot be used, or the result did not pass its check; the text says why."""


@dataclass(frozen=True)
class Architecture:
    """The MPT's sizes. Fixed for all: no biases, exact GELU, ALiBi, tied embeddings."""

    hidden_size: int
    num_heads: int
    num_layers: int
    vocab_size: int
    max_seq_len: int
    expansion_ratio: int = 4
    alibi_bias_max: int = 8
    layer_norm_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Recipe:
    """How to train. Lengths are in optimizer steps, batch_size in windows of max_seq_len."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    warmup_steps: int
    evaluate_every: int
    seed: int


# --- the corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One file or one pydoc topic. name: path in the library, or `topics/NAME`."""

    name: str
    text: str

    @property
    def is_topic(self) -> bool:
        return self.name.startswith("topics/")

    @property
    def is_test(self) -> bool:
        parts = Path(self.name).parts
        return bool({"test", "tests", "idle_test"} & set(parts)) or parts[-1].startswith("test_")

    @property
    def size(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Split:
    """Disjoint sets of documents. validation chooses settings; heldout is looked at once."""

    training: list[Document]
    validation: list[Document]
    heldout: list[Document]


def read_corpus(stdlib: Path) -> list[Document]:
    """All usable documents below `stdlib`, sorted by name, exact duplicates dropped."""
    paths = sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix())
    documents = []
    for path in paths:
        name = path.relative_to(stdlib).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED_PATTERNS):
            text = read_source(path)
            documents += [Document(name, text)] if text else []
    documents += read_topics(stdlib / TOPICS_FILE)
    by_text = {document.text: document for document in reversed(documents)}
    return sorted(by_text.values(), key=lambda document: document.name)


def read_source(path: Path) -> str | None:
    """The file's text; None if it is not UTF-8, not Python, empty, or a table of data."""
    try:
        text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        with warnings.catch_warnings(action="ignore"):
            ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    characters = len(re.sub(r"\s", "", text))
    in_words = sum(map(len, re.findall(r"[A-Za-z_]{2,}", text)))
    return text if characters and in_words / characters >= LEAST_WORD_SHARE else None


def read_topics(path: Path) -> list[Document]:
    """The dictionary `topics` of pydoc's data file, read as a literal: nothing is executed."""
    if not path.is_file():
        return []
    assignments = [n for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.Assign)]
    topics = ast.literal_eval(assignments[-1].value)
    return [Document(f"topics/{name}", text) for name, text in topics.items()]


def split_corpus(documents: list[Document], heldout_bytes: int, validation_bytes: int) -> Split:
    """Holds documents back in the order of a hash of their names, so that a split is stable.

    Only documents few of whose longer lines occur in others are held back, and no tests: test
    files resemble each other, and the figures are to speak of the library itself.
    """
    shares = shared_line_shares(documents)
    small, large = HELD_BACK_BYTES
    fit = [
        document
        for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
        if small <= document.size <= large
        and not document.is_test
        and shares[document.name] <= MOST_SHARED_LINES
    ]
    heldout = take_mixed(fit, heldout_bytes)
    validation = take_mixed([d for d in fit if d not in heldout], validation_bytes)
    if not heldout or not validation:
        raise DemoModelError(
            f"of {len(documents)} documents, {len(fit)} can be held back; "
            "two at least are needed: give a larger --stdlib"
        )
    held_back = {document.name for document in heldout + validation}
    return Split([d for d in documents if d.name not in held_back], validation, heldout)


def shared_line_shares(documents: list[Document]) -> dict[str, float]:
    """Per document name: the share of its distinct long lines that other documents hold too."""
    lines = {d.name: set(filter(is_counted_line, d.text.splitlines())) for d in documents}
    holders = Counter(line for own in lines.values() for line in own)
    return {
        name: sum(holders[line] > 1 for line in own) / max(1, len(own))
        for name, own in lines.items()
    }


def is_counted_line(line: str) -> bool:
    return len(line.strip()) >= SHORTEST_COUNTED_LINE


def take_mixed(documents: list[Document], total_bytes: int) -> list[Document]:
    """The first documents of both kinds: sources up to their share of the bytes, then topics."""
    topics_bytes = round(total_bytes * HELD_BACK_TOPICS_SHARE)
    sources = take([d for d in documents if not d.is_topic], total_bytes - topics_bytes)
    return sources + take([d for d in documents if d.is_topic], topics_bytes)


def take(documents: list[Document], total_bytes: int) -> list[Document]:
    """Documents from the front, until their sizes reach `total_bytes`."""
    taken: list[Document] = []
    for document in documents:
        if sum(d.size for d in taken) >= total_bytes:
            break
        taken.append(document)
    return taken


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts: two corpora are the same if this is."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.size}\0{document.text}".encode())
    return digest.hexdigest()


# --- the tokenizer ------------------------------------------------------------------------------


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, so that any text comes back exactly.

    It puts `<|endoftext|>`, id 0, before a text: every document in training begins with it, and
    without it the model takes a prompt for the middle of some document.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return tokenizer


def joined(documents: list[Document]) -> str:
    """The documents as one text, as heldout.txt holds them."""
    return END_OF_TEXT.join(document.text for document in documents)


def to_stream(tokenizer: Tokenizer, documents: list[Document]) -> Tensor:
    """int64 [tokens]: every document after one `<|endoftext|>`."""
    encodings = tokenizer.encode_batch([document.text for document in documents])
    return torch.tensor([token for encoding in encodings for token in encoding.ids])


# --- the network --------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with ALiBi, by a flash kernel that takes no bias.

    ALiBi adds `-slope * (i - j)` to the score of query i and key j. A softmax ignores what is
    constant in j, so `slope * j` does the same, and that is a product: one more column in the
    query (slope) and in the key (j). Two columns in fact, j // 256 and j % 256, because each is
    then exact in bfloat16. `EXTRA` columns keep the head size a multiple of 8.
    """

    EXTRA = 8

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
        """(query columns [1, heads, 1, EXTRA], key columns [1, 1, max_seq_len, EXTRA])."""
        heads, length = architecture.num_heads, architecture.max_seq_len
        exponents = torch.arange(1, heads + 1) * (architecture.alibi_bias_max / heads)
        slopes = torch.zeros(1, heads, 1, self.EXTRA)
        # The kernel scales every product by 1 / sqrt(head_dim); this one must not be.
        slopes[..., :2] = (2.0**-exponents * math.sqrt(self.head_dim)).view(1, heads, 1, 1)
        positions = torch.zeros(1, 1, length, self.EXTRA)
        positions[..., 0] = torch.arange(length) // 256 * 256
        positions[..., 1] = torch.arange(length) % 256
        return slopes, positions

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, length, hidden] -> the same."""
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
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        inner = architecture.expansion_ratio * architecture.hidden_size
        self.up_proj = nn.Linear(architecture.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, architecture.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden)))


class Block(nn.Module):
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
    """An MPT whose parameters have the names that transformers' MptForCausalLM gives them."""

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
        """GPT-2's scheme: what writes to the residual stream shrinks with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("out_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * num_layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, length] -> logits [batch, length, vocab]."""
        hidden = self.dropout(self.transformer["wte"](tokens))
        for block in self.transformer["blocks"]:
            hidden = block(hidden)
        hidden = self.transformer["norm_f"](hidden)
        return F.linear(hidden, self.transformer["wte"].weight)


# --- training -----------------------------------------------------------------------------------


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean nats per token. tokens: int64 [batch, length + 1]."""
    logits = model(tokens[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) for matrices, those of one shape together in batched products.

    The momentum of each matrix is made orthogonal and scaled to the size of AdamW's updates
    (Liu et al., 2025, arXiv 2502.16982), so that one learning rate serves both optimizers.
    torch.optim.Muon computes the same one matrix at a time; for matrices this small that made a
    whole training step half as long again.
    """

    MOMENTUM = 0.95
    ADAMW_UPDATE_SIZE = 0.2

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        groups = [{"params": [m for m in matrices if m.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
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
    """[n, rows, columns] with all singular values near 1: five Newton-Schulz steps in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def make_optimizers(model: DemoMpt, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms' weights."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    matrices = [p for p in model.transformer["blocks"].parameters() if p.ndim == 2]
    groups = [
        {"params": [model.transformer["wte"].weight], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(matrices, lr=rate, weight_decay=decay)]


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay. step counts from 1; only after the last is it zero."""
    rising = step / max(1, recipe.warmup_steps)
    falling = (recipe.steps + 1 - step) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * min(1.0, rising, falling)


def batches(stream: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless int64 [batch, length + 1]: every epoch cuts the stream anew and shuffles it."""
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(length + 1, device=stream.device)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, len(stream) - length, length)
        if not len(starts):
            raise DemoModelError(
                f"{len(stream)} training tokens are too few for windows of {length}"
            )
        starts = starts[torch.randperm(len(starts), generator=generator)]
        usable = len(starts) - len(starts) % batch_size or len(starts)
        for chosen in starts[:usable].to(stream.device).split(batch_size):
            yield stream[chosen[:, None] + within]


def mean_loss(logits_of: Callable[[Tensor], Tensor], stream: Tensor, length: int) -> float:
    """Nats per token: each token but the first once, in windows of `length` that do not overlap."""
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


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


@dataclass(frozen=True)
class TrainingResult:
    """The weights with the best validation loss (float32, on the CPU), and how it went."""

    weights: dict[str, Tensor]
    step: int
    training_loss: float
    validation_loss: float
    tokens_seen: int
    seconds: float


def train(
    model: DemoMpt, training: Tensor, validation: Tensor, recipe: Recipe, length: int
) -> TrainingResult:
    """Trains in place; streams are int64 [tokens] on the model's device."""
    device = training.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    compiled = device.type == "cuda"
    loss_of = torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss
    optimizers = make_optimizers(model, recipe)
    data = batches(training, length, recipe.batch_size, recipe.seed)
    best: TrainingResult | None = None
    seen, losses, started = 0, [], time.monotonic()
    for step in range(1, recipe.steps + 1):
        tokens = next(data)
        with autocast:
            loss = loss_of(model, tokens)
        update(model, loss, optimizers, learning_rate_at(step, recipe))
        losses.append(loss.detach())
        seen += tokens[:, 1:].numel()
        if step % recipe.evaluate_every and step < recipe.steps:
            continue
        with autocast, evaluation_mode(model):
            validation_loss = mean_loss(model, validation, length)
        training_loss = torch.stack(losses).mean().item()
        losses.clear()
        seconds = time.monotonic() - started
        log_progress(step, recipe.steps, training_loss, validation_loss, seen, seconds)
        if validation_loss < (best.validation_loss if best else math.inf):
            weights = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            best = TrainingResult(weights, step, training_loss, validation_loss, seen, seconds)
    if best is None:
        raise DemoModelError("the validation loss never was a number; lower --learning-rate")
    return dataclasses.replace(best, tokens_seen=seen, seconds=time.monotonic() - started)


def update(
    model: nn.Module, loss: Tensor, optimizers: list[torch.optim.Optimizer], learning_rate: float
) -> None:
    """One step of every optimizer, gradients clipped to norm 1."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def log_progress(
    step: int, steps: int, training: float, validation: float, seen: int, seconds: float
) -> None:
    left = seconds / step * (steps - step)
    log.info(
        f"step {step:6d}/{steps}  training {training:.4f}  validation {validation:.4f}  "
        f"{seen / seconds / 1e6:.2f} M tokens/s  {seconds:.0f} s, {left:.0f} s left"
    )


# --- the folder ---------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place if the block ends well."""
    if target.exists() and any(target.iterdir()) and not (target / "training.json").is_file():
        raise DemoModelError(f"{target}: holds something else; name a new folder as --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def hf_config(architecture: Architecture) -> dict:
    """config.json in the form transformers itself writes for an MPT."""
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": architecture.hidden_size,
        "n_heads": architecture.num_heads,
        "n_layers": architecture.num_layers,
        "expansion_ratio": architecture.expansion_ratio,
        "max_seq_len": architecture.max_seq_len,
        "vocab_size": architecture.vocab_size,
        "layer_norm_epsilon": architecture.layer_norm_epsilon,
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": architecture.alibi_bias_max,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": None,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "bos_token_id": END_OF_TEXT_ID,
        "eos_token_id": END_OF_TEXT_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": "float16",
        "torch_dtype": "float16",
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embedding_fraction": 1.0,
        "initializer_range": 0.02,
        "learned_pos_emb": False,
        "logit_scale": None,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def write_model(
    folder: Path, architecture: Architecture, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Everything that transformers loads. weights: float16."""
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files that only their owner may read.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "config.json", hf_config(architecture))
    special_ids = {f"{kind}_token_id": END_OF_TEXT_ID for kind in ("bos", "eos", "pad")}
    write_json(folder / "generation_config.json", special_ids)
    special_tokens = {f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad")}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": architecture.max_seq_len,
            "clean_up_tokenization_spaces": False,
            **special_tokens,
        },
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def to_float16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rounds to float16; raises DemoModelError where a value leaves its range."""
    rounded = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in rounded.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise DemoModelError(f"not finite in float16: {', '.join(broken)}")
    return rounded


def load_in_transformers(folder: Path) -> nn.Module:
    """MptForCausalLM in float32; raises DemoModelError unless every weight found its place."""
    model, report = transformers.MptForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: names for key, names in report.items() if names}
    if problems:
        raise DemoModelError(f"transformers does not load {folder}: {problems}")
    return model.eval()


@dataclass(frozen=True)
class Streams:
    """Token streams, int64 [tokens], on the training device."""

    training: Tensor
    validation: Tensor
    heldout: Tensor


def measured_losses(
    folder: Path, architecture: Architecture, weights: dict[str, Tensor], streams: Streams
) -> dict[str, float]:
    """Nats per token in float32 of the saved float16 weights, as transformers computes them.

    Raises DemoModelError if the network trained here computes another held-out loss.
    """
    device, length = streams.heldout.device, architecture.max_seq_len
    reference = load_in_transformers(folder).to(device)

    def logits_of(tokens: Tensor) -> Tensor:
        return reference(tokens, use_cache=False).logits

    heldout = mean_loss(logits_of, streams.heldout, length)
    own = DemoMpt(architecture, dropout=0.0).eval()
    own.load_state_dict(weights)
    own_heldout = mean_loss(own.to(device), streams.heldout, length)
    log.info(f"held-out loss {own_heldout:.5f} here, {heldout:.5f} in transformers")
    if not abs(own_heldout - heldout) < LARGEST_LOSS_DIFFERENCE:
        raise DemoModelError(f"held-out loss {own_heldout} here but {heldout} in transformers")
    # As much training text as there is held-out text says how much was learnt by heart.
    seen_before = streams.training[: len(streams.heldout)]
    return {
        "heldout": heldout,
        "heldout_first_windows": mean_loss(
            logits_of, streams.heldout[: FIRST_WINDOWS * length + 1], length
        ),
        "validation": mean_loss(logits_of, streams.validation, length),
        "training_text": mean_loss(logits_of, seen_before, length),
    }


def greedy_samples(folder: Path, tokenizer: Tokenizer, device: torch.device) -> dict[str, str]:
    """Per prompt what transformers' greedy search continues it with, in float32."""
    model = load_in_transformers(folder).to(device)
    max_seq_len = model.config.max_seq_len
    samples = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(SAMPLE_TOKENS, max_seq_len - ids.shape[1]),
        )
        samples[prompt] = tokenizer.decode(tokens[0, ids.shape[1] :].tolist())
    return samples


# --- figures and model card ---------------------------------------------------------------------


def describe_part(documents: list[Document], tokens: int) -> dict:
    return {
        "documents": len(documents),
        "bytes": sum(document.size for document in documents),
        "tokens": tokens,
        "sha256": fingerprint(documents),
    }


def describe_corpus(split: Split, streams: Streams, python_version: str) -> dict:
    return {
        "python_version": python_version,
        "training": describe_part(split.training, len(streams.training)),
        "validation": describe_part(split.validation, len(streams.validation)),
        "heldout": describe_part(split.heldout, len(streams.heldout))
        | {"names": [document.name for document in split.heldout]},
    }


def describe_training(recipe: Recipe, result: TrainingResult, device: torch.device) -> dict:
    return {
        "recipe": dataclasses.asdict(recipe),
        "best_step": result.step,
        "tokens_seen": result.tokens_seen,
        "seconds": round(result.seconds, 1),
        "hardware": hardware_name(device),
        "loss": round(result.training_loss, 5),
        "python": platform.python_version(),
        "packages": {
            module.__name__: module.__version__
            for module in (torch, transformers, tokenizers, safetensors)
        },
    }


def describe_quality(losses: dict[str, float], split: Split, streams: Streams) -> dict:
    """All figures are of the saved float16 weights, computed in float32 by transformers."""
    tokens = len(streams.heldout) - 1
    text_bytes = len(joined(split.heldout).encode())
    nats_per_byte = losses["heldout"] * tokens / text_bytes
    return {
        "heldout": {
            "predicted_tokens": tokens,
            "bytes": text_bytes,
            "nats_per_token": round(losses["heldout"], 5),
            "perplexity": round(math.exp(losses["heldout"]), 4),
            "nats_per_byte": round(nats_per_byte, 5),
            "bits_per_byte": round(nats_per_byte / math.log(2), 5),
            "first_windows": {
                "windows": FIRST_WINDOWS,
                "nats_per_token": round(losses["heldout_first_windows"], 5),
            },
        },
        "validation": {"nats_per_token": round(losses["validation"], 5)},
        "training_text": {"nats_per_token": round(losses["training_text"], 5)},
    }


def hardware_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, bfloat16"
    return f"{os.cpu_count()} {platform.machine()} CPU cores, float32"


CARD = """\
---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
library_name: transformers
pipeline_tag: text-generation
tags: [mpt, python, code]
---
# mpt-demo

A small MPT, trained on the Python standard library, so that a workflow for MPT checkpoints has
something real to work on: text that can be judged by eye, and a quality figure that gets worse
when a conversion or a quantization does harm.

## Figures

Of the saved float16 weights, computed in float32 by transformers, in windows of {max_seq_len}
tokens that do not overlap. `training.json` holds them for programs.

| text | nats per token |
|---|---|
| held-out (`heldout.txt`) | **{heldout:.4f}** |
| validation (chose the checkpoint) | {validation:.4f} |
| training, its first {heldout_tokens:,} tokens | {training_text:.4f} |

Held-out perplexity {perplexity:.3f} per token; {nats_per_byte:.4f} nats or {bits_per_byte:.4f}
bits per byte.

## Architecture

MPT as in `transformers` (`MptForCausalLM`): {num_layers} blocks, hidden size {hidden_size},
{num_heads} heads, feed-forward {inner_size} with exact GELU, ALiBi (bias max {alibi_bias_max}), no
biases, tied embeddings, {max_seq_len} tokens of context, {parameters:,} parameters in float16. The
tokenizer is a byte-level BPE of {vocab_size}. It puts `<|endoftext|>` (id 0) before a text, with
which every document in training began; without it the model takes a prompt for the middle of some
document.

## Corpus

The sources of the standard library of Python {python_version} (its tests included) and the texts
of `pydoc_data.topics`; both Copyright Python Software Foundation, licensed under the PSF License
Version 2 (PSF-2.0, see `LICENSE.txt`), and so is this model. Left out: generated files and tables
of data (character maps above all), fixtures that are broken on purpose, files that are not UTF-8
or do not parse, exact duplicates.

| part | documents | bytes | tokens |
|---|---|---|---|
{corpus_rows}

Whole documents are held back, in the order of the SHA-256 of their names: library files and
topics of 1 to 16 kB, no tests, none of which more than a fifth of the longer lines occur in another
document. (The tests of held-out modules are in the training part.) The checkpoint, and in short
trials the optimizer and the learning rate, were chosen by the validation part; the held-out part
had no say. Held out: {heldout_names}.

## Training

{steps:,} steps of {batch_size} windows of {max_seq_len} tokens: {tokens_seen:,} tokens, or
{epochs:.0f} passes over the corpus. Muon for the matrices of the blocks, AdamW for the rest;
learning rate {learning_rate:g} with {warmup_steps} steps of warm-up and linear decay to zero,
weight decay {weight_decay:g}, dropout {dropout:g}, seed {seed}. It took {seconds:.0f} s on
{hardware}. The checkpoint of step {best_step:,}, which had the best validation loss, was kept;
the training loss over the {evaluate_every} steps before it, with dropout, was {training_loss:.4f}.

To make it again (with Python {python_version}, or `--stdlib` naming its library):

```
{command}
```

## Samples

Greedy search, {sample_tokens} tokens.

{samples}

## Intended use and limits

For demonstrations, tests and comparisons of conversions, where a small model that behaves like a
real one is needed. It writes text with the look of Python; it does not program, and greedy search
soon repeats itself, as it does with any model of this size. It has seen one code base, its names
and its habits (unit tests above all), and repeats parts of it by heart. A name that the library
does not contain it often takes for the beginning of a longer one. Use it for nothing that matters.
"""


def model_card(figures: dict, command: str) -> str:
    """README.md from the figures of training.json."""
    corpus, training, quality = figures["corpus"], figures["training"], figures["quality"]
    recipe, architecture = training["recipe"], figures["architecture"]
    rows = [
        f"| {part} | {corpus[part]['documents']:,} | {corpus[part]['bytes']:,} "
        f"| {corpus[part]['tokens']:,} |"
        for part in ("training", "validation", "heldout")
    ]
    samples = [f"```python\n{text.rstrip()}\n```" for text in full_samples(figures["samples"])]
    heldout = quality["heldout"]
    return CARD.format(
        **architecture,
        **recipe,
        heldout=heldout["nats_per_token"],
        heldout_tokens=heldout["predicted_tokens"],
        perplexity=heldout["perplexity"],
        nats_per_byte=heldout["nats_per_byte"],
        bits_per_byte=heldout["bits_per_byte"],
        validation=quality["validation"]["nats_per_token"],
        training_text=quality["training_text"]["nats_per_token"],
        inner_size=architecture["expansion_ratio"] * architecture["hidden_size"],
        parameters=figures["parameters"],
        python_version=corpus["python_version"],
        corpus_rows="\n".join(rows),
        heldout_names=", ".join(f"`{name}`" for name in corpus["heldout"]["names"]),
        tokens_seen=training["tokens_seen"],
        epochs=training["tokens_seen"] / corpus["training"]["tokens"],
        best_step=training["best_step"],
        seconds=training["seconds"],
        hardware=training["hardware"],
        training_loss=training["loss"],
        command=command,
        sample_tokens=SAMPLE_TOKENS,
        samples="\n\n".join(samples),
    )


def full_samples(samples: dict[str, str]) -> list[str]:
    return [prompt + continuation for prompt, continuation in samples.items()]


# --- the command line ---------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    output = Path(__file__).resolve().parent.parent / "resources" / "mpt-demo"
    add("--stdlib", type=Path, default=stdlib, help="folder of the standard library to learn")
    add("--python-version", default=platform.python_version(), help="whose library that is")
    add("--output", type=Path, default=output, help="model folder to write")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--heldout-bytes", type=int, default=100_000, help="text held out for the figures")
    add("--validation-bytes", type=int, default=150_000, help="text held out for choices")
    add("--hidden-size", type=int, default=256)
    add("--num-heads", type=int, default=4)
    add("--num-layers", type=int, default=7)
    add("--vocab-size", type=int, default=4096)
    add("--max-seq-len", type=int, default=1024)
    add("--steps", type=int, default=19_750, help="optimizer steps")
    add("--batch-size", type=int, default=64, help="windows of max-seq-len tokens a step")
    add("--learning-rate", type=float, default=6e-3, help="at its peak")
    add("--weight-decay", type=float, default=0.1)
    add("--dropout", type=float, default=0.2)
    add("--warmup-steps", type=int, default=300)
    add("--evaluate-every", type=int, default=250, help="steps between validation losses")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def from_arguments(kind: type[Settings], arguments: argparse.Namespace) -> Settings:
    """The dataclass `kind` from the options named like its fields."""
    names = [field.name for field in dataclasses.fields(kind) if hasattr(arguments, field.name)]
    return kind(**{name: getattr(arguments, name) for name in names})


def remake_command(recipe: Recipe) -> str:
    options = [f"--{k.replace('_', '-')} {v}" for k, v in dataclasses.asdict(recipe).items()]
    return " \\\n    ".join(["python workflow_scripts/train_demo_model.py", *options])


def make_demo_model(arguments: argparse.Namespace) -> None:
    """The whole flow: corpus, tokenizer, training, checked folder, figures and card."""
    architecture = from_arguments(Architecture, arguments)
    recipe = from_arguments(Recipe, arguments)
    device = torch.device(arguments.device)
    torch.manual_seed(recipe.seed)
    split = split_corpus(
        read_corpus(arguments.stdlib), arguments.heldout_bytes, arguments.validation_bytes
    )
    tokenizer = train_tokenizer(split.training, architecture.vocab_size)
    streams = make_streams(tokenizer, split, device)
    model = DemoMpt(architecture, recipe.dropout).to(device)
    result = train(model, streams.training, streams.validation, recipe, architecture.max_seq_len)
    weights = to_float16(result.weights)
    with replaced_folder(arguments.output) as folder:
        write_model(folder, architecture, weights, tokenizer)
        losses = measured_losses(folder, architecture, weights, streams)
        figures = {
            "architecture": dataclasses.asdict(architecture),
            "parameters": sum(tensor.numel() for tensor in weights.values()),
            "corpus": describe_corpus(split, streams, arguments.python_version),
            "training": describe_training(recipe, result, device),
            "quality": describe_quality(losses, split, streams),
            "samples": greedy_samples(folder, tokenizer, device),
        }
        write_json(folder / "training.json", figures)
        write_texts(folder, split, model_card(figures, remake_command(recipe)), arguments.stdlib)
    log.info(json.dumps(figures["quality"] | {"samples": figures["samples"]}, indent=2))
    log.info(f"wrote {arguments.output}")


def make_streams(tokenizer: Tokenizer, split: Split, device: torch.device) -> Streams:
    parts = {"training": split.training, "validation": split.validation, "heldout": split.heldout}
    streams = {name: to_stream(tokenizer, part).to(device) for name, part in parts.items()}
    for name, stream in streams.items():
        log.info(f"{name}: {len(parts[name])} documents, {len(stream)} tokens")
    return Streams(**streams)


def write_texts(folder: Path, split: Split, card: str, stdlib: Path) -> None:
    """heldout.txt, README.md and, where the library brings it, its licence."""
    (folder / "heldout.txt").write_bytes(joined(split.heldout).encode())
    (folder / "README.md").write_text(card, encoding="utf-8")
    license_file = stdlib / "LICENSE.txt"
    if license_file.is_file():
        shutil.copyfile(license_file, folder / "LICENSE.txt")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make_demo_model(parse_arguments())
    except DemoModelError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
