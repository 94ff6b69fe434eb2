"""Engines of several ranks on the simulated TensorRT, as processes under a real MPI."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.tensorrt.test_simulated_engine import TINY, tiny
from engines.test_mpi import BOTH, WHOLE, mpirun
from engines.test_quantized_engines import QUANTIZATIONS, WITH_FP8_CACHE, Model
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.quantization.schemes import Quantization
from support import simulated_driver
from support.engines import LIMITS
from support.simulated.install import build_simulated

__all__ = ["tiny"]

EVERY = QUANTIZATIONS | WITH_FP8_CACHE | {"none": Quantization()}
# As they are, quantized, and each type of cache.
NAMES = {
    2: ("none", "int8 cache", "sq", "fp8, fp8 cache"),
    4: ("int4_weight_only", "fp8 cache"),
}
# In float32, ONNX Runtime computes the same in the simulated TensorRT as by itself.
BOUND = 0


def make_engines(model: Model, tp_size: int, folder: Path) -> list[Path]:
    made = []
    for name in NAMES[tp_size]:
        quantization = EVERY[name]
        checkpoint = model.checkpoint(quantization, tp_size)
        calibrated = NOT_QUANTIZED
        if name != "none":
            calibrated = model.calibrated(quantization, checkpoint)
        vocabulary = BOTH if name in ("none", "int4_weight_only") else WHOLE
        inputs = NetworkInputs(checkpoint, LIMITS, vocabulary, calibrated)
        made.append(build_simulated(inputs, folder / name))
    return made


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_compute_what_their_networks_do(tp_size, tiny, tmp_path):
    engines = make_engines(tiny, tp_size, tmp_path)
    script = Path(simulated_driver.__file__)
    # The script's folder must not be searched: it has modules of the names of packages.
    arguments = (TINY.vocab_size, BOUND, *engines)
    finished = mpirun(tp_size, script, *arguments, PYTHONSAFEPATH="1")
    assert finished.status == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("the same") == tp_size
