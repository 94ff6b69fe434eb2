#!/usr/bin/env python3
"""Generates text with an engine."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import options as options
from mpt_trt.cli.console import run_cli, set_up_logging
from mpt_trt.system.process import restart_with_huge_pages

if TYPE_CHECKING:
    from mpt_trt.checkpoint.tokenizer import Tokenizer
    from mpt_trt.engines.load import LoadedEngine
    from mpt_trt.generation.config import Generated, GenerationConfig

DEFAULT_TEXT = "Born in north-east France, Soyer trained as a"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True, help="the engine directory")
    parser.add_argument(
        "--max_output_len", type=int, required=True, help="most new tokens of a prompt"
    )
    parser.add_argument(
        "--tokenizer_dir",
        help="hub id or folder of the tokenizer (default: that of the engine's checkpoint)",
    )
    parser.add_argument("--log_level", default="warning", help="(default: %(default)s)")
    _add_input_and_output(parser)
    _add_choice_of_tokens(parser)
    options.add_runtime(parser)
    return parser.parse_args()


def _add_input_and_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--input_text", nargs="+", default=[DEFAULT_TEXT], help="one or more prompts"
    )
    source.add_argument(
        "--input_file",
        type=Path,
        help="prompts: .txt one text a line, .csv one row of token ids a prompt, .npy likewise",
    )
    group.add_argument(
        "--max_input_length", type=int, help="keep only this many last tokens of a prompt"
    )
    group.add_argument(
        "--no_add_special_tokens",
        action="store_true",
        help="do not let the tokenizer add its special tokens",
    )
    group.add_argument("--output_csv", type=Path, help="write token ids, one row an output")
    group.add_argument("--output_npy", type=Path, help="write token ids, padded, as an array")
    group.add_argument(
        "--streaming", action="store_true", help="print text as it is generated (one prompt)"
    )


def _add_choice_of_tokens(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("choice of tokens")
    group.add_argument("--num_beams", type=int, default=1, help="(default: %(default)s)")
    group.add_argument("--temperature", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--top_k", type=int, default=1, help="1: greedy, 0: no limit (default: %(default)s)"
    )
    group.add_argument("--top_p", type=float, default=0.0, help="0: off (default: %(default)s)")
    group.add_argument("--length_penalty", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="(default: %(default)s)"
    )
    group.add_argument("--random_seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--end_id", type=int, help="token that ends an output (default: the model's)"
    )


def main() -> None:
    arguments = parse_arguments()
    set_up_logging(arguments.log_level)
    from mpt_trt.engines.load import load_engine
    from mpt_trt.engines.manifest import read_manifest
    from mpt_trt.errors import MptTrtError
    from mpt_trt.generation.generate import generate

    if arguments.streaming and len(arguments.input_text) > 1:
        raise MptTrtError("--streaming prints one prompt's text; give one --input_text")
    manifest = read_manifest(arguments.engine_dir)
    tokenizer = _tokenizer(arguments, manifest.source)
    prompts = _prompts(arguments, tokenizer)
    engine = load_engine(
        arguments.engine_dir, arguments.runtime, arguments.num_threads, arguments.activations
    )
    if engine.is_first_rank:
        _say_what_runs(engine)
    config = _generation_config(arguments, engine, tokenizer)
    started = time.perf_counter()
    on_token = _printer(tokenizer) if arguments.streaming and engine.is_first_rank else None
    outputs = generate(engine.model, prompts, config, on_token=on_token)
    seconds = time.perf_counter() - started
    if not engine.is_first_rank:
        return
    if arguments.streaming:
        print()
    else:
        _print_outputs(prompts, outputs, tokenizer)
    _save(arguments, outputs, config.pad_id)
    count = sum(len(best[0].tokens) for best in outputs)
    logging.info("%d tokens in %.2f s: %.1f tokens/s", count, seconds, count / seconds)


def _tokenizer(arguments: argparse.Namespace, source: dict) -> Tokenizer:
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer

    asked, made = arguments.tokenizer_dir, arguments.engine_dir
    return read_tokenizer(hub.tokenizer_folder_of(made, source, asked))


def _prompts(arguments: argparse.Namespace, tokenizer: Tokenizer) -> list[list[int]]:
    add_special_tokens = not arguments.no_add_special_tokens
    if arguments.input_file is None:
        found = [tokenizer.encode(text, add_special_tokens) for text in arguments.input_text]
    else:
        found = _read_prompts(arguments.input_file, tokenizer, add_special_tokens)
    keep = arguments.max_input_length
    return found if keep is None else [prompt[-keep:] for prompt in found]


def _read_prompts(path: Path, tokenizer: Tokenizer, add_special_tokens: bool) -> list[list[int]]:
    import csv

    import numpy as np

    from mpt_trt.errors import MptTrtError

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
    arguments: argparse.Namespace, engine: LoadedEngine, tokenizer: Tokenizer
) -> GenerationConfig:
    from mpt_trt.generation.config import GenerationConfig

    candidates = (
        arguments.end_id,
        engine.manifest.config.eos_token_id,
        tokenizer.eos_token_id,
    )
    end_id = next((candidate for candidate in candidates if candidate is not None), None)
    return GenerationConfig(
        max_new_tokens=arguments.max_output_len,
        end_id=end_id,
        pad_id=0 if end_id is None else end_id,
        num_beams=arguments.num_beams,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        length_penalty=arguments.length_penalty,
        repetition_penalty=arguments.repetition_penalty,
        random_seed=arguments.random_seed,
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


def _save(arguments: argparse.Namespace, outputs: list[list[Generated]], pad_id: int) -> None:
    import csv

    import numpy as np

    from mpt_trt.system.files import replace_file

    rows = [list(generated.tokens) for beams in outputs for generated in beams]
    if arguments.output_csv is not None:
        with replace_file(arguments.output_csv) as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    if arguments.output_npy is not None:
        width = max(map(len, rows))
        padded = np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int64)
        with replace_file(arguments.output_npy) as partial, partial.open("wb") as stream:
            np.save(stream, padded.reshape(len(outputs), -1, width))


if __name__ == "__main__":
    restart_with_huge_pages()
    run_cli(main)
