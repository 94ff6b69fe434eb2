"""Generate text with an engine."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from pathlib import Path

import numpy as np

from mpt_trt.checkpoint.source import tokenizer_folder_of
from mpt_trt.checkpoint.tokenizer import Tokenizer, read_tokenizer
from mpt_trt.cli.terminal import set_up_logging
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.system.files import replace_file


def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    if options.streaming and len(options.input_text) > 1:
        raise MptTrtError("--streaming prints one prompt's text; give one --input_text")
    manifest = read_manifest(options.engine_dir)
    tokenizer = _tokenizer(options, manifest.provenance)
    prompts = _prompts(options, tokenizer)
    engine = load_engine(
        options.engine_dir,
        options.runtime,
        options.num_threads,
        options.activations,
        options.trust,
    )
    if engine.is_first_rank:
        _say_what_runs(engine)
    config = _generation_config(options, engine, tokenizer)
    started = time.perf_counter()
    on_token = _printer(tokenizer) if options.streaming and engine.is_first_rank else None
    outputs = generate(engine.model, prompts, config, on_token=on_token)
    seconds = time.perf_counter() - started
    if not engine.is_first_rank:
        return
    if options.streaming:
        print()
    else:
        _print_outputs(prompts, outputs, tokenizer)
    _save(options, outputs, config.pad_id)
    count = sum(len(best[0].tokens) for best in outputs)
    logging.info("%d tokens in %.2f s: %.1f tokens/s", count, seconds, count / seconds)


def _tokenizer(options: argparse.Namespace, provenance: dict) -> Tokenizer:
    asked, made = options.tokenizer_dir, options.engine_dir
    return read_tokenizer(tokenizer_folder_of(made, provenance, asked))


def _prompts(options: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    add_special_tokens = not options.no_add_special_tokens
    if options.input_file is None:
        found = [tokenizer.encode(text, add_special_tokens) for text in options.input_text]
    else:
        found = _read_prompts(options.input_file, tokenizer, add_special_tokens)
    keep = options.max_input_length
    return found if keep is None else [prompt[-keep:] for prompt in found]


def _read_prompts(path: Path, tokenizer: Tokenizer, add_special_tokens: bool) -> list[list[int]]:
    try:
        if path.suffix == ".txt":
            lines = path.read_text().splitlines()
            return [tokenizer.encode(line, add_special_tokens) for line in lines if line]
        if path.suffix == ".csv":
            with path.open(newline="") as stream:
                return [[int(cell) for cell in row] for row in csv.reader(stream) if row]
        if path.suffix == ".npy":
            return [[int(token) for token in row] for row in np.load(path, allow_pickle=False)]
    except (OSError, ValueError, TypeError) as error:
        raise MptTrtError(f"{path}: cannot be read as prompts: {error}") from None
    raise MptTrtError(f"{path}: unknown kind of file; .txt, .csv and .npy are read")


def _say_what_runs(engine: LoadedEngine) -> None:
    print(f"Runtime: {engine.runtime}", file=sys.stderr)
    if engine.fallback_reason is not None:
        print(f"TensorRT did not run it: {engine.fallback_reason}", file=sys.stderr)


def _generation_config(
    options: argparse.Namespace, engine: LoadedEngine, tokenizer: Tokenizer
) -> GenerationConfig:
    candidates = (
        options.end_id,
        engine.manifest.spec.config.eos_token_id,
        tokenizer.eos_token_id,
    )
    end_id = next((candidate for candidate in candidates if candidate is not None), None)
    end_ids = () if end_id is None else (end_id,)
    return GenerationConfig(
        max_new_tokens=options.max_output_len,
        end_ids=end_ids,
        pad_id=0 if end_id is None else end_id,
        num_beams=options.num_beams,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        length_penalty=options.length_penalty,
        repetition_penalty=options.repetition_penalty,
        random_seed=options.random_seed,
    )


def _printer(tokenizer: Tokenizer):
    """A function that prints each token's text as soon as its characters are whole."""
    tokens: list[int] = []
    printed = 0

    def print_token(_row: int, token: int) -> None:
        nonlocal printed
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text[printed:], end="", flush=True)
            printed = len(text)

    return print_token


def _print_outputs(
    prompts: list[list[int]], outputs: list[list[Generated]], tokenizer: Tokenizer
) -> None:
    for index, (prompt, beams) in enumerate(zip(prompts, outputs, strict=True)):
        print(f'Input [Text {index}]: "{tokenizer.decode(prompt)}"')
        for beam, generated in enumerate(beams):
            text = tokenizer.decode(list(generated.tokens))
            print(f'Output [Text {index} Beam {beam}]: "{text}"')


def _save(options: argparse.Namespace, outputs: list[list[Generated]], pad_id: int) -> None:
    rows = [list(generated.tokens) for beams in outputs for generated in beams]
    if options.output_csv is not None:
        with replace_file(options.output_csv) as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    if options.output_npy is not None:
        width = max(map(len, rows))
        padded = np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int64)
        with replace_file(options.output_npy) as partial, partial.open("wb") as stream:
            np.save(stream, padded.reshape(len(outputs), -1, width))
