#!/usr/bin/env python3
"""Trains the small MPT that ships in resources/mpt-demo, and writes its whole folder.

Learns the sources and pydoc topics of a Python standard library. Writes the model as transformers
reads it (float16), heldout.txt, training.json (every figure), README.md (the model card, from the
same figures) and the library's licence. One seed fixes everything random; GPUs of different kinds
still round differently, so figures agree closely, not exactly.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import fnmatch
import functools
import hashlib
import json
import keyword
import logging
import math
import platform
import random
import re
import shutil
import sysconfig
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt.console import run_cli
from mpt_trt.errors import MptTrtError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import MptConfig, MptForCausalLM

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

HELD_BACK_BYTES = (1_000, 16_000)
HELD_BACK_TOPICS_SHARE = 0.3
MOST_SHARED_LINES = 0.2
SHORTEST_COUNTED_LINE = 30

SNIPPET_LINES = (2, 60)
MADE_UP_SHARE = 0.5
# So many renderings of the snippets, each with names of its own, lest the names be learnt by heart.
SNIPPET_VARIANTS = 16

FIRST_WINDOWS = 4
PROMPTS = ("def fibonacci", "def factorial", "def read_file", "def is_prime", "class Stack")
SAMPLE_TOKENS = 64
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")

log = logging.getLogger("train_demo_model")


@dataclass(frozen=True)
class Architecture:
    """The sizes. The rest is MPT's usual: no biases, exact GELU, ALiBi, tied embeddings."""

    hidden_size: int = 256
    num_heads: int = 4
    num_layers: int = 7
    vocab_size: int = 4096
    max_seq_len: int = 1024


@dataclass(frozen=True)
class Recipe:
    """How to train. Steps are the optimizer's; a batch is of windows of max_seq_len tokens."""

    steps: int = 20_000
    batch_size: int = 64
    snippet_windows: int = 16
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    warmup_steps: int = 300
    evaluate_every: int = 500
    seed: int = 0


# --- the corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """One file or one pydoc topic. name: path in the library, or `topics/NAME`."""

    name: str
    text: str

    @property
    def kind(self) -> str:
        """`topic`, `test` or `library`."""
        folders, file = Path(self.name).parts[:-1], Path(self.name).name
        if folders[:1] == ("topics",):
            return "topic"
        is_test = file.startswith("test_") or {"test", "tests", "idle_test"} & set(folders)
        return "test" if is_test else "library"

    @property
    def size(self) -> int:
        return len(self.text.encode())


Split = dict[str, list[Document]]


def read_corpus(stdlib: Path) -> list[Document]:
    """All usable documents below `stdlib`, sorted by name, exact duplicates dropped."""
    documents = read_topics(stdlib / TOPICS_FILE)
    for path in stdlib.rglob("*.py"):
        name = path.relative_to(stdlib).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXCLUDED_PATTERNS):
            text = read_source(path)
            documents += [Document(name, text)] if text else []
    by_name = sorted(documents, key=lambda document: document.name, reverse=True)
    return list({document.text: document for document in by_name}.values())[::-1]


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
    """Disjoint `training`, `validation` (to watch) and `heldout` (to report) documents.

    Held back are, in the stable order of a hash of their names, documents of a size that gives
    many of them, few of whose longer lines occur in others, and no tests: these resemble each
    other, and the figures are to speak of the library itself.
    """
    shares = shared_line_shares(documents)
    small, large = HELD_BACK_BYTES
    fit = [
        document
        for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest())
        if small <= document.size <= large
        and document.kind != "test"
        and shares[document.name] <= MOST_SHARED_LINES
    ]
    heldout = take(fit, heldout_bytes)
    validation = take([d for d in fit if d not in heldout], validation_bytes)
    if not heldout or not validation:
        raise MptTrtError(f"too few of {len(documents)} documents are fit: give a larger --stdlib")
    held_back = {document.name for document in heldout + validation}
    training = [document for document in documents if document.name not in held_back]
    return {"training": training, "validation": validation, "heldout": heldout}


def shared_line_shares(documents: list[Document]) -> dict[str, float]:
    """Per document name: the share of its distinct long lines that other documents hold too."""
    lines = {
        d.name: {line for line in d.text.splitlines() if len(line.strip()) >= SHORTEST_COUNTED_LINE}
        for d in documents
    }
    holders = Counter(line for own in lines.values() for line in own)
    return {
        name: sum(holders[line] > 1 for line in own) / max(1, len(own))
        for name, own in lines.items()
    }


def take(documents: list[Document], total_bytes: int) -> list[Document]:
    """The first documents of both kinds: sources up to their share of the bytes, then topics."""
    topics_bytes = round(total_bytes * HELD_BACK_TOPICS_SHARE)
    taken: list[Document] = []
    for kind, enough in (("library", total_bytes - topics_bytes), ("topic", topics_bytes)):
        sizes = 0
        for document in documents:
            if document.kind == kind and sizes < enough:
                taken.append(document)
                sizes += document.size
    return taken


# --- snippets of it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Snippet:
    """A definition on its own: the name that it defines, and its text around that name."""

    name: str
    parts: tuple[str, ...]


def snippets_of(document: Document) -> Iterator[Snippet]:
    """Functions that take arguments and, of the library, methods and small classes, undecorated.

    They are documents of their own in training. In a module a name has usually been seen before
    its definition; only here does the model learn what follows `def` and an unknown name.
    """
    lines = document.text.split("\n")
    shortest, longest = SNIPPET_LINES
    for parent in ast.walk(ast.parse(document.text if document.kind != "topic" else "")):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own = lines[node.lineno - 1 : node.end_lineno]
                fits = shortest <= len(own) <= longest
                text = standalone_text(node, parent, own, document.kind) if fits else None
                if text:
                    yield Snippet(node.name, tuple(re.split(rf"(?<![\w.]){node.name}\b", text)))


def standalone_text(node: ast.AST, parent: ast.AST, lines: list[str], kind: str) -> str | None:
    """The definition in `lines` as it would stand in a module; None if it is not wanted."""
    text = textwrap.dedent("\n".join(lines)) + "\n"
    match node:
        case ast.ClassDef() if kind == "library" and isinstance(parent, ast.Module):
            return text
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg="self"), *_])):
            return method_as_function(text, parent) if kind == "library" else None
        case ast.FunctionDef(args=ast.arguments(args=[ast.arg(arg=first), *_])):
            return text if text.startswith("def ") and first not in ("cls", "mcls") else None
    return None


def method_as_function(text: str, parent: ast.AST) -> str | None:
    """A method with its class's name for `self`; None if it makes no sense outside the class."""
    class_words = re.findall("[A-Z]?[a-z]+", getattr(parent, "name", ""))
    receiver = class_words[-1].lower() if class_words else "class"
    special = re.match(r"def (?!__)", text) is None or "super()" in text
    if special or keyword.iskeyword(receiver) or receiver in text:
        return None
    return re.sub(r"\bself\b", receiver, text)


def plain_words(documents: list[Document]) -> list[str]:
    """Words of prose and code, each at least three times in the documents."""
    counts = Counter(word for d in documents for word in re.findall(r"\b[a-z]{3,10}\b", d.text))
    return sorted(word for word, count in counts.items() if count >= 3)


def made_up_name(words: Sequence[str], draw: random.Random) -> str:
    """One to three words, or the beginnings or ends of words."""
    pieces = []
    for word in draw.choices(words, k=draw.randint(1, 3)):
        cut = draw.randint(1, len(word) - 2)
        pieces.append(draw.choice([word, word, word[: cut + 1], word[cut:]]))
    return draw.choice(["", "_"]).join(pieces)


def render(snippets: list[Snippet], words: Sequence[str], draw: random.Random) -> list[str]:
    """The snippets' texts, some under names that were made up, recursive calls included."""
    texts = []
    for snippet in snippets:
        name, text = made_up_name(words, draw), "".join(snippet.parts)
        if text.startswith("class "):
            name = name.title().replace("_", "")
        usable = not keyword.iskeyword(name) and name not in text
        if draw.random() >= MADE_UP_SHARE or not usable:
            name = snippet.name
        texts.append(name.join(snippet.parts))
    return texts


# --- the tokenizer ------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE, so that any text comes back exactly.

    It puts `<|endoftext|>`, id 0, before a text: every document in training begins with it, and
    without it the model takes a prompt for the middle of some document.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, END_OF_TEXT_ID)]
    )
    return tokenizer


def make_streams(tokenizer: Tokenizer, split: Split, seed: int) -> dict[str, Tensor]:
    """int64 [tokens] of each part of the corpus and of all renderings of the snippets.

    Before every text stands one `<|endoftext|>`.
    """
    import torch

    def to_stream(texts: Sequence[str]) -> Tensor:
        encodings = tokenizer.encode_batch(texts)
        return torch.tensor([token for encoding in encodings for token in encoding.ids])

    snippets = [snippet for document in split["training"] for snippet in snippets_of(document)]
    words, draw = plain_words(split["training"]), random.Random(seed)
    renderings = (render(snippets, words, draw) for _ in range(SNIPPET_VARIANTS))
    streams = {part: to_stream([d.text for d in documents]) for part, documents in split.items()}
    return streams | {"snippets": torch.cat([to_stream(texts) for texts in renderings])}


# --- the network --------------------------------------------------------------------------------
# Weights are float32 by name; those of the blocks are stacked, [num_layers, ...], so that an
# optimizer updates all blocks at once.

BLOCK_WEIGHTS = ("norm_1", "attn.Wqkv", "attn.out_proj", "norm_2", "ffn.up_proj", "ffn.down_proj")
ALIBI_BIAS_MAX = 8


def initial_weights(architecture: Architecture) -> dict[str, Tensor]:
    """GPT-2's scheme: what writes to the residual stream shrinks with the depth."""
    import torch

    layers, hidden = architecture.num_layers, architecture.hidden_size
    std, residual_std = 0.02, 0.02 / math.sqrt(2 * layers)
    return {
        "wte": torch.randn(architecture.vocab_size, hidden) * std,
        "norm_1": torch.ones(layers, hidden),
        "attn.Wqkv": torch.randn(layers, 3 * hidden, hidden) * std,
        "attn.out_proj": torch.randn(layers, hidden, hidden) * residual_std,
        "norm_2": torch.ones(layers, hidden),
        "ffn.up_proj": torch.randn(layers, 4 * hidden, hidden) * std,
        "ffn.down_proj": torch.randn(layers, hidden, 4 * hidden) * residual_std,
        "norm_f": torch.ones(hidden),
    }


def hf_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that transformers' MptForCausalLM gives them."""
    named = {f"transformer.{name}.weight": weights[name] for name in ("wte", "norm_f")}
    for name in BLOCK_WEIGHTS:
        for layer, weight in enumerate(weights[name]):
            named[f"transformer.blocks.{layer}.{name}.weight"] = weight
    return named


def compute_logits(
    weights: dict[str, Tensor], tokens: Tensor, num_heads: int, dropout: float = 0.0
) -> Tensor:
    """int64 [batch, length] -> [batch, length, vocab]."""
    import torch.nn.functional as F

    def norm(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(hidden, weight.shape, weight)

    hidden = F.dropout(F.embedding(tokens, weights["wte"]), dropout)
    for block in zip(*(weights[name].unbind() for name in BLOCK_WEIGHTS), strict=True):
        norm_1, qkv, out_proj, norm_2, up_proj, down_proj = block
        context = attention(F.linear(norm(hidden, norm_1), qkv), num_heads)
        hidden = hidden + F.dropout(F.linear(context, out_proj), dropout)
        inner = F.gelu(F.linear(norm(hidden, norm_2), up_proj))
        hidden = hidden + F.dropout(F.linear(inner, down_proj), dropout)
    return F.linear(norm(hidden, weights["norm_f"]), weights["wte"])


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """[batch, length, 3 * hidden] -> [batch, length, hidden]: causal, with ALiBi.

    A flash kernel takes no bias. ALiBi adds `-slope * (i - j)` to the score of query i and key j. A
    softmax ignores what is constant in j, so `slope * j` does the same, and that is a product: one
    more column in the query (slope) and in the key (j). Two columns in fact, j // 256 and j % 256,
    as each is then exact in bfloat16; and six of zeros, as head sizes are multiples of 8.
    """
    import torch
    import torch.nn.functional as F

    batch, length, width = qkv.shape
    head_dim = width // (3 * num_heads)
    per_head = qkv.view(batch, length, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = F.pad(per_head, (0, 8)).unbind()
    powers = torch.arange(1, num_heads + 1, device=qkv.device) * (ALIBI_BIAS_MAX / num_heads)
    # The kernel scales every product by 1 / sqrt(head_dim); this one must not be.
    slopes = torch.exp2(-powers)[:, None, None] * math.sqrt(head_dim)
    position = torch.arange(length, device=qkv.device)
    halves = torch.stack([position // 256 * 256, position % 256], dim=-1)
    query = query + F.pad(slopes.expand(-1, -1, 2), (head_dim, 6)).to(qkv.dtype)
    key = key + F.pad(halves, (head_dim, 6)).to(qkv.dtype)
    context = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=1 / math.sqrt(head_dim)
    )[..., :head_dim]
    return context.transpose(1, 2).reshape(batch, length, width // 3)


# --- training -----------------------------------------------------------------------------------


class MuonAndAdamW:
    """Muon (Keller Jordan, 2024) for the matrices of the blocks, AdamW for the other weights.

    The momentum of each matrix is made orthogonal and scaled to the size of AdamW's updates
    (Liu et al., 2025, arXiv 2502.16982), so that one learning rate serves both. torch.optim.Muon
    takes one matrix at a time, which for matrices this small takes half as long again.
    """

    MOMENTUM = 0.95
    ADAMW_UPDATE_SIZE = 0.2

    def __init__(self, weights: dict[str, Tensor], weight_decay: float) -> None:
        import torch

        self.weight_decay = weight_decay
        self.momenta = {w: torch.zeros_like(w) for w in weights.values() if w.ndim == 3}
        norms = [weight for name, weight in weights.items() if "norm" in name]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": [weights["wte"]]}]
        self.adamw = torch.optim.AdamW(
            groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """Updates every weight by its gradient, and forgets the gradient."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad()
        for matrix, momentum in self.momenta.items():
            momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
            update = orthogonalized(matrix.grad.lerp(momentum, self.MOMENTUM))
            size = self.ADAMW_UPDATE_SIZE * math.sqrt(max(matrix.shape[1:]))
            matrix.data.mul_(1 - learning_rate * self.weight_decay)
            matrix.data.add_(update, alpha=-learning_rate * size)
            matrix.grad = None


def orthogonalized(matrices: Tensor) -> Tensor:
    """[n, rows, columns] with all singular values near 1: five Newton-Schulz steps in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay. step counts from 1; only after the last is it zero."""
    rising = step / max(1, recipe.warmup_steps)
    falling = (recipe.steps + 1 - step) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * min(1.0, rising, falling)


def batches(streams: dict[str, Tensor], recipe: Recipe, length: int) -> Iterator[Tensor]:
    """Endless int64 [batch, length + 1]: windows of the corpus from anywhere, then of snippets.

    The latter begin as a prompt does: with the beginning of a document.
    """
    import torch

    corpus, snippets = streams["training"], streams["snippets"]
    beginnings = (snippets[:-length] == END_OF_TEXT_ID).nonzero()
    if len(corpus) <= length or not len(beginnings):
        raise MptTrtError(f"the corpus is too small for windows of {length} tokens")
    generator = torch.Generator(corpus.device).manual_seed(recipe.seed)
    within = torch.arange(length + 1, device=corpus.device)

    def choose(limit: int, count: int) -> Tensor:
        return torch.randint(limit, (count,), generator=generator, device=corpus.device)

    while True:
        starts = choose(len(corpus) - length, recipe.batch_size - recipe.snippet_windows)
        chosen = beginnings[choose(len(beginnings), recipe.snippet_windows)]
        yield torch.cat([corpus[starts[:, None] + within], snippets[chosen + within]])


def next_token_loss(
    weights: dict[str, Tensor], tokens: Tensor, num_heads: int, dropout: float
) -> Tensor:
    """Mean nats per token. tokens: int64 [batch, length + 1]."""
    import torch.nn.functional as F

    logits = compute_logits(weights, tokens[:, :-1], num_heads, dropout).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def mean_loss(logits_of: Callable[[Tensor], Tensor], stream: Tensor, length: int) -> float:
    """Nats per token: each token but the first once, in windows of `length` that do not overlap."""
    import torch
    import torch.nn.functional as F

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(stream) - 1, length):
            window = stream[start : start + length + 1]
            logits = logits_of(window[None, :-1])[0].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(stream) - 1)


def train(
    weights: dict[str, Tensor],
    streams: dict[str, Tensor],
    recipe: Recipe,
    architecture: Architecture,
) -> float:
    """Trains in place, on the device of the weights; returns the seconds that it took."""
    import torch

    heads, length = architecture.num_heads, architecture.max_seq_len
    device = weights["wte"].device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    loss_of = torch.compile(next_token_loss, disable=device != "cuda", dynamic=False)
    optimizer = MuonAndAdamW(weights, recipe.weight_decay)
    data, started, recent = batches(streams, recipe, length), time.monotonic(), []
    for step in range(1, recipe.steps + 1):
        with autocast:
            loss = loss_of(weights, next(data), heads, recipe.dropout)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step(learning_rate_at(step, recipe))
        recent.append(loss.detach())
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            with autocast:
                logits_of = functools.partial(compute_logits, weights, num_heads=heads)
                validation = mean_loss(logits_of, streams["validation"], length)
            seconds = time.monotonic() - started
            log.info(
                f"step {step:6d}/{recipe.steps}  training {sum(recent) / len(recent):.4f}  "
                f"validation {validation:.4f}  {seconds:.0f} s"
            )
            recent.clear()
    return time.monotonic() - started


# --- the folder ---------------------------------------------------------------------------------


def write_model(
    folder: Path, weights: dict[str, Tensor], architecture: Architecture, tokenizer: Tokenizer
) -> MptForCausalLM:
    """Writes what transformers loads, in float16; returns it as loaded, in float32.

    Raises MptTrtError where a weight leaves the range of float16.
    """
    import torch
    from transformers import MptForCausalLM

    model = MptForCausalLM(hf_config(architecture))
    model.load_state_dict(hf_weights(weights), strict=False)
    model.tie_weights()
    broken = [n for n, weight in model.half().named_parameters() if not weight.isfinite().all()]
    if broken:
        raise MptTrtError(f"not finite in float16: {', '.join(broken)}; lower --learning_rate")
    model.save_pretrained(folder)
    # safetensors makes files that only their owner may read.
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": architecture.max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{f"{kind}_token": END_OF_TEXT for kind in ("bos", "eos", "pad")},
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    return MptForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_config(architecture: Architecture) -> MptConfig:
    """The architecture as transformers knows it."""
    from transformers import MptConfig

    return MptConfig(
        d_model=architecture.hidden_size,
        n_heads=architecture.num_heads,
        n_layers=architecture.num_layers,
        vocab_size=architecture.vocab_size,
        max_seq_len=architecture.max_seq_len,
        tie_word_embeddings=True,
        **{f"{kind}_token_id": END_OF_TEXT_ID for kind in ("bos", "eos", "pad")},
    )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def greedy_samples(model: MptForCausalLM, tokenizer: Tokenizer) -> dict[str, str]:
    """Per prompt what transformers' greedy search continues it with, to an end of text at most."""
    import torch

    samples = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(SAMPLE_TOKENS, model.config.max_seq_len - ids.shape[1]),
        )
        samples[prompt] = tokenizer.decode(tokens[0, ids.shape[1] :].tolist())
    return samples


# --- figures and model card ---------------------------------------------------------------------


def joined(documents: list[Document]) -> str:
    """The documents as one text, as heldout.txt holds them."""
    return END_OF_TEXT.join(document.text for document in documents)


def describe_corpus(split: Split, streams: dict[str, Tensor]) -> dict:
    """Sizes and the texts' SHA-256, by which two corpora can be told apart."""
    parts = {
        part: {
            "documents": len(documents),
            "bytes": sum(document.size for document in documents),
            "tokens": len(streams[part]),
            "sha256": hashlib.sha256(joined(documents).encode()).hexdigest(),
        }
        for part, documents in split.items()
    }
    snippets = int((streams["snippets"] == END_OF_TEXT_ID).sum()) // SNIPPET_VARIANTS
    names = [document.name for document in split["heldout"]]
    return parts | {"snippets": snippets, "heldout_names": names}


def measure(model: MptForCausalLM, streams: dict[str, Tensor], heldout_bytes: int) -> dict:
    """Losses of the saved float16 weights, computed in float32 by transformers."""
    length, heldout = model.config.max_seq_len, streams["heldout"]
    measured = {
        "heldout": heldout,
        "heldout_first_windows": heldout[: FIRST_WINDOWS * length + 1],
        "validation": streams["validation"],
        # As much text as is held out, but seen in training: how much was learnt by heart.
        "training": streams["training"][: len(heldout)],
    }
    losses = {
        name: mean_loss(lambda tokens: model(tokens, use_cache=False).logits, stream, length)
        for name, stream in measured.items()
    }
    bits = losses["heldout"] * (len(heldout) - 1) / math.log(2)
    return {
        "nats_per_token": {name: round(loss, 5) for name, loss in losses.items()},
        "heldout_tokens": len(heldout) - 1,
        "heldout_perplexity": round(math.exp(losses["heldout"]), 4),
        "heldout_bits_per_byte": round(bits / heldout_bytes, 5),
    }


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
something real to work on: text that can be judged by eye, and a loss that gets worse when a
conversion does harm. It writes text with the look of Python; it does not program. It has seen one
code base, and repeats parts of it by heart.

| text | documents | bytes | tokens | nats per token |
|---|---|---|---|---|
{rows}

Losses of the saved float16 weights, computed in float32 by transformers, in windows of
{architecture[max_seq_len]} tokens that do not overlap; of the training part, of its beginning.
Held-out perplexity {quality[heldout_perplexity]:.3f}; {quality[heldout_bits_per_byte]:.4f} bits per
byte. `training.json` holds all figures and settings.

## Model

{architecture[num_layers]} blocks, hidden size {architecture[hidden_size]},
{architecture[num_heads]} heads, ALiBi, tied embeddings, {architecture[max_seq_len]} tokens of
context; {parameters:,} parameters. The tokenizer, a byte-level BPE of {architecture[vocab_size]},
puts `<|endoftext|>` (id 0) before a text, as every document in training began.

## Corpus

The sources of the standard library of Python {python_version} (its tests included) and the texts
of `pydoc_data.topics`; both Copyright Python Software Foundation, licensed under the PSF License
Version 2 (PSF-2.0, see `LICENSE.txt`), and so is this model. Left out: generated files, tables of
data, broken fixtures, duplicates.

Held back are library files and topics of 1 to 16 kB that share at most a fifth of their longer
lines with others, in the order of the SHA-256 of their names. (Their tests are in the training
part.) The held-out part, `heldout.txt`, had no say in any choice. It is {heldout_names}.

Of every {recipe[batch_size]} training windows, {recipe[snippet_windows]} hold snippets: the
{corpus[snippets]:,} functions, methods and small classes of the training part that make sense
alone, each a document of its own, half of them under names made up of words and parts of words,
so that the model knows what follows `def` and a name that it has never seen.

## Training

{recipe[steps]:,} steps of {recipe[batch_size]} windows: {passes:.0f} passes over the training part,
and the snippets. Muon for the matrices of the blocks, AdamW for the rest; learning rate
{recipe[learning_rate]:g}, {recipe[warmup_steps]} steps of warm-up, then linear decay to zero;
weight decay {recipe[weight_decay]:g}, dropout {recipe[dropout]:g}. It took
{seconds:.0f} s on one {hardware}. To make it again, with that Python or with
`--stdlib` naming its library: `python workflow_scripts/train_demo_model.py`

## Samples

Greedy search, {sample_tokens} tokens at most.

{joined_samples}
"""


def model_card(figures: dict) -> str:
    """README.md from the figures of training.json."""
    corpus, recipe, architecture = figures["corpus"], figures["recipe"], figures["architecture"]
    losses = figures["quality"]["nats_per_token"]
    rows = [
        "| {} | {documents:,} | {bytes:,} | {tokens:,} | {:.4f} |".format(
            part, losses[part], **corpus[part]
        )
        for part in losses.keys() & corpus.keys()
    ]
    windows = recipe["steps"] * (recipe["batch_size"] - recipe["snippet_windows"])
    samples = [f"```python\n{(p + text).rstrip()}\n```" for p, text in figures["samples"].items()]
    return CARD.format(
        **figures,
        rows="\n".join(sorted(rows)),
        heldout_names=", ".join(f"`{name}`" for name in corpus["heldout_names"]),
        passes=windows * architecture["max_seq_len"] / corpus["training"]["tokens"],
        sample_tokens=SAMPLE_TOKENS,
        joined_samples="\n\n".join(samples),
    )


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
    add("--python_version", default=platform.python_version(), help="whose library that is")
    add("--output", type=Path, default=output, help="model folder to write")
    add("--heldout_bytes", type=int, default=100_000, help="text held out for the figures")
    add("--validation_bytes", type=int, default=150_000, help="text held out for choices")
    for field in dataclasses.fields(Architecture) + dataclasses.fields(Recipe):
        add(f"--{field.name}", type=type(field.default), default=field.default, help=" ")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.output.exists() and not (arguments.output / "training.json").is_file():
        raise MptTrtError(f"{arguments.output}: holds something else; name a new folder")
    architecture, recipe = (
        kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})
        for kind in (Architecture, Recipe)
    )
    make_demo_model(arguments, architecture, recipe)


def make_demo_model(
    arguments: argparse.Namespace, architecture: Architecture, recipe: Recipe
) -> None:
    """The whole flow: corpus, tokenizer, training, model, figures and card."""
    import torch

    from mpt_trt.files import replace_directory

    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = read_corpus(arguments.stdlib)
    split = split_corpus(documents, arguments.heldout_bytes, arguments.validation_bytes)
    tokenizer = train_tokenizer([d.text for d in split["training"]], architecture.vocab_size)
    streams = make_streams(tokenizer, split, recipe.seed)
    streams = {name: stream.to(device) for name, stream in streams.items()}
    log.info("tokens: " + ", ".join(f"{name} {len(stream):,}" for name, stream in streams.items()))
    weights = {n: w.to(device).requires_grad_() for n, w in initial_weights(architecture).items()}
    seconds = train(weights, streams, recipe, architecture)
    with replace_directory(arguments.output) as folder:
        model = write_model(folder, weights, architecture, tokenizer).to(device)
        figures = {
            "python_version": arguments.python_version,
            "architecture": dataclasses.asdict(architecture),
            "parameters": sum(weight.numel() for weight in weights.values()),
            "corpus": describe_corpus(split, streams),
            "recipe": dataclasses.asdict(recipe),
            "seconds": round(seconds, 1),
            "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "packages": {name: version(name) for name in PACKAGES},
            "quality": measure(model, streams, len(joined(split["heldout"]).encode())),
            "samples": greedy_samples(model, tokenizer),
        }
        write_json(folder / "training.json", figures)
        (folder / "README.md").write_text(model_card(figures))
        (folder / "heldout.txt").write_bytes(joined(split["heldout"]).encode())
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(arguments.stdlib / "LICENSE.txt", folder / "LICENSE.txt")
    log.info(json.dumps({key: figures[key] for key in ("quality", "samples")}, indent=2))


if __name__ == "__main__":
    run_cli(main)
