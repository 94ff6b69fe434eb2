"""Weights in (simulated) GPU memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto

from mpt_trt.engines.cuda.memory import Stream
from mpt_trt.engines.onnxruntime.cuda.uploaded_weights import UploadedWeights
from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.network.external_files import FilePart
from support.simulated.install import installed
from support.simulated.memory import view

SIZE = 600


def test_a_part_of_another_weight_takes_no_memory(tmp_path: Path) -> None:
    path, other = tmp_path / "table.bin", tmp_path / "other.bin"
    content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(content.tobytes())
    other.write_bytes(content[::-1].tobytes())
    places = {
        "part": FilePart(path, 100, 40),
        "whole": FilePart(path, 0, SIZE),
        "end": FilePart(path, SIZE - 8, 8),
        "elsewhere": FilePart(other, 100, 40),
    }
    weights = [
        SharedWeight(name, TensorProto.UINT8, (part.size,), part) for name, part in places.items()
    ]
    weights.append(SharedWeight("computed", TensorProto.UINT8, (3,), lambda: content[:3].copy()))
    with installed() as simulation:
        stream = Stream()
        uploaded = UploadedWeights(weights, stream.handle)
        assert simulation.cuda.memory.used() == SIZE + 40 + 3
        for weight in weights:
            found = view(uploaded.addresses[weight.name], weight.size)
            assert np.array_equal(found, weight.read()), weight.name
        assert uploaded.addresses["part"] - uploaded.addresses["whole"] == 100
        del uploaded, stream
