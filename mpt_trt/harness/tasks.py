"""Runs tasks of lm-eval on an engine, with data of this machine only."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpt_trt.errors import MptTrtError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from mpt_trt.api.engine import Engine

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Variables that keep the libraries of Hugging Face from the network."""


class TaskError(MptTrtError):
    """A task that cannot run here: lm-eval, the task or its data is missing."""


def open_model(engine: Engine, max_length: int | None = None) -> LM:
    """Makes a loaded engine a model of lm-eval. max_length: see `EngineModel`.

    Raises TaskError when lm-eval is not installed, and MptTrtError when there is no tokenizer.
    """
    require_lm_eval()
    from mpt_trt.harness.model import EngineModel  # imports lm-eval

    return EngineModel(engine, max_length)


def require_lm_eval() -> None:
    """Raises TaskError when lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError("lm_eval is not installed; install it: pip install lm_eval")


def run_tasks(model: LM, names: Sequence[str], folder: Path | None) -> dict[str, dict[str, float]]:
    """Runs tasks on a model of lm-eval, and returns their metrics by task. Every rank takes part.

    folder: task files (YAML) in addition to lm-eval's own tasks. Relative paths in them start at
    the folder. They can name Python functions, which are executed.

    Raises TaskError when lm-eval is not installed, a task is unknown, its data are not on this
    machine, or it fails. Raises FloatingPointError when a logit is not finite.
    """
    require_lm_eval()
    if folder is not None and not folder.is_dir():
        raise TaskError(f"{folder}: no such folder of tasks; set quality.task_dir in config.yaml")
    place = None if folder is None else folder.resolve()
    with _offline(), contextlib.chdir(place or Path()):
        manager = _manager_of(names, place)
        if unknown := [name for name in names if name not in manager.all_subtasks]:
            where = "lm-eval" if folder is None else f"lm-eval or {folder}"
            raise TaskError(
                f"task {unknown[0]}: not a task of {where}; check its name, and that its file is "
                "valid YAML"
            )
        return {name: _run(model, name, manager) for name in names}


def _manager_of(names: Sequence[str], folder: Path | None) -> TaskManager:
    """The tasks of the folder, and lm-eval's own if they are needed, because that takes seconds."""
    from lm_eval.tasks import TaskManager  # optional, and slow to import

    if folder is not None:
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if folder is None else str(folder))


def _run(model: LM, name: str, manager: TaskManager) -> dict[str, float]:
    from lm_eval import simple_evaluate  # as above

    try:
        manager.load([name])
    except Exception as error:  # the libraries raise many types
        if _is_about_data(error):
            raise TaskError(
                f"task {name}: its data are not on this machine ({_reason(error)}); download them "
                "with lm-eval, or give a task with local data"
            ) from None
        raise TaskError(
            f"task {name}: cannot be loaded ({_reason(error)}); correct its task file"
        ) from None
    try:
        result = simple_evaluate(
            model=model, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=False
        )
        return metrics_of(result["results"][name])
    except (FloatingPointError, MemoryError):
        raise  # They are the engine's and the machine's.
    except Exception as error:
        raise TaskError(f"task {name}: fails in lm-eval ({_reason(error)})") from error


def _is_about_data(error: Exception) -> bool:
    """Returns whether the libraries lack a data set: a file, a folder, or the network."""
    # `datasets` raises a ValueError when the hub is offline and its cache has another data set.
    return isinstance(error, OSError) or "couldn't find" in str(error).lower()


def _reason(error: Exception) -> str:
    """Type and message of an error, on a line of limited length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def metrics_of(figures: dict[str, Any]) -> dict[str, float]:
    """Metrics of a task's results; `acc` for lm-eval's `acc,none`, without standard errors."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in figures.items()
        if isinstance(value, int | float)
        and key != "sample_len"
        and "_stderr" not in key
        and math.isfinite(value)
    }


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps the libraries from the network, which they are told when they are imported."""
    import datasets
    import huggingface_hub.constants

    before = {name: os.environ.get(name) for name in OFFLINE}
    flags = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    flags = [(module, flag) for module, flag in flags if hasattr(module, flag)]
    values = [getattr(module, flag) for module, flag in flags]
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    for module, flag in flags:
        setattr(module, flag, True)
    try:
        yield
    finally:
        for (module, flag), value in zip(flags, values, strict=True):
            setattr(module, flag, value)
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
