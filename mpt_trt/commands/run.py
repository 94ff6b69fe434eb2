"""Generate text with an engine."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from collections.abc import Sequence

import numpy as np

from mpt_trt.api.engine import Engine, GenerationOptions, make_config
from mpt_trt.api.outputs import Output
from mpt_trt.api.text import EngineText
from mpt_trt.checkpoint.chat import Conversation, read_conversations
from mpt_trt.checkpoint.special_tokens import describe_conflict
from mpt_trt.cli import prompts as prompt_files
from mpt_trt.cli.ignored_options import report_ignored
from mpt_trt.cli.logs import set_up_logging
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.own_flags import own_flags
from mpt_trt.engines.manifest import Manifest, read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.text import OrderedPrinter
from mpt_trt.system.replace import is_replaced, replace_file, require_writable

log = logging.getLogger("run")

SAME_NAMES = (
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "length_penalty",
    "repetition_penalty",
    "random_seed",
    "num_threads",
)
FLAGS = {
    "max_new_tokens": "--max_output_len",
    "end_ids": "--end_id",
    **{name: f"--{name}" for name in SAME_NAMES},
}


@own_flags(FLAGS)
def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    _require_consistent(options)
    for output in (options.output_csv, options.output_npy):
        if output is not None:
            require_writable(output, input_paths(options))
    text = _engine_text(options, read_manifest(options.engine_dir))
    settings = _settings(options, text)
    config = make_config(text, options.max_output_len, settings)
    prompts = _prompts(options, text, {*config.end_ids, config.pad_id})
    engine = Engine.load(
        options.engine_dir,
        options.runtime,
        num_threads=options.num_threads,
        activations=options.activations,
        trust=options.trust,
        text=text,
    )
    if engine.is_first_rank:
        report_ignored(options)
        _say_what_runs(engine)
        if options.end_id is None:
            _report_conflict(config.end_ids, text)
    started = time.perf_counter()
    outputs: list[Output] = []
    if options.streaming:
        rows = _stream(engine, prompts, options.max_output_len, settings)
    else:
        outputs = engine.generate(prompts, options.max_output_len, **settings)
        rows = [beam.tokens for output in outputs for beam in output.completions]
    seconds = time.perf_counter() - started
    if not engine.is_first_rank:
        return
    _print_all(outputs, text)
    _save(options, rows, len(prompts), config.pad_id)
    count = sum(map(len, rows[:: config.num_beams]))
    print(f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s", file=sys.stderr)


def _require_consistent(options: argparse.Namespace) -> None:
    keep, file = options.max_input_length, options.input_file
    if keep is not None and keep < 1:
        raise MptTrtError(f"--max_input_length = {keep}: at least 1 is required")
    if options.chat_template is not None and not options.chat:
        raise MptTrtError("--chat_template belongs to --chat; add it")
    csv, npy = options.output_csv, options.output_npy
    if csv is not None and npy is not None and is_replaced(csv) and csv.resolve() == npy.resolve():
        raise MptTrtError(f"--output_csv = {csv}: also --output_npy; name two different files")
    texts = (prompt_files.TEXT_SUFFIX, prompt_files.CHAT_SUFFIX)
    legal = texts if options.chat else (prompt_files.TEXT_SUFFIX, *prompt_files.IDS_SUFFIXES)
    if file is not None and file.suffix not in legal:
        hint = " without --chat" if file.suffix in texts else ""
        hint = " with --chat" if options.chat else hint
        raise MptTrtError(f"{file}: unknown file type; use {', '.join(legal)}{hint}")
    for index, text in enumerate(options.stop or ()):
        _require_utf8(f"--stop {index}", text)
    for index, text in enumerate(options.input_text):
        _require_utf8(f"prompt {index}", text)


def _require_utf8(name: str, text: str) -> None:
    """Raises MptTrtError for an argument that is not UTF-8 (Python gives lone surrogates)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MptTrtError(f"{name} is not valid UTF-8: {text[:60]!r}; convert it") from None


def _has_ids(options: argparse.Namespace) -> bool:
    return options.input_file is not None and options.input_file.suffix in prompt_files.IDS_SUFFIXES


def _engine_text(options: argparse.Namespace, manifest: Manifest) -> EngineText:
    """Reads tokenizer and template; without a tokenizer, prompts and output are token ids."""
    text = EngineText.read(
        options.engine_dir, manifest, options.tokenizer_dir, options.chat_template
    )
    if text.tokenizer is None:
        if not _has_ids(options) or options.stop:
            text.require_tokenizer()
        log.warning("%s; token ids are printed instead of text", text.problem)
    return text


def _prompts(options: argparse.Namespace, text: EngineText, padding: set[int]) -> list[list[int]]:
    file = options.input_file
    if _has_ids(options):
        begin = text.manifest.spec.config.bos_token_id
        if text.tokenizer is not None:
            pad_id, own = text.tokenizer.pad_token_id, text.tokenizer.bos_token_id
            padding = padding if pad_id is None else {*padding, pad_id}
            begin = begin if own is None else own
        prompts = prompt_files.read_ids(file, padding, begin)
    elif options.chat:
        prompts = [text.encode(messages) for messages in _conversations(options)]
    else:
        texts = options.input_text if file is None else prompt_files.read_texts(file)
        add_special_tokens = not options.no_add_special_tokens
        prompts = prompt_files.encoded(texts, lambda one: text.encode(one, add_special_tokens))
    keep = options.max_input_length
    return prompts if keep is None else [prompt[-keep:] for prompt in prompts]


def _conversations(options: argparse.Namespace) -> list[Conversation]:
    file = options.input_file
    if file is not None and file.suffix == prompt_files.CHAT_SUFFIX:
        return read_conversations(file)
    texts = options.input_text if file is None else prompt_files.read_texts(file)
    return [[{"role": "user", "content": text}] for text in texts]


def _say_what_runs(engine: Engine) -> None:
    print(f"Runtime: {engine.runtime}", file=sys.stderr)
    if engine.fallback_reason is not None:
        print(f"TensorRT did not run it: {engine.fallback_reason}", file=sys.stderr)


def _settings(options: argparse.Namespace, text: EngineText) -> GenerationOptions:
    stop = [*(options.stop or ()), *(text.template.stop if options.chat else ())]
    return GenerationOptions(
        num_beams=options.num_beams,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        length_penalty=options.length_penalty,
        repetition_penalty=options.repetition_penalty,
        random_seed=options.random_seed,
        end_ids=text.end_ids if options.end_id is None else options.end_id,
        stop=stop,
    )


def _report_conflict(end_ids: tuple[int, ...], text: EngineText) -> None:
    ignored = dict(text.manifest.ignored_end_ids)
    own = None if text.tokenizer is None else text.tokenizer.eos_token_id
    if own is not None and own not in end_ids:
        ignored["the tokenizer"] = (own,)
    if ignored:
        log.warning("%s", describe_conflict(end_ids, ignored))


def _stream(
    engine: Engine, prompts: list[list[int]], max_new_tokens: int, settings: GenerationOptions
) -> list[tuple[int, ...]]:
    """Prints text as it is generated, undecorated for a single prompt; returns tokens by prompt."""
    before, after = [""], "\n"
    if len(prompts) > 1:
        headers = (_header(index, engine.text, prompt) for index, prompt in enumerate(prompts))
        before = [header + _label(index, 0) for index, header in enumerate(headers)]
        after = '"\n'
    write = _write if engine.is_first_rank else _discard
    parts = engine.stream(prompts, max_new_tokens, **settings)
    printer = OrderedPrinter(before, after, write)
    tokens: list[list[int]] = [[] for _ in prompts]
    for part in parts:
        tokens[part.index].append(part.token)
        printer.update(part.index, part.text, part.finish_reason is not None)
    return [tuple(row) for row in tokens]


def _print_all(outputs: list[Output], text: EngineText) -> None:
    for index, output in enumerate(outputs):
        _write(_header(index, text, output.prompt_tokens))
        for beam, completion in enumerate(output.completions):
            _write(f'{_label(index, beam)}{completion.text}"\n')


def _header(index: int, text: EngineText, prompt: Sequence[int]) -> str:
    return f'Input [Text {index}]: "{text.decoder.decode(list(prompt))}"\n'


def _label(index: int, beam: int) -> str:
    return f'Output [Text {index} Beam {beam}]: "'


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _discard(_text: str) -> None:
    """Prints nothing, for ranks other than the first."""


def _save(
    options: argparse.Namespace, rows: Sequence[Sequence[int]], num_prompts: int, pad_id: int
) -> None:
    inputs = input_paths(options)
    if options.output_csv is not None:
        replacement = replace_file(options.output_csv, inputs)
        with replacement as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    if options.output_npy is not None:
        width = max(map(len, rows))
        padded = np.array([[*row] + [pad_id] * (width - len(row)) for row in rows], np.int64)
        replacement = replace_file(options.output_npy, inputs)
        with replacement as partial, partial.open("wb") as stream:
            np.save(stream, padded.reshape(num_prompts, -1, width))
