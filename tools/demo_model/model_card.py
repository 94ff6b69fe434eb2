"""Makes the demo model's README.md from the figures of its training.json."""

from __future__ import annotations

import dataclasses

from tools.demo_model.recipe import Recipe

SAMPLE_TOKENS = 64
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

A toy MPT, trained on the Python standard library, for testing workflows for MPT checkpoints. You
can judge its text by eye, and its loss gets worse if a conversion does harm. Its text looks like
Python but is not useful as code. It has seen one code base and repeats parts of it by heart.

| text | documents | bytes | tokens | nats per token |
|---|---|---|---|---|
{rows}

Losses are those of the saved float16 weights, computed in float32 by transformers in windows of
{architecture[max_seq_len]} tokens that do not overlap; the training loss is that of the beginning
of the text. Held-out perplexity is {quality[heldout_perplexity]:.3f}, or
{quality[heldout_bits_per_byte]:.4f} bits per byte. `training.json` contains all figures and
settings.

## Model

{architecture[num_layers]} blocks, hidden size {architecture[hidden_size]},
{architecture[num_heads]} heads, ALiBi, tied embeddings, {architecture[max_seq_len]} tokens of
context; {parameters:,} parameters. The tokenizer is a byte-level BPE with
{architecture[vocab_size]} tokens. It puts `<|endoftext|>` (id 0) before a text, because every
document in training began with it.

## Corpus

The sources of the standard library of Python {python_version} (its tests included) and the texts
of `pydoc_data.topics`; both Copyright Python Software Foundation, licensed under the PSF License
Version 2 (PSF-2.0, see `LICENSE.txt`), and so is this model. Generated files, tables of data,
broken fixtures and duplicates are left out.

The validation and held-out parts are library files and topics of 1 to 16 kB that share at most a
fifth of their longer lines with others, in the order of the SHA-256 of their names. (Their tests
are in the training part.) Optimizer and learning rate were chosen by the validation part. The
held-out part, `heldout.txt`, influenced no choice. It contains {heldout_names}.

## Training

Muon for the matrices of the blocks, AdamW for the rest; warm-up, then linear decay to zero.
Trained on one {hardware}.

{joined_stages}

Snippets are the functions, methods and small classes of the training part that make sense on their
own. Each is a separate document. Half of them get names composed of words and parts of words, so
that the model learns what follows `def` and an unknown name.

To make the model again, with that Python or with its library in `--stdlib`:

{commands}

## Samples

Greedy search, at most {sample_tokens} tokens.

{joined_samples}
"""
STAGE = """\
{recipe[steps]:,} steps of {recipe[batch_size]} windows, {recipe[snippet_windows]} of them
   of snippets; learning rate {recipe[learning_rate]:g} after {recipe[warmup_steps]} of warm-up,
   weight decay {recipe[weight_decay]:g}, dropout {recipe[dropout]:g}; {seconds:.0f} s;
   then {heldout:.4f} nats per held-out token."""


def stage_commands(stages: list[dict]) -> list[str]:
    """Makes one command per stage; each stage starts with the folder of the previous one."""
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
    """Fills in README.md with the figures of training.json."""
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
