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
import hashlib
import json
import logging
import math
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mpt_trt.cli.console import run_cli
from mpt_trt.errors import MptTrtError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import MptForCausalLM

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
HELDOUT_BYTES, VALIDATION_BYTES = 100_000, 150_000
HELD_BACK_TOPICS_SHARE = 0.3
MOST_SHARED_LINES = 0.2
SHORTEST_COUNTED_LINE = 30

FIRST_WINDOWS = 4
PROMPTS = ("def fibonacci", "def factorial", "def read_file", "def is_prime", "class Stack")
SAMPLE_TOKENS = 64
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")

log = logging.getLogger("train_demo_model")


@dataclass(frozen=True)
class Architecture:
    """The MPT's sizes. Fixed for all: no biases, exact GELU, ALiBi, tied embeddings."""

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
    """How to train. Steps are the optimizer's; a batch is of windows of max_seq_len tokens."""

    steps: int = 19_750
    batch_size: int = 64
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    dropout: float = 0.2
    warmup_steps: int = 300
    evaluate_every: int = 250
    snippet_windows: int = 0
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


def make_streams(tokenizer: Tokenizer, split: Split, recipe: Recipe) -> dict[str, Tensor]:
    """Each part, and the snippets if wanted, as int64 [tokens]: texts after one `<|endoftext|>`."""
    import torch

    from tools.demo_model.snippets import snippet_texts

    texts = {part: [document.text for document in documents] for part, documents in split.items()}
    if recipe.snippet_windows:
        texts["snippets"] = snippet_texts(split["training"], recipe.seed)

    def to_stream(texts: list[str]) -> Tensor:
        encodings = tokenizer.encode_batch(texts)
        return torch.tensor([token for encoding in encodings for token in encoding.ids])

    return {part: to_stream(texts) for part, texts in texts.items()}


# --- the folder ---------------------------------------------------------------------------------


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
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
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


def to_float16(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rounds to float16; raises MptTrtError where a value leaves its range."""
    rounded = {name: tensor.half().cpu().contiguous() for name, tensor in weights.items()}
    broken = [name for name, tensor in rounded.items() if not tensor.isfinite().all()]
    if broken:
        raise MptTrtError(f"not finite in float16: {', '.join(broken)}")
    return rounded


def load_in_transformers(folder: Path) -> MptForCausalLM:
    """MptForCausalLM in float32; raises MptTrtError unless every weight found its place."""
    import torch
    from transformers import MptForCausalLM

    model, report = MptForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: names for key, names in report.items() if names}
    if problems:
        raise MptTrtError(f"transformers does not load {folder}: {problems}")
    return model.eval()


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
    return parts | {"heldout_names": [document.name for document in split["heldout"]]}


def measure(model: MptForCausalLM, streams: dict[str, Tensor], heldout_bytes: int) -> dict:
    """Losses of the saved float16 weights, computed in float32 by transformers."""
    from tools.demo_model.training import mean_loss

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
    return describe_quality(losses, len(heldout) - 1, heldout_bytes)


def describe_quality(losses: dict[str, float], heldout_tokens: int, heldout_bytes: int) -> dict:
    bits = losses["heldout"] * heldout_tokens / math.log(2)
    return {
        "nats_per_token": {name: round(loss, 5) for name, loss in losses.items()},
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
part.) Optimizer and learning rate were chosen by the validation part; the held-out part,
`heldout.txt`, had no say in any choice. It is {heldout_names}.

## Training

Muon for the matrices of the blocks, AdamW for the rest; warm-up, then linear decay to zero.
Trained on one {hardware}.

{joined_stages}

Snippets are the functions, methods and small classes of the training part that make sense alone,
each a document of its own, half of them under names made up of words and parts of words, so that
the model knows what follows `def` and a name that it has never seen.

To make it again, with that Python or with `--stdlib` naming its library:

{commands}

## Samples

Greedy search, {sample_tokens} tokens at most.

{joined_samples}
"""


STAGE = """\
{recipe[steps]:,} steps of {recipe[batch_size]} windows, {recipe[snippet_windows]} of them
   of snippets; learning rate {recipe[learning_rate]:g} after {recipe[warmup_steps]} of warm-up,
   weight decay {recipe[weight_decay]:g}, dropout {recipe[dropout]:g}; {seconds:.0f} s;
   then {heldout:.4f} nats per held-out token."""


def stage_commands(stages: list[dict]) -> list[str]:
    """One command per stage. Each but the last writes the folder that the next begins with."""
    commands = []
    for number, stage in enumerate(stages, 1):
        options = {
            "initial": f"stage{number - 1}" if number > 1 else None,
            "output": f"stage{number}" if number < len(stages) else None,
        }
        options |= dataclasses.asdict(Recipe(**stage["recipe"]))
        usual = dataclasses.asdict(Recipe())
        given = [f"--{k} {v}" for k, v in options.items() if v != usual.get(k)]
        commands.append(" ".join(["python tools/demo_model/train.py", *given]))
    return commands


def model_card(figures: dict) -> str:
    """README.md from the figures of training.json."""
    corpus, stages = figures["corpus"], figures["stages"]
    losses = figures["quality"]["nats_per_token"]
    rows = [
        "| {} | {documents:,} | {bytes:,} | {tokens:,} | {:.4f} |".format(
            part, losses[part], **corpus[part]
        )
        for part in ("training", "validation", "heldout")
    ]
    samples = [f"```python\n{(p + text).rstrip()}\n```" for p, text in figures["samples"].items()]
    return CARD.format(
        **figures,
        rows="\n".join(rows),
        heldout_names=", ".join(f"`{name}`" for name in corpus["heldout_names"]),
        joined_stages="\n".join(
            f"{n}. " + STAGE.format(**stage) for n, stage in enumerate(stages, 1)
        ),
        commands="\n".join(f"    {command}" for command in stage_commands(stages)),
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
    output = Path(__file__).resolve().parents[2] / "resources" / "mpt-demo"
    add("--stdlib", type=Path, default=stdlib, help="folder of the standard library to learn")
    add("--python_version", default=platform.python_version(), help="whose library that is")
    add("--output", type=Path, default=output, help="model folder to write")
    add("--initial", type=Path, help="model folder of this script to train on, its sizes kept")
    add("--heldout_bytes", type=int, default=HELDOUT_BYTES, help="text held out for the figures")
    add("--validation_bytes", type=int, default=VALIDATION_BYTES, help="text held out for choices")
    for field in dataclasses.fields(Architecture) + dataclasses.fields(Recipe):
        add(f"--{field.name}", type=type(field.default), default=field.default, help=" ")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = arguments.output
    if output.exists() and any(output.iterdir()) and not (output / "training.json").is_file():
        raise MptTrtError(f"{output}: holds something else; name a new folder as --output")
    architecture, recipe = (
        kind(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(kind)})
        for kind in (Architecture, Recipe)
    )
    make_demo_model(arguments, architecture, recipe)


@dataclass(frozen=True)
class Initial:
    """A folder that this script wrote, to train on."""

    architecture: Architecture
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    stages: list[dict]

    @classmethod
    def read(cls, folder: Path) -> Initial:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        figures = json.loads((folder / "training.json").read_text())
        return cls(
            Architecture(**figures["architecture"]),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            load_file(folder / "model.safetensors"),
            figures["stages"],
        )


def make_demo_model(
    arguments: argparse.Namespace, architecture: Architecture, recipe: Recipe
) -> None:
    """The whole flow: corpus, tokenizer, training, model, figures and card."""
    import torch

    from mpt_trt.system.files import replace_directory
    from tools.demo_model.training import DemoMpt, train

    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = read_corpus(arguments.stdlib)
    split = split_corpus(documents, arguments.heldout_bytes, arguments.validation_bytes)
    initial = Initial.read(arguments.initial) if arguments.initial else None
    if initial:
        architecture, tokenizer = initial.architecture, initial.tokenizer
    else:
        tokenizer = train_tokenizer([d.text for d in split["training"]], architecture.vocab_size)
    streams = make_streams(tokenizer, split, recipe)
    streams = {part: stream.to(device) for part, stream in streams.items()}
    network = DemoMpt(architecture, recipe.dropout).to(device)
    if initial:
        network.load_state_dict(initial.weights)
    seconds = train(network, streams, recipe, architecture.max_seq_len)
    weights = to_float16(network.state_dict())
    with replace_directory(arguments.output) as folder:
        write_model(folder, architecture, weights, tokenizer)
        model = load_in_transformers(folder).to(device)
        quality = measure(model, streams, len(joined(split["heldout"]).encode()))
        stage = {
            "recipe": dataclasses.asdict(recipe),
            "seconds": round(seconds, 1),
            "heldout": quality["nats_per_token"]["heldout"],
        }
        figures = {
            "python_version": arguments.python_version,
            "architecture": dataclasses.asdict(architecture),
            "parameters": sum(weight.numel() for weight in weights.values()),
            "corpus": describe_corpus(split, streams),
            "stages": [*(initial.stages if initial else []), stage],
            "hardware": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "packages": {name: version(name) for name in PACKAGES},
            "quality": quality,
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
