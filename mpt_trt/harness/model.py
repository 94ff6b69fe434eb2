"""An engine as a model of lm-eval.

Texts become tokens, windows and stop strings as in lm-eval's own `hf` model, so that both give the
same scores for the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import simple_parse_args_string

from mpt_trt.api.engine import Engine, GenerationOptions
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.token_scores import Passage, score_passages
from mpt_trt.evaluation.whole_text import prefix_of, rolling_windows, window_length_of

MAX_NEW_TOKENS = 256
"""New tokens of a task that does not say how many, as in lm-eval."""
OWN_ARGUMENTS = ("runtime", "num_threads", "activations", "trust", "tokenizer_dir")
# lm-eval passes them to every model. The engine's own limits and devices apply.
IGNORED_ARGUMENTS = ("batch_size", "max_batch_size", "device")


class EngineModel(TemplateLM):
    """A loaded engine with the three kinds of requests of lm-eval.

    max_length: most tokens that the engine reads at a time; None for the model's max_seq_len, or
    the engine's cache if it is shorter.

    Raises MptTrtError when the engine has no tokenizer, or `max_length` exceeds its cache.
    """

    def __init__(self, engine: Engine, max_length: int | None = None):
        super().__init__()
        self._engine = engine
        self._tokenizer = engine.text.require_tokenizer()
        capacity = engine.loaded.model.capacity
        self.max_length = window_length_of(engine.loaded) if max_length is None else max_length
        if not 1 < self.max_length <= capacity:
            raise MptTrtError(
                f"max_length = {self.max_length}: from 2 to the {capacity} positions of the "
                "engine's cache are possible"
            )

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> EngineModel:
        """Loads an engine from `engine_dir=...,runtime=...`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> EngineModel:
        """Loads an engine.

        arg_dict: `engine_dir`, `max_length`, and keywords of `Engine.load`.

        Raises MptTrtError when an argument is unknown or `engine_dir` is missing.
        """
        given = dict(arg_dict)
        folder, max_length = given.pop("engine_dir", None), given.pop("max_length", None)
        known = (*OWN_ARGUMENTS, *IGNORED_ARGUMENTS)
        if unknown := sorted(given.keys() - set(known)):
            words = ", ".join(("engine_dir", "max_length", *OWN_ARGUMENTS))
            raise MptTrtError(f"--model_args {unknown[0]}: no such argument; there are {words}")
        if folder is None:
            raise MptTrtError("--model_args: engine_dir is missing; give engine_dir=FOLDER")
        own = {name: value for name, value in given.items() if name in OWN_ARGUMENTS}
        return cls(Engine.load(str(folder), **own), max_length)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        eos = self._tokenizer.eos_token_id
        return prefix_of(self._tokenizer) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context."""
        return prefix_of(self._tokenizer)

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache of requests."""
        return str(self._tokenizer.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Converts text to token ids, with the tokenizer's special tokens unless told otherwise.

        A text that begins with the prefix token gets no further special tokens.
        """
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self._tokenizer.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Scores continuations; long contexts are cut on the left."""
        passages = []
        for _texts, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise MptTrtError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length = "
                    f"{self.max_length}; build the engine with a larger max_input_len"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            passages.append(Passage(tokens, len(tokens) - len(continuation)))
        scores = score_passages(self._engine.loaded, passages)
        return [(score.total, bool(score.is_top.all())) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows that predict every token once."""
        windows = [
            list(rolling_windows(self.tok_encode(text), self.prefix_token_id, self.max_length))
            for (text,) in (request.args for request in requests)
        ]
        passages = [passage for each in windows for passage in each]
        scores = iter(score_passages(self._engine.loaded, passages))
        return [sum(next(scores).total for _ in each) for each in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop string, in batches of requests with equal settings."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        for indices in groups.values():
            encoded = [self.tok_encode(requests[index].args[0]) for index in indices]
            make = self._generator(requests[indices[0]].args[1])
            longest_first = sorted(range(len(indices)), key=lambda at: -len(encoded[at]))
            size = self._engine.loaded.model.max_batch_size
            for start in range(0, len(indices), size):
                batch = longest_first[start : start + size]
                found = make([encoded[at] for at in batch])
                texts |= {indices[at]: text for at, text in zip(batch, found, strict=True)}
        return [texts[index] for index in range(len(requests))]

    def _generator(self, settings: dict[str, Any]) -> Callable[[list[list[int]]], list[str]]:
        """Function from contexts to their continuations. settings: lm-eval's `gen_kwargs`."""
        settings = normalize_gen_kwargs(settings, MAX_NEW_TOKENS)
        end = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        stop = handle_stop_sequences(settings.pop("until", None), eos=end)
        max_new_tokens = settings.pop("max_gen_toks")
        options = _options(settings)
        room = self.max_length - max_new_tokens
        if room < 1:
            raise MptTrtError(
                f"max_gen_toks = {max_new_tokens} leaves no room for a context in max_length = "
                f"{self.max_length}; lower it (--gen_kwargs max_gen_toks=N) or build the engine "
                "with a larger max_input_len"
            )
        return partial(self._continue, room, max_new_tokens, options | {"stop": stop})

    def _continue(
        self,
        room: int,
        max_new_tokens: int,
        options: GenerationOptions,
        contexts: list[list[int]],
    ) -> list[str]:
        prompts = [context[-room:] for context in contexts]
        outputs = self._engine.generate(prompts, max_new_tokens, **options)
        return [output.text for output in outputs]


def _options(settings: dict[str, Any]) -> GenerationOptions:
    """Translates the remaining generation settings of lm-eval, which are transformers' names."""
    given = dict(settings)
    is_sampling, temperature = given.pop("do_sample", False), given.pop("temperature", 0.0)
    options: GenerationOptions = {}
    if is_sampling:
        options["temperature"] = temperature or 1.0
        options["top_k"] = given.pop("top_k", 50)
        options["top_p"] = given.pop("top_p", 1.0)
    for name in ("top_k", "top_p"):
        given.pop(name, None)
    if given:
        raise MptTrtError(
            f"gen_kwargs {min(given)}: no such setting; there are until, max_gen_toks, do_sample, "
            "temperature, top_k and top_p"
        )
    return options
