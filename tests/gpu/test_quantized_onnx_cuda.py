"""Quantized networks of the demo model under ONNX Runtime's CUDA provider, against the CPU's.

Where activations are rounded to 8 bits, the least difference between two correct computations can
move a value by a whole step, so bounds are loose there; what is broken is off by more.
"""

from __future__ import annotations

import numpy as np
import pytest

from engines.test_quantized_engines import LIMITS, QUANTIZATIONS, WITH_FP8_CACHE, demo, held_out
from mpt_trt.engines.manifest import read_network_manifest
from mpt_trt.quantization.schemes import Fp8, SmoothQuant
from support.engines import deviation, make_network, open_network, step

__all__ = ["demo", "held_out"]

pytestmark = pytest.mark.gpu

EVERY = QUANTIZATIONS | WITH_FP8_CACHE
EXACT_BOUNDS = {"float32": 2e-3, "float16": 0.1}
ROUNDED_BOUND = 0.5


@pytest.mark.parametrize("storage_type", EXACT_BOUNDS)
@pytest.mark.parametrize("name", EVERY)
def test_quantized_networks(name, storage_type, demo, held_out, tmp_path):
    from mpt_trt.engines.onnxruntime.cuda.engine import OnnxCudaEngine

    quantization = EVERY[name]
    checkpoint = demo.checkpoint(quantization, 1, storage_type)
    calibrated = demo.calibrated(quantization, checkpoint)
    network = make_network(checkpoint, tmp_path / "network", LIMITS, calibrated)
    models = [OnnxCudaEngine(network, read_network_manifest(network)), open_network(network)]
    is_rounded = isinstance(quantization.scheme, SmoothQuant | Fp8)
    is_rounded = is_rounded or quantization.kv_cache != "auto"
    bound = ROUNDED_BOUND if is_rounded else EXACT_BOUNDS[storage_type]
    ids = np.concatenate([held_out, held_out[:, ::-1]])
    for model in models:
        model.start(2)
    for start, stop in ((0, 60), (60, 61), (61, 62), (62, 63), (63, 80)):
        found, expected = (step(model, ids[:, start:stop], [start] * 2) for model in models)
        assert deviation(found, expected) <= bound, (start, stop)
    for model in models:
        model.reorder(np.array([1, 1]))
    found, expected = (step(model, ids[:, 80:81], [80, 80]) for model in models)
    assert deviation(found, expected) <= bound
