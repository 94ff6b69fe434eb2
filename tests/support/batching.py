"""Requests through a scheduler, for comparison with what they get alone."""

from __future__ import annotations

from collections.abc import Sequence

from mpt_trt.engines.interface import RowModel
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.scheduling.scheduler import Request, Scheduler


def batched(
    model: RowModel,
    prompts: Sequence[Sequence[int]],
    configs: Sequence[GenerationConfig],
    steps_between: int = 1,
) -> list[tuple[int, ...]]:
    """Tokens of each prompt, where the next one comes `steps_between` steps later."""
    scheduler = Scheduler(model)
    found: list[list[int]] = [[] for _ in prompts]
    for tokens, prompt, config in zip(found, prompts, configs, strict=True):
        request = Request(
            tuple(prompt),
            config,
            on_token=lambda new, tokens=tokens: tokens.append(new.token),
            on_end=_require_no_error,
        )
        scheduler.require_fitting(request)
        scheduler.add(request)
        for _ in range(steps_between):
            scheduler.run_once()
    while not scheduler.is_idle:
        scheduler.run_once()
    return [tuple(tokens) for tokens in found]


def _require_no_error(error: Exception | None) -> None:
    assert error is None, error
