"""An engine for Python programs."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypedDict, Unpack

from mpt_trt.api.outputs import FinishReason, Output, StreamPart, make_completion
from mpt_trt.api.text import EngineText, Prompt
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_settings import Activations
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate, generate_steps
from mpt_trt.generation.text import GeneratedText


class GenerationOptions(TypedDict, total=False):
    """Options of a generation; `GenerationConfig` describes their ranges.

    The default is greedy: the most likely token at every position.
    """

    num_beams: int
    """Beam search with this width (default: 1)."""
    temperature: float
    """Divides the logits when sampling (default: 1.0)."""
    top_k: int
    """Sample from this many most likely tokens; 1: greedy, 0: all (default: 1)."""
    top_p: float
    """Sample from the most likely tokens that together reach this probability; 0: off (default)."""
    repetition_penalty: float
    """Above 1: lowers the probability of tokens that have occurred; 0.01 to 100 (default: 1.0)."""
    length_penalty: float
    """Exponent of the length that divides a beam's score (default: 1.0)."""
    random_seed: int
    """Seed of sampling (default: 0)."""
    top_log_probs: int
    """Most likely tokens to report per new token (default: 0)."""
    end_ids: Sequence[int]
    """Tokens that end a completion (default: the model's)."""
    stop: Sequence[str]
    """Strings that end a completion and are not part of its text (default: none)."""
    add_special_tokens: bool
    """Whether the tokenizer adds its special tokens to texts (default: True)."""


class Engine:
    """A loaded engine that generates text; also a context manager that frees it at the end.

    Several engines can be loaded in one process. Each serves one call at a time.
    """

    def __init__(self, loaded: LoadedEngine, text: EngineText):
        self._loaded: LoadedEngine | None = loaded
        self._text = text
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        runtime: str = "auto",
        *,
        num_threads: int = 0,
        activations: Activations = "exact",
        trust: bool = False,
        tokenizer_dir: str | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        text: EngineText | None = None,
    ) -> Engine:
        """Loads an engine directory.

        Under mpirun, every process loads its rank of the engine, and all call the same methods.

        Args:
            path: the engine directory.
            runtime: `auto` (TensorRT if it can run the engine, else ONNX Runtime), `tensorrt` or
                `onnxruntime`.
            num_threads: CPU threads of ONNX Runtime; 0: one per core.
            activations: `exact` or `int8`; see run.py's `--activations`.
            trust: do not compare files with the hashes that were recorded when they were made.
            tokenizer_dir: hub id or folder of the tokenizer; by default the one in the directory.
            chat_template: Jinja file to use instead of the tokenizer's chat template.
            text: tokenizer and template, if they have been read already.

        Raises:
            MptTrtError: the directory is incomplete, or the runtime cannot load it.
        """
        if not os.fspath(path):
            raise MptTrtError("the path of the engine is empty; give an engine directory")
        folder = Path(path)
        if text is None:
            template = None if chat_template is None else Path(chat_template)
            text = EngineText.read(folder, read_manifest(folder), tokenizer_dir, template)
        loaded = load_engine(folder, runtime, num_threads, activations, trust)
        return cls(loaded, text)

    def __repr__(self) -> str:
        state = "closed" if self._loaded is None else self._loaded.runtime
        return f"<Engine: {state}>"

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the engine's memory, after which nothing can be generated."""
        self._loaded = None

    @property
    def loaded(self) -> LoadedEngine:
        """Returns the loaded engine; raises MptTrtError after `close`."""
        if self._loaded is None:
            raise MptTrtError("the engine was closed; load it again")
        return self._loaded

    @property
    def text(self) -> EngineText:
        """Tokenizer, chat template and end tokens."""
        return self._text

    @property
    def runtime(self) -> str:
        """Name and version of the runtime."""
        return self.loaded.runtime

    @property
    def fallback_reason(self) -> str | None:
        """Reason why the runtime is not TensorRT; None when it is."""
        return self.loaded.fallback_reason

    @property
    def is_first_rank(self) -> bool:
        """Returns whether this process is the one of several ranks that writes results."""
        return self.loaded.is_first_rank

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        **options: Unpack[GenerationOptions],
    ) -> list[Output]:
        """Continues all prompts in one batch.

        Args:
            prompts: texts, lists of token ids, or lists of chat messages.
            max_new_tokens: maximum number of new tokens per prompt.
            options: those of `GenerationOptions`; docs/python.md lists them with their defaults.

        Raises:
            MptTrtError: an option or prompt is invalid, or the batch does not fit the engine.
        """
        request = _Request(self._text, prompts, max_new_tokens, options)
        # Beam search has no stop strings; the callback makes `generate` reject them.
        on_token = request.on_token if request.stop else None
        with self._turn() as loaded:
            outputs = generate(loaded.model, request.prompts, request.config, on_token)
        end_ids, decoder = request.config.end_ids, self._text.decoder
        return [
            Output(
                tuple(prompt),
                tuple(make_completion(one, decoder, end_ids, request.stop) for one in beams),
            )
            for prompt, beams in zip(request.prompts, outputs, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[StreamPart]:
        """Continues all prompts in one batch, and yields every token when it is chosen.

        The engine is free again when the iterator ends, or is closed or dropped. Arguments and
        errors: see `generate`, without beams.
        """
        request = _Request(self._text, prompts, max_new_tokens, options)
        if request.config.num_beams > 1:
            raise MptTrtError(
                f"num_beams is {request.config.num_beams}; a stream needs 1, because until beam "
                "search ends no token is certain: use generate"
            )
        return self._parts(request) if request.prompts else iter(())

    def _parts(self, request: _Request) -> Iterator[StreamPart]:
        with self._turn() as loaded:
            steps = generate_steps(loaded.model, request.prompts, request.config, request.on_token)
            for sequences in steps:
                step = sequences.count - 1
                top = sequences.top[step] if sequences.top else None
                for row, token in request.take_new():
                    yield StreamPart(
                        index=row,
                        text=request.texts[row].new_text(request.reasons[row] is not None),
                        token=token,
                        log_prob=float(sequences.log_probs[row, step]),
                        top_log_probs=() if top is None else top[row],
                        finish_reason=request.reasons[row],
                    )

    @contextmanager
    def _turn(self) -> Iterator[LoadedEngine]:
        """Reserves the engine for one call; turns failures of the runtime into MptTrtError."""
        loaded = self.loaded
        if not self._lock.acquire(blocking=False):
            raise MptTrtError(
                "the engine is generating already; finish or close the stream first, or load the "
                "engine twice"
            )
        try:
            yield loaded
        except (MptTrtError, MemoryError):
            raise
        except Exception as error:
            raise MptTrtError(f"the engine failed ({type(error).__name__}: {error})") from error
        finally:
            self._lock.release()


class _Request:
    """Prompts as token ids, checked options, and the text of every prompt as it grows."""

    def __init__(
        self,
        text: EngineText,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        options: GenerationOptions,
    ):
        if isinstance(prompts, str):
            raise MptTrtError("prompts is a text; give a list of prompts: [text]")
        self.config = make_config(text, max_new_tokens, options)
        self.stop = text.stop_strings(prompts, options.get("stop", ()))
        self.texts = [GeneratedText(text.decoder, self.stop) for _ in prompts]
        self.reasons: list[FinishReason | None] = [None] * len(prompts)
        special = options.get("add_special_tokens", True)
        self.prompts = [text.encode(prompt, special) for prompt in prompts]
        self._new: list[tuple[int, int]] = []

    def on_token(self, row: int, token: int) -> bool:
        """Adds a new token to a row; returns whether a stop string ends the row."""
        self._new.append((row, token))
        stops = self.texts[row].add(token)
        if stops or token in self.config.end_ids:
            self.reasons[row] = "stop"
        elif len(self.texts[row].tokens) == self.config.max_new_tokens:
            self.reasons[row] = "length"
        return stops

    def take_new(self) -> list[tuple[int, int]]:
        """Returns (row, token) of the latest step."""
        new, self._new = self._new, []
        return new


def make_config(
    text: EngineText, max_new_tokens: int, options: GenerationOptions
) -> GenerationConfig:
    """Makes the settings of a generation; raises MptTrtError for an invalid option."""
    unknown = options.keys() - GenerationOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(sorted(GenerationOptions.__annotations__))
        raise MptTrtError(f"unknown option {min(unknown)!r}; known are {known}")
    end_ids = tuple(dict.fromkeys(options.get("end_ids", text.end_ids)))
    fields = {
        name: value
        for name, value in options.items()
        if name not in ("end_ids", "stop", "add_special_tokens")
    }
    try:
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            end_ids=end_ids,
            pad_id=end_ids[0] if end_ids else 0,
            **fields,  # type: ignore[arg-type]
        )
    except TypeError as error:
        raise MptTrtError(f"an option has the wrong type: {error}") from None
