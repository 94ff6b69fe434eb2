"""The head and the embedding in 8 bits: against a model whose tables were rounded before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines import memory
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.spec import BuilderChoice, BuildLimits, EngineSpec
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from references import plain_mpt
from references.merged_ranks import MergedRanks
from support.checkpoints import CheckpointSpec, config_dict, tensors, write_checkpoint
from support.cuda import require_same
from support.engines import LIMITS, deviation, feed, make_network, open_network, random_ids

INT8_HEAD = CalibratedQuantization(Quantization(head="int8"))
SPECS = {
    "tied": CheckpointSpec(vocab_size=96, num_layers=1),
    "untied": CheckpointSpec(vocab_size=131, num_layers=1, tie_word_embeddings=False),
    # The last ranks hold nothing.
    "few tokens": CheckpointSpec(vocab_size=5, num_layers=1),
    "no block divides": CheckpointSpec(hidden_size=60, vocab_size=31, num_layers=1),
}
VOCABULARIES = [VocabularySharding(e, h) for e in (False, True) for h in (False, True)]


def rounded(table: torch.Tensor) -> torch.Tensor:
    """Each row to 255 steps of its amax / 127."""
    step = table.abs().amax(1, keepdim=True) / 127
    return torch.round(table / step) * step


def expected(spec: CheckpointSpec, ids: np.ndarray) -> np.ndarray:
    stored = tensors(spec)
    for name in ("transformer.wte.weight", "transformer.lm_head.weight", "lm_head.weight"):
        if name in stored:
            stored[name] = rounded(stored[name])
    return plain_mpt.forward(config_dict(spec), stored, torch.from_numpy(ids)).numpy()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("converted")

    def convert(name: str, tp_size: int, storage: str = "float32") -> FtCheckpoint:
        hf, target = folder / name, folder / f"{name}-ft-{storage}" / f"{tp_size}-gpu"
        if not hf.exists():
            write_checkpoint(hf, SPECS[name])
        if not target.exists():
            config = read_hf_config(hf)
            settings = ConversionSettings(storage, tp_size, 0, "test-model", {})
            write_ft_checkpoint(HfCheckpoint(hf, weights(config)), config, settings, target)
        return read_ft_checkpoint(target)

    return convert


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", SPECS)
def test_ranks_compute_with_rounded_tables(name, tp_size, vocabulary, converted, tmp_path) -> None:
    ids = random_ids(SPECS[name], rows=2, length=9)
    inputs = NetworkInputs(converted(name, tp_size), LIMITS, vocabulary, INT8_HEAD)
    write_networks(inputs, tmp_path)
    found = feed(MergedRanks(tmp_path, tp_size), ids, [7, 1, 1])
    assert deviation(found, expected(SPECS[name], ids)) < 1e-5


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_onnx_runtime_reads_integers(name, storage, converted, tmp_path) -> None:
    """Products and gathered rows; scales in 16 bits move some integers by a step."""
    ids = random_ids(SPECS[name], rows=2, length=9)
    folder = make_network(converted(name, 1, storage), tmp_path / "n", LIMITS, INT8_HEAD)
    found = feed(open_network(folder), ids, [7, 1, 1])
    bound = {"float32": 1e-5, "float16": 5e-2, "bfloat16": 0.2}[storage]
    assert deviation(found, expected(SPECS[name], ids)) < bound


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_gpu_would_compute_the_same(name, converted, tmp_path) -> None:
    folder = make_network(converted(name, 1), tmp_path / "n", LIMITS, INT8_HEAD)
    _, steps = require_same(folder, SPECS[name].vocab_size)
    assert [node.op_type for node in steps.graph.node].count("MatMulNBits") == 1
    assert "DequantizeLinear" not in {node.op_type for node in steps.graph.node}


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=str)
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_sizes_are_planned_exactly(name, vocabulary, converted, tmp_path) -> None:
    checkpoint = converted(name, 2, "float16")
    calibrated = CalibratedQuantization(Quantization(WeightOnly(8), head="int8"))
    write_networks(NetworkInputs(checkpoint, LIMITS, vocabulary, calibrated), tmp_path)
    graph = onnx.load(tmp_path / "rank0.onnx", load_external_data=False).graph
    names = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    spec = EngineSpec(checkpoint.config, "float16", 2, LIMITS, vocabulary, calibrated.quantization)
    assert sum((tmp_path / name).stat().st_size for name in names) == memory.rank_weights(spec)


@pytest.mark.parametrize("vocabulary", [VOCABULARIES[1], VOCABULARIES[2]], ids=str)
def test_tensorrt_stores_a_byte_per_element(vocabulary, tmp_path) -> None:
    spec = CheckpointSpec(hidden_size=64, vocab_size=32768, num_layers=1, tie_word_embeddings=False)
    hf = write_checkpoint(tmp_path / "hf", spec)
    config = read_hf_config(hf)
    settings = ConversionSettings("float16", 2, 0, "test-model", {})
    write_ft_checkpoint(HfCheckpoint(hf, weights(config)), config, settings, tmp_path / "ft")
    checkpoint = read_ft_checkpoint(tmp_path / "ft")
    sizes = []
    for quantization in (Quantization(), Quantization(head="int8")):
        networks = tmp_path / f"networks-{quantization.head}"
        networks.mkdir()
        limits = BuildLimits(max_batch_size=2, max_input_len=16, max_output_len=16)
        calibrated = CalibratedQuantization(quantization)
        write_networks(NetworkInputs(checkpoint, limits, vocabulary, calibrated), networks)
        plan: Path = tmp_path / f"plan-{quantization.head}"
        build_rank(networks, 1, BuilderChoice("tensorrt_rtx", ("8.0", "8.9", "12.0")), plan)
        sizes.append((plan / "rank1.engine").stat().st_size)
    table = config.vocab_size * config.hidden_size
    parts = [table // 2 if part else table for part in (vocabulary.embedding, vocabulary.head)]
    # Without the tables, both plans have about the same size.
    assert sizes[0] - sizes[1] == pytest.approx(sum(parts), abs=0.3 * sum(parts))
