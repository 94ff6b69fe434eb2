"""Measures products with 4- and 8-bit weights under ONNX Runtime on a GPU, in both layouts.

Measures milliseconds of all products of a model's layers for several numbers of rows, as one CUDA
graph, and the GPU's read rate. Weights are random. As many layers are measured as exceed the GPU's
cache, and the result is scaled up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

from common import REPOSITORY, timed, write_result
from gpu_decode import gpu_name, read_rate

sys.path.insert(0, str(REPOSITORY))

import numpy as np
import onnx
from cuda.bindings import runtime as cudart
from onnx import TensorProto, helper

from mpt_trt.engines.cuda.graphs import PLAIN_RUNS, StepGraphs
from mpt_trt.engines.cuda.memory import DeviceBuffer, call
from mpt_trt.engines.onnxruntime.cuda.matmul_nbits import INTEGER_BITS
from mpt_trt.engines.onnxruntime.cuda.session import CudaSession
from mpt_trt.engines.onnxruntime.cuda.shared_weights import share_weights
from mpt_trt.network.graph import external_tensor

# Input and output features of a layer's matrices in MPT-7B.
SHAPES = ((4096, 12288), (4096, 4096), (4096, 16384), (16384, 4096))
MODEL_LAYERS = 32
LAYERS = 8
GROUP_SIZE = 128
ROWS = (1, 2, 4, 8, 16, 64, 512, 2048)
REPLAYS = 20
FLOAT16_BYTES = 2
TYPES = {bits: element_type for element_type, bits in INTEGER_BITS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict = {"gpu": gpu_name(), "read_gb_per_s": read_rate() / 1e9, "layers": []}
    with tempfile.TemporaryDirectory() as folder:
        for bits in TYPES:
            for layout, prepacked_bits in (("columns", ()), ("tiles", (bits,))):
                network = LinearLayers(Path(folder), bits, prepacked_bits)
                found = {rows: network.milliseconds(rows) for rows in arguments.rows}
                figures["layers"].append({"bits": bits, "layout": layout, "ms": found})
                print(figures["layers"][-1], flush=True)
    print(write_result("gpu-products", figures))


class LinearLayers:
    """A network that contains only products, on the GPU."""

    def __init__(self, folder: Path, bits: int, prepacked_bits: Collection[int]):
        model = integer_network(folder, bits)
        weights = share_weights(model, folder, prepacked_bits)
        constants = {weight.name: weight.as_value() for weight in weights.constants}
        self._stream = call(cudart.cudaStreamCreate())
        self._session = CudaSession(model, folder / "products", self._stream, constants)
        self._graphs = StepGraphs(self._stream)
        self._weights = {weight.name: DeviceBuffer(weight.size) for weight in weights.inputs}
        for weight in weights.inputs:
            buffer = self._weights[weight.name]
            buffer.copy_from(weight.read(), self._stream)
            self._session.bind_input(weight.name, weight.element_type, weight.shape, buffer.address)

    def milliseconds(self, rows: int) -> float:
        """Measures the model's layers, median of several replays."""
        buffers = []
        for name, width in (*inputs(), *outputs()):
            buffers.append(DeviceBuffer(rows * width * FLOAT16_BYTES))
            bind = self._session.bind_input if name[0] == "x" else self._session.bind_output
            bind(name, TensorProto.FLOAT16, (rows, width), buffers[-1].address)

        def run() -> None:
            self._graphs.run(rows, self._session.run, self._session.enqueue)
            call(cudart.cudaStreamSynchronize(self._stream))

        for _ in range(PLAIN_RUNS + 1):
            run()
        seconds = statistics.median(timed(run) for _ in range(REPLAYS))
        return 1e3 * seconds * MODEL_LAYERS / LAYERS


def inputs() -> list[tuple[str, int]]:
    return [(f"x{height}", height) for height in sorted({height for height, _ in SHAPES})]


def outputs() -> list[tuple[str, int]]:
    return [(f"y{index}", width) for index, (_, width) in enumerate(SHAPES * LAYERS)]


def integer_network(folder: Path, bits: int) -> onnx.ModelProto:
    """Makes layers of the same random integers, each of which is read separately."""
    rng = np.random.default_rng(0)
    for height, width in SHAPES:
        content = rng.integers(0, 256, height * width * bits // 8, np.uint8)
        content.tofile(folder / f"{bits}-{height}x{width}")
        scales = rng.uniform(0.001, 0.002, scale_shape(bits, height, width))
        scales.astype(np.float16).tofile(folder / f"{bits}-{height}x{width}.scales")
    nodes, initializers = [], []
    for index, (height, width) in enumerate(SHAPES * LAYERS):
        file = f"{bits}-{height}x{width}"
        shape = scale_shape(bits, height, width)
        initializers += [
            external_tensor(f"w{index}", TYPES[bits], (height, width), file),
            external_tensor(f"s{index}", TensorProto.FLOAT16, shape, f"{file}.scales"),
        ]
        by_group = {"axis": 0, "block_size": GROUP_SIZE} if len(shape) == 2 else {"axis": 1}
        nodes += [
            helper.make_node(
                "DequantizeLinear",
                [f"w{index}", f"s{index}"],
                [f"d{index}"],
                name=f"d{index}",
                **by_group,
            ),
            helper.make_node(
                "MatMul", [f"x{height}", f"d{index}"], [f"y{index}"], name=f"y{index}"
            ),
        ]
    values = [
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["rows", width])
            for name, width in part
        ]
        for part in (inputs(), outputs())
    ]
    graph = helper.make_graph(nodes, "products", *values, initializer=initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def scale_shape(bits: int, height: int, width: int) -> tuple[int, ...]:
    """Shape of the scales: one per group of 4-bit weights, one per column of others."""
    return (height // GROUP_SIZE, width) if bits == 4 else (width,)


if __name__ == "__main__":
    main()
