"""ONNX Runtime's CUDA engine on a simulated GPU, against the same network on a CPU.

A rank of several runs alone here: the others' tensors are taken to be the same, on both sides.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.tensorrt.test_simulated_engine import tiny
from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE, Model
from engines.test_ranks import ARCHITECTURES, VOCABULARIES, converted
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.onnxruntime.cpu_engine import OnnxRuntimeEngine
from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from support.echo_ranks import EchoRanks
from support.engines import LIMITS, ONE_THREAD
from support.simulated.install import build_simulated, installed, installed_onnxruntime_gpu
from support.step_scenario import require_same_steps, require_same_text

__all__ = ["converted", "tiny"]

# Another order of float32 sums, as a multiple of the logits' standard deviation. Where activations
# or the cache are rounded to 8 bits, it can move a value by a step.
BOUND = 2e-5
ROUNDED_BOUND = 0.5


def require_same(inputs: NetworkInputs, rank: int, folder: Path, bound: float = BOUND) -> None:
    engine_dir = build_simulated(inputs, folder / "engine")
    manifest, size = read_manifest(engine_dir), inputs.checkpoint.tp_size
    vocab_size = manifest.spec.config.vocab_size
    ranks = EchoRanks(rank, size) if size > 1 else None
    theirs = OnnxRuntimeEngine(engine_dir, manifest, ONE_THREAD, ranks)  # type: ignore[arg-type]
    with installed(ranks=ranks) as simulation, installed_onnxruntime_gpu(simulation):  # type: ignore[arg-type]
        ours = OnnxCudaEngine(engine_dir, manifest, rank)
        if ranks is not None:
            ours.join(ranks)  # type: ignore[arg-type]
        require_same_steps(ours, theirs, vocab_size, bound)
        if bound == BOUND:
            require_same_text(ours, theirs, vocab_size)
        assert simulation.cuda.launches, "no step was captured"
        del ours


@pytest.mark.parametrize(
    ("name", "size", "rank", "vocabulary"),
    [
        ("4 heads", 1, 0, "nothing sharded"),
        ("4 heads", 2, 1, "head sharded"),
        ("12 heads, 4 K/V", 2, 0, "both sharded"),
        ("multi-query", 4, 3, "nothing sharded"),
        ("8 heads, 2 K/V", 4, 1, "head sharded"),
        ("biases", 2, 0, "head sharded"),
        ("qk_ln, multi-query", 4, 2, "embedding sharded"),
        ("rope, qk_ln", 4, 3, "head sharded"),
        ("learned positions, rmsnorm", 2, 1, "both sharded"),
        ("vocabulary of 131", 2, 1, "head sharded"),
        ("vocabulary of 131", 4, 3, "embedding sharded"),
        ("vocabulary of 131, untied", 4, 3, "both sharded"),
    ],
)
def test_architectures(name, size, rank, vocabulary, converted, tmp_path):
    checkpoint = converted(ARCHITECTURES[name], size)
    require_same(NetworkInputs(checkpoint, LIMITS, VOCABULARIES[vocabulary]), rank, tmp_path)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "name", ["int8_weight_only", "int4_awq", "sq", "fp8", "int8 cache", "fp8 cache"]
)
def test_quantizations_and_caches(name, size, tiny: Model, tmp_path):
    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    checkpoint = tiny.checkpoint(quantization, size)
    calibrated = tiny.calibrated(quantization, checkpoint)
    is_rounded = name in ("sq", "fp8") or quantization.kv_cache != "auto"
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding(), calibrated)
    require_same(inputs, size - 1, tmp_path, ROUNDED_BOUND if is_rounded else BOUND)


@pytest.mark.parametrize("size", [1, 2])
def test_a_head_of_8_bits(size, tiny: Model, tmp_path):
    quantization = Quantization(WeightOnly(8), head="int8")
    calibrated = CalibratedQuantization(quantization)
    checkpoint = tiny.checkpoint(Quantization(), size)
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding(), calibrated)
    require_same(inputs, size - 1, tmp_path)


def test_an_engine_of_one_rank_has_nothing_to_connect(tiny: Model, tmp_path):
    checkpoint = tiny.checkpoint(Quantization(), 1)
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding(), NOT_QUANTIZED)
    engine_dir = build_simulated(inputs, tmp_path / "engine")
    with installed() as simulation, installed_onnxruntime_gpu(simulation):
        engine = OnnxCudaEngine(engine_dir, read_manifest(engine_dir))
        with pytest.raises(RuntimeError, match="nothing to connect"):
            engine.connect(None)  # type: ignore[arg-type]
        del engine
