"""Generates tokens with any runtime: greedy, sampling and beam search.

A runtime needs only the three methods of `StepModel`. The results follow Hugging Face transformers
5.14 (`GenerationMixin._sample`, `GenerationMixin._beam_search` with `early_stopping=False`, and the
logits processors): for the same logits, all tokens are the same.

In shapes, `batch` is the number of prompts, `beams` that of hypotheses per prompt, `rows` that of
cache rows (`batch * beams`, with adjacent beams of a prompt), and `vocab` the size of the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mpt_trt.engines.interface import StepModel
from mpt_trt.errors import MptTrtError
from mpt_trt.generation.beam_search import beam_search
from mpt_trt.generation.config import Generated, GenerationConfig
from mpt_trt.generation.sampling import OnToken, Sequences, generate_sequences
from mpt_trt.generation.stepping import OnStep, PromptBatch, Stepper


def generate(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: OnToken | None = None,
    on_step: OnStep | None = None,
) -> list[list[Generated]]:
    """Continues every prompt; lengths may differ, and outputs do not depend on other prompts.

    Returns:
        For each prompt, `config.num_beams` hypotheses, best first.

    Raises:
        MptTrtError: the request does not fit the model (checked before the model runs), or
        `on_token` is given with beams.
        FloatingPointError: no token can be chosen from the model's logits.
    """
    if on_token is not None and config.num_beams > 1:
        raise MptTrtError(
            f"streaming and stop strings need num_beams 1, and it is {config.num_beams}: until beam"
            " search ends no token is certain; leave them out or set num_beams to 1"
        )
    if len(prompts) == 0:
        return []
    if config.num_beams > 1:
        return beam_search(_stepper(model, prompts, config, on_step), config)
    *_, sequences = generate_steps(model, prompts, config, on_token, on_step)
    return sequences.generated()


def generate_steps(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_token: OnToken | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Sequences]:
    """Continues at least one prompt, without beams, and gives the caller a turn after each step.

    Yields:
        The growing sequences, the same object after every step. `on_token` was called before.

    Raises:
        MptTrtError, FloatingPointError: as `generate`; a request that does not fit is found before
        the first step.
    """
    stepper = _stepper(model, prompts, config, on_step)
    return generate_sequences(stepper, config, on_token or _ignore)


def require_fitting(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    wants_tokens: bool = True,
) -> list[NDArray[np.int64]]:
    """Returns prompts as arrays; raises MptTrtError when the request does not fit the model.

    wants_tokens: whether tokens are generated; otherwise prompts are only read.
    """
    rows = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
    _check_vocabulary(model, rows, config)
    _check_capacity(model, rows, config, config.max_new_tokens if wants_tokens else 0)
    return rows


def _stepper(
    model: StepModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    on_step: OnStep | None,
) -> Stepper:
    rows = require_fitting(model, prompts, config)
    return Stepper(model, PromptBatch.padded(rows, config.pad_id), on_step or _ignore)


def _ignore(*_: object) -> None:
    """Default callback, which does nothing."""


def _check_vocabulary(
    model: StepModel, prompts: list[NDArray[np.int64]], config: GenerationConfig
) -> None:
    legal = f"the vocabulary is 0..{model.vocab_size - 1}"
    ends = [("end_ids", token) for token in config.end_ids]
    for field, token in (*ends, ("pad_id", config.pad_id)):
        if token >= model.vocab_size:
            raise MptTrtError(
                f"token {token} of {field} does not exist, because {legal}; take it from the"
                " model's tokenizer"
            )
    for index, prompt in enumerate(prompts):
        if prompt.size == 0:
            raise MptTrtError(f"prompt {index} is empty; it must hold at least 1 token")
        strange = prompt[(prompt < 0) | (prompt >= model.vocab_size)]
        if strange.size:
            raise MptTrtError(
                f"prompt {index} holds token {strange[0]} and {legal};"
                " encode it with the model's own tokenizer"
            )
    if config.num_beams > 1 and config.num_candidates > model.vocab_size:
        most = model.vocab_size * config.num_beams // config.num_candidates
        raise MptTrtError(
            f"num_beams is {config.num_beams}, too many for a vocabulary of {model.vocab_size}"
            f" tokens; it must be at most {most}"
        )


def _check_capacity(
    model: StepModel, prompts: list[NDArray[np.int64]], config: GenerationConfig, num_new: int
) -> None:
    for index, prompt in enumerate(prompts):
        needed = prompt.size + num_new
        if needed > model.capacity:
            raise MptTrtError(
                f"prompt {index} has {prompt.size} tokens, which with max_new_tokens"
                f" {num_new} makes {needed}, but a cache row holds {model.capacity};"
                " shorten the prompt, lower max_new_tokens or build for longer sequences"
            )
    needed = len(prompts) * config.num_beams
    if needed > model.max_batch_size:
        raise MptTrtError(
            f"{len(prompts)} prompt(s) with num_beams {config.num_beams} need {needed} cache rows,"
            f" but the model has {model.max_batch_size}; send fewer prompts at a time, lower"
            " num_beams or build for a larger batch"
        )
