"""The shapes of real models, cut to two blocks, from random checkpoint to plan and logits.

These tests cover what small models cannot: matrices of gigabytes, real head sizes and vocabularies,
and TensorRT's builds of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.memory import rank_weights
from mpt_trt.engines.spec import BuilderChoice, BuildLimits, EngineSpec
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from references.merged_ranks import MergedRanks
from support.engines import call_tool, deviation, feed, run_tool

pytestmark = pytest.mark.nightly

MODELS = ("mpt-7b", "mpt-30b", "replit-code-v1_5-3b")
# With much smaller limits TensorRT stores some matrices twice, in another layout for single tokens.
LIMITS = BuildLimits(max_batch_size=8, max_input_len=256, max_output_len=256)
PROMPT_LEN = 12
VOCABULARIES = {
    1: VocabularySharding(embedding=False, head=False),
    2: VocabularySharding(embedding=False, head=True),
    4: VocabularySharding(embedding=True, head=True),
}
# In standard deviations of the logits: float16 rounds to 5e-4, in two blocks a few dozen times.
# Up to 4.4e-3 was measured.
FLOAT16_BOUND = 1.5e-2


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory) -> Iterator[Path]:
    """A random float16 checkpoint, which is removed in the end."""
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    made = run_tool(
        "make_random_checkpoint.py", "--like", request.param, "--layers=2", f"--output_dir={folder}"
    )
    assert made.returncode == 0, made.stderr
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[1, seq]` and the reference's logits `[1, seq, vocab]`."""
    ids = np.random.default_rng(0).integers(0, 30_000, (1, PROMPT_LEN))
    return ids, reference_logits(checkpoint, ids[0].tolist()).numpy()[None]


@pytest.fixture
def work(tmp_path) -> Iterator[Path]:
    """A folder that is empty again after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_conversion_network_logits_and_plan(checkpoint, expected, tp_size, work):
    arguments = ("-i", checkpoint, "-o", work, "-tp", tp_size, "-t", "float16")
    call_tool("convert_hf_mpt_to_ft.py", *arguments)
    ft_checkpoint = read_ft_checkpoint(work / f"{tp_size}-gpu")
    networks = work / "networks"
    networks.mkdir()
    write_networks(NetworkInputs(ft_checkpoint, LIMITS, VOCABULARIES[tp_size]), networks)

    ids, logits = expected
    found = feed(MergedRanks(networks, tp_size, num_threads=2), ids, [PROMPT_LEN - 2, 1, 1])
    assert deviation(found, logits) < FLOAT16_BOUND

    for rank in sorted({0, tp_size - 1}):
        check_plan(networks, rank, ft_checkpoint, work / "plan")


def check_plan(networks: Path, rank: int, checkpoint: FtCheckpoint, target: Path) -> None:
    """Builds a rank's plan, whose size must be that of the documentation's tables."""
    build_rank(networks, rank, BuilderChoice("tensorrt_rtx", ("8.0",)), target)
    tp_size = checkpoint.tp_size
    spec = EngineSpec(checkpoint.config, "float16", tp_size, LIMITS, VOCABULARIES[tp_size])
    expected = rank_weights(spec)
    size = (target / f"rank{rank}.engine").stat().st_size
    assert expected < size < 1.1 * expected
    shutil.rmtree(target)
