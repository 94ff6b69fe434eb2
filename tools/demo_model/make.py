"""Makes the demo model: corpus, tokenizer, training, model, figures and card."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from mpt_trt.errors import MptTrtError
from mpt_trt.system.replace import FolderKind, read_mark, replace_directory
from tools.demo_model.corpus import Split, joined, read_corpus, split_corpus
from tools.demo_model.model_card import SAMPLE_TOKENS, model_card
from tools.demo_model.model_folder import load_in_transformers, to_float16, write_json, write_model
from tools.demo_model.recipe import Architecture, Recipe
from tools.demo_model.tokens import make_streams, train_tokenizer
from tools.demo_model.training import DemoMpt, mean_loss, train

FIRST_WINDOWS = 4
PROMPTS = ("def fibonacci", "def factorial", "def read_file", "def is_prime", "class Stack")
FILES = (
    "LICENSE.txt",
    "README.md",
    "config.json",
    "generation_config.json",
    "heldout.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
DEMO_MODEL = FolderKind(
    "a demo model",
    lambda folder: FILES if read_mark(folder / "training.json").keys() >= {"stages"} else None,
)
log = logging.getLogger("train_demo_model")


def run(options: argparse.Namespace) -> None:
    """Train and write the model for the options of train.py."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = options.output
    if output.exists() and any(output.iterdir()) and not (output / "training.json").is_file():
        raise MptTrtError(f"{output}: holds something else; name a new folder as --output")
    given = vars(options)
    architecture, recipe = (
        {field.name: given[field.name] for field in dataclasses.fields(kind)}
        for kind in (Architecture, Recipe)
    )
    make_demo_model(options, Architecture(**architecture), Recipe(**recipe))


def make_demo_model(
    options: argparse.Namespace, architecture: Architecture, recipe: Recipe
) -> None:
    """Makes the demo model: corpus, tokenizer, training, model, figures and card."""
    torch.manual_seed(recipe.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = read_corpus(options.stdlib)
    split = split_corpus(documents, options.heldout_bytes, options.validation_bytes)
    initial = Initial.read(options.initial) if options.initial else None
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
    with replace_directory(options.output, DEMO_MODEL) as folder:
        write_model(folder, architecture, weights, tokenizer)
        model = load_in_transformers(folder).to(device)
        quality = measure(model, streams, len(joined(split["heldout"]).encode()))
        stage = {
            "recipe": dataclasses.asdict(recipe),
            "seconds": round(seconds, 1),
            "heldout": quality["nats_per_token"]["heldout"],
        }
        figures = {
            "python_version": options.python_version,
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
            shutil.copyfile(options.stdlib / "LICENSE.txt", folder / "LICENSE.txt")
    log.info(json.dumps({key: figures[key] for key in ("quality", "samples")}, indent=2))


@dataclass(frozen=True)
class Initial:
    """A folder of an earlier run whose model is trained further."""

    architecture: Architecture
    tokenizer: Tokenizer
    weights: dict[str, Tensor]
    stages: list[dict]

    @classmethod
    def read(cls, folder: Path) -> Initial:
        figures = json.loads((folder / "training.json").read_text())
        return cls(
            Architecture(**figures["architecture"]),
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            load_file(folder / "model.safetensors"),
            figures["stages"],
        )


def greedy_samples(model: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """Continues each prompt with transformers' greedy search, up to an end of text."""
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


def describe_corpus(split: Split, streams: dict[str, Tensor]) -> dict:
    """Sizes and SHA-256 of the texts, which identify a corpus."""
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


def measure(model: Any, streams: dict[str, Tensor], heldout_bytes: int) -> dict:
    """Measures losses of the saved float16 weights, computed in float32 by transformers."""
    length, heldout = model.config.max_seq_len, streams["heldout"]
    measured = {
        "heldout": heldout,
        "heldout_first_windows": heldout[: FIRST_WINDOWS * length + 1],
        "validation": streams["validation"],
        # As much training text as is held out, to measure how much was learnt by heart.
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
