"""Weights in GPU memory, from where all sessions read them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from mpt_trt.engines.cuda.memory import DeviceBuffer, call
from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.network.external_files import FilePart

LOADING_THREADS = 8


class UploadedWeights:
    """Copies of weights in GPU memory. addresses: of each, by name."""

    def __init__(self, weights: Sequence[SharedWeight], stream: Any):
        parts = {weight.name: _whole(weight, weights) for weight in weights}
        uploaded = [weight for weight in weights if parts[weight.name][0] is weight]
        self._buffers = {weight.name: DeviceBuffer(weight.size) for weight in uploaded}
        self.addresses = {
            name: self._buffers[whole.name].address + offset
            for name, (whole, offset) in parts.items()
        }

        def upload(weight: SharedWeight) -> None:
            content = np.ascontiguousarray(weight.read())
            self._buffers[weight.name].copy_from(content, stream)
            call(cudart.cudaStreamSynchronize(stream))

        with ThreadPoolExecutor(LOADING_THREADS) as pool:
            for _ in pool.map(upload, uploaded):
                pass


def _whole(weight: SharedWeight, weights: Sequence[SharedWeight]) -> tuple[SharedWeight, int]:
    """Finds the largest weight whose file contains this one, and the offset in it, in bytes."""
    best, offset = weight, 0
    for other in weights:
        place = _offset(weight.content, other.content)
        if place is not None and other.size > best.size:
            best, offset = other, place
    return best, offset


def _offset(part: object, whole: object) -> int | None:
    """Bytes from the start of `whole` to `part`, if it contains it; else None."""
    if not isinstance(part, FilePart) or not isinstance(whole, FilePart):
        return None
    offset = part.offset - whole.offset
    is_inside = part.path == whole.path and 0 <= offset <= whole.size - part.size
    return offset if is_inside else None
