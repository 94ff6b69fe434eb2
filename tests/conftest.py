"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from mpt_trt.system import verified_files
from support.built import Built
from support.checkpoints import CheckpointSpec
from support.demo import make_demo_engine
from support.engines import build, make_ft_checkpoint
from support.forks.servers import serving_forks
from support.ft import CLI

# Time limits on a busy machine say nothing about a property. In CI, the examples are the same in
# each run, so that a change fails only for what it does; anywhere else, they are new.
settings.register_profile("ours", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ours")

# The models of the tests are far too small to gain from more threads, which wait for each other.
# The variable is for the programs that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# The longest files, which run first: the others then fill both workers up to the end.
LONGEST = (
    "evaluation/test_quality_bounds.py",
    "engines/test_quantized_engines.py",
    "workflow/test_workflow.py",
    "engines/test_mpi.py",
    "workflow/test_gpu_request.py",
    "workflow/test_report_workflow.py",
    "checkpoint/test_hub.py",
    "engines/tensorrt/test_plan_builder.py",
    "calibration/test_gptq.py",
    "engines/tensorrt/test_simulated_ranks.py",
    "engines/test_ranks.py",
    "engines/onnxruntime/test_cuda_ranks.py",
    "engines/trtllm/test_build.py",
    "engines/trtllm/test_checkpoint.py",
    "ft/test_checkpoint.py",
    "tools/test_demo_model.py",
    "workflow/test_workflow_quantize.py",
)

# Shells let what they start in the background ignore it, and programs that tests interrupt with it
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


OF_RUN = pytest.StashKey[contextlib.ExitStack]()


def pytest_configure(config: pytest.Config) -> None:
    """Gives the tests, and the programs that they start, a cache folder that is not the user's.

    Also starts the servers that fork programs for tests.
    """
    # Workers of pytest-xdist inherit those of the process that started them.
    if not hasattr(config, "workerinput"):
        stack = config.stash[OF_RUN] = contextlib.ExitStack()
        cache = tempfile.TemporaryDirectory(prefix="mpt-trt-cache-", ignore_cleanup_errors=True)
        os.environ["XDG_CACHE_HOME"] = stack.enter_context(cache)
        stack.enter_context(serving_forks())


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes that cache folder, and ends the servers."""
    if OF_RUN in config.stash:
        config.stash[OF_RUN].close()


def pytest_runtest_setup() -> None:
    """Forgets the files that earlier tests have made or compared.

    Every conversion and every engine reads and writes all of that memory, which would grow to
    megabytes in the course of the run.
    """
    memory = Path(os.environ["XDG_CACHE_HOME"], "mpt-trt", verified_files.FILE_NAME)
    memory.unlink(missing_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; the order within a file stays."""
    longest = [Path(__file__).parent / name for name in LONGEST]
    items.sort(key=lambda item: longest.index(item.path) if item.path in longest else len(longest))


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Runs the converter's command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(CLI), *map(str, arguments)])
        runpy.run_path(str(CLI), run_name="__main__")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A float32 engine that transformers can be held against."""
    folder = tmp_path_factory.mktemp("built")
    spec = CheckpointSpec(num_heads=6, seed=1)
    checkpoint = make_ft_checkpoint(folder, spec)
    engine = build(checkpoint, folder / "engine")
    return Built(spec, folder / "hf", checkpoint.folder, engine)


@pytest.fixture(scope="session")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the model that ships, with its tokenizer: 4 rows of 96 positions."""
    return make_demo_engine(tmp_path_factory.mktemp("demo"))
