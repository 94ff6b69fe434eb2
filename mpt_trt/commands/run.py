"""Generate text with an engine."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time

import numpy as np

from mpt_trt.checkpoint.chat import (
    ChatTemplate,
    Conversation,
    chat_prompt,
    choose_template,
    read_conversations,
)
from mpt_trt.checkpoint.source import tokenizer_folder_of
from mpt_trt.checkpoint.special_tokens import describe_conflict
from mpt_trt.checkpoint.tokenizer import Tokenizer, read_tokenizer
from mpt_trt.cli import prompts as prompt_files
from mpt_trt.cli.output_options import input_paths
from mpt_trt.cli.terminal import set_up_logging
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.engines.manifest import Manifest, read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.generation.text import GeneratedText, OrderedPrinter
from mpt_trt.system.replace import replace_file, require_writable

log = logging.getLogger("run")


def run(options: argparse.Namespace) -> None:
    set_up_logging(options.log_level)
    _require_consistent(options)
    for output in (options.output_csv, options.output_npy):
        if output is not None:
            require_writable(output, input_paths(options))
    manifest = read_manifest(options.engine_dir)
    tokenizer = _tokenizer(options, manifest)
    config = _generation_config(options, manifest, tokenizer)
    template = _chat_template(options, manifest, tokenizer) if options.chat else None
    prompts = _prompts(options, tokenizer, template, {*config.end_ids, config.pad_id})
    stop = [*(options.stop or ()), *(template.stop if template else ())]
    engine = load_engine(
        options.engine_dir,
        options.runtime,
        options.num_threads,
        options.activations,
        options.trust,
    )
    if engine.is_first_rank:
        _say_what_runs(engine)
        if options.end_id is None:
            _report_conflict(config.end_ids, manifest, tokenizer)
    output = _Output(prompts, config, tokenizer, stop)
    if options.streaming and engine.is_first_rank:
        output.stream()
    started = time.perf_counter()
    on_token = output.on_token if options.streaming or stop else None
    outputs = generate(engine.model, prompts, config, on_token=on_token)
    seconds = time.perf_counter() - started
    if not engine.is_first_rank:
        return
    if not options.streaming:
        output.print_all(outputs)
    _save(options, outputs, config.pad_id)
    count = sum(len(best[0].tokens) for best in outputs)
    logging.info("%d tokens in %.2f s: %.1f tokens/s", count, seconds, count / seconds)


def _require_consistent(options: argparse.Namespace) -> None:
    keep, file = options.max_input_length, options.input_file
    if keep is not None and keep < 1:
        raise MptTrtError(f"--max_input_length = {keep}: at least 1 is required")
    if options.chat_template is not None and not options.chat:
        raise MptTrtError("--chat_template belongs to --chat; add it")
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


def _tokenizer(options: argparse.Namespace, manifest: Manifest) -> Tokenizer | None:
    """Reads the tokenizer; None if there is none and the prompts are ids, which need none."""
    asked, made = options.tokenizer_dir, options.engine_dir
    try:
        folder = tokenizer_folder_of(made, manifest.provenance, asked)
        tokenizer = read_tokenizer(folder)
    except MptTrtError as error:
        if asked is not None or not _has_ids(options) or options.stop:
            raise
        log.warning("%s; token ids are printed instead of text", error)
        return None
    return tokenizer.require_fitting(manifest.spec.config.vocab_size)


def _chat_template(
    options: argparse.Namespace, manifest: Manifest, tokenizer: Tokenizer | None
) -> ChatTemplate:
    assert tokenizer is not None, "only prompts that are ids can do without"
    names = [manifest.provenance.get("source"), manifest.model_name]
    known = [name for name in names if isinstance(name, str)]
    return choose_template(tokenizer, known, options.chat_template)


def _prompts(
    options: argparse.Namespace,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    padding: set[int],
) -> list[list[int]]:
    file = options.input_file
    if tokenizer is None or _has_ids(options):
        pad_id = None if tokenizer is None else tokenizer.pad_token_id
        prompts = prompt_files.read_ids(file, padding if pad_id is None else {*padding, pad_id})
    elif template is not None:
        conversations = _conversations(options)
        prompts = [chat_prompt(tokenizer, template, messages) for messages in conversations]
    else:
        texts = options.input_text if file is None else prompt_files.read_texts(file)
        add_special_tokens = not options.no_add_special_tokens
        prompts = prompt_files.encoded(
            texts, lambda text: tokenizer.encode(text, add_special_tokens)
        )
    keep = options.max_input_length
    return prompts if keep is None else [prompt[-keep:] for prompt in prompts]


def _conversations(options: argparse.Namespace) -> list[Conversation]:
    file = options.input_file
    if file is not None and file.suffix == prompt_files.CHAT_SUFFIX:
        return read_conversations(file)
    texts = options.input_text if file is None else prompt_files.read_texts(file)
    return [[{"role": "user", "content": text}] for text in texts]


def _say_what_runs(engine: LoadedEngine) -> None:
    print(f"Runtime: {engine.runtime}", file=sys.stderr)
    if engine.fallback_reason is not None:
        print(f"TensorRT did not run it: {engine.fallback_reason}", file=sys.stderr)


def _generation_config(
    options: argparse.Namespace, manifest: Manifest, tokenizer: Tokenizer | None
) -> GenerationConfig:
    end_ids = _end_ids(options, manifest, tokenizer)
    return GenerationConfig(
        max_new_tokens=options.max_output_len,
        end_ids=end_ids,
        pad_id=end_ids[0] if end_ids else 0,
        num_beams=options.num_beams,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        length_penalty=options.length_penalty,
        repetition_penalty=options.repetition_penalty,
        random_seed=options.random_seed,
    )


def _end_ids(
    options: argparse.Namespace, manifest: Manifest, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Returns end tokens: the requested ones, else the engine's, else the tokenizer's."""
    if options.end_id is not None:
        return tuple(dict.fromkeys(options.end_id))
    own = None if tokenizer is None else tokenizer.eos_token_id
    if not manifest.end_ids and own is not None:
        return (own,)
    return manifest.end_ids


def _report_conflict(
    end_ids: tuple[int, ...], manifest: Manifest, tokenizer: Tokenizer | None
) -> None:
    ignored = dict(manifest.ignored_end_ids)
    own = None if tokenizer is None else tokenizer.eos_token_id
    if own is not None and own not in end_ids:
        ignored["the tokenizer"] = (own,)
    if ignored:
        log.warning("%s", describe_conflict(end_ids, ignored))


class _Output:
    """Prints prompts and outputs, while they grow or at the end, and finds stop strings."""

    def __init__(
        self,
        prompts: list[list[int]],
        config: GenerationConfig,
        tokenizer: Tokenizer | None,
        stop: list[str],
    ):
        self._prompts, self._config, self._stop = prompts, config, stop
        self._decoder = tokenizer or _Ids()
        self._texts = [GeneratedText(self._decoder, stop) for _ in prompts]
        self._printer: OrderedPrinter | None = None

    def stream(self) -> None:
        """Starts printing: a single prompt's text undecorated, several ones as at the end."""
        before, after = [""], "\n"
        if len(self._prompts) > 1:
            before = [self._header(index) + _label(index, 0) for index in range(len(self._prompts))]
            after = '"\n'
        self._printer = OrderedPrinter(self._texts, before, after, _write)

    def on_token(self, row: int, token: int) -> bool:
        """Adds a new token to a row; returns whether a stop string ends the row."""
        stops = self._texts[row].add(token)
        if self._printer is not None:
            tokens = len(self._texts[row].tokens)
            ends = token in self._config.end_ids or tokens == self._config.max_new_tokens
            self._printer.update(row, stops or ends)
        return stops

    def print_all(self, outputs: list[list[Generated]]) -> None:
        """Prints all prompts and outputs."""
        for index, beams in enumerate(outputs):
            _write(self._header(index))
            for beam, generated in enumerate(beams):
                text = GeneratedText(self._decoder, self._stop)
                for token in generated.tokens:
                    text.add(token)
                _write(f'{_label(index, beam)}{text.text()}"\n')

    def _header(self, index: int) -> str:
        return f'Input [Text {index}]: "{self._decoder.decode(self._prompts[index])}"\n'


class _Ids:
    """Replaces a missing tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, token_ids))


def _label(index: int, beam: int) -> str:
    return f'Output [Text {index} Beam {beam}]: "'


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _save(options: argparse.Namespace, outputs: list[list[Generated]], pad_id: int) -> None:
    inputs = input_paths(options)
    rows = [list(generated.tokens) for beams in outputs for generated in beams]
    if options.output_csv is not None:
        replacement = replace_file(options.output_csv, inputs)
        with replacement as partial, partial.open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    if options.output_npy is not None:
        width = max(map(len, rows))
        padded = np.array([row + [pad_id] * (width - len(row)) for row in rows], np.int64)
        replacement = replace_file(options.output_npy, inputs)
        with replacement as partial, partial.open("wb") as stream:
            np.save(stream, padded.reshape(len(outputs), -1, width))
