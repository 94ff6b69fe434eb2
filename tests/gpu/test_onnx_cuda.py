"""Networks under ONNX Runtime's CUDA provider, against the same networks on the CPU.

Bounds are multiples of the logits' standard deviation; they are those of test_network.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.interface import StepModel
from mpt_trt.engines.manifest import read_network_manifest
from mpt_trt.generation.config import GenerationConfig
from mpt_trt.generation.generate import generate
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from support.checkpoints import CheckpointSpec
from support.engines import (
    FEATURES,
    LIMITS,
    deviation,
    make_ft_checkpoint,
    make_network,
    open_network,
    random_ids,
    step,
)

pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 5e-5, "float16": 3e-2, "bfloat16": 0.3}
WIDE = CheckpointSpec(hidden_size=256, num_heads=4, num_layers=2, vocab_size=301)
WEIGHT_ONLY = [WeightOnly(4, 64), WeightOnly(4), WeightOnly(8)]


def open_both(
    folder, spec, storage_type, calibrated=NOT_QUANTIZED, limits=LIMITS
) -> tuple[StepModel, StepModel]:
    """Opens the network on the GPU and on the CPU."""
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

    checkpoint = make_ft_checkpoint(folder, spec, storage_type)
    network = make_network(checkpoint, folder / "network", limits, calibrated)
    return OnnxCudaEngine(network, read_network_manifest(network)), open_network(network)


def require_alike(spec: CheckpointSpec, ours: StepModel, theirs: StepModel, bound: float) -> None:
    """A prompt in pieces, of which one is a token; tokens one by one; the same after reordering."""
    ids = random_ids(spec, 4, 12)
    for model in (ours, theirs):
        model.start(3)

    def compare(part: slice, position: list[int]) -> None:
        fed = ids[: len(position), part]
        found, expected = (step(model, fed, position) for model in (ours, theirs))
        assert deviation(found, expected) <= bound, part

    compare(slice(0, 5), [0] * 3)
    # One by one: as it is, captured, replayed.
    for position in range(5, 9):
        compare(slice(position, position + 1), [position] * 3)
    compare(slice(9, 11), [9] * 3)
    # Rows at different positions.
    compare(slice(11, 12), [4, 11, 7])
    for position, rows in ((11, [2, 2, 0, 1]), (12, [3, 0])):
        for model in (ours, theirs):
            model.reorder(np.array(rows))
        compare(slice(11, 12), [position] * len(rows))


def require_same_text(spec: CheckpointSpec, ours: StepModel, theirs: StepModel) -> None:
    """Greedy decoding of prompts of different lengths, and beam search, twice."""
    long, short = random_ids(spec, 2, 9).tolist()
    prompts = [long, short[:4]]
    for beams in (1, 2, 1):
        config = GenerationConfig(16, end_ids=(7,), pad_id=0, num_beams=beams)
        found, expected = generate(ours, prompts, config), generate(theirs, prompts, config)
        for mine, other in zip(found, expected, strict=True):
            assert [each.tokens for each in mine] == [each.tokens for each in other]
            for a, b in zip(mine, other, strict=True):
                assert a.cumulative_log_prob == pytest.approx(b.cumulative_log_prob, abs=1e-3)


@pytest.mark.parametrize("name", FEATURES)
def test_float32_networks(name, tmp_path):
    spec = FEATURES[name]
    ours, theirs = open_both(tmp_path, spec, "float32")
    require_alike(spec, ours, theirs, BOUNDS["float32"])
    require_same_text(spec, ours, theirs)


@pytest.mark.parametrize("storage_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "rmsnorm", "biases", "clip_qkv"])
def test_networks_of_16_bits(name, storage_type, tmp_path):
    spec = FEATURES[name]
    ours, theirs = open_both(tmp_path, spec, storage_type)
    require_alike(spec, ours, theirs, BOUNDS[storage_type])


@pytest.mark.parametrize("storage_type", BOUNDS)
@pytest.mark.parametrize("num_kv_heads", [8, 4, 1])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_prompts_of_multiples_of_4_and_8_tokens(head_dim, num_kv_heads, storage_type, tmp_path):
    """ONNX Runtime computes them with other kernels than prompts of other lengths."""
    spec = CheckpointSpec(
        hidden_size=8 * head_dim, num_heads=8, num_kv_heads=num_kv_heads, vocab_size=301
    )
    limits = replace(LIMITS, max_input_len=32, max_output_len=32)
    ours, theirs = open_both(tmp_path, spec, storage_type, limits=limits)
    ids = random_ids(spec, 2, 64)
    for model in (ours, theirs):
        model.start(2)
    start = 0
    for length in (8, 8, 16, 4, 12, 1, 7, 8):
        end = start + length
        found, expected = (step(model, ids[:, start:end], [start] * 2) for model in (ours, theirs))
        assert deviation(found, expected) <= BOUNDS[storage_type], (start, length)
        start = end


@pytest.mark.parametrize("rows", [LIMITS.max_batch_size, 64])
@pytest.mark.parametrize("storage_type", BOUNDS)
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_integer_weights(scheme, storage_type, rows, tmp_path):
    """Engines for more rows have the prepacked layout."""
    calibrated = CalibratedQuantization(Quantization(scheme, "auto"), None)
    limits = replace(LIMITS, max_batch_size=rows)
    ours, theirs = open_both(tmp_path, WIDE, storage_type, calibrated, limits)
    require_alike(WIDE, ours, theirs, BOUNDS[storage_type])
