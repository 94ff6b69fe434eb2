"""Sessions of ONNX Runtime's CUDA provider, whose kernels are those of its CPU provider.

Runs are operations on a simulated stream, so they see the memory as kernels on a GPU would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from mpt_trt.engines.onnxruntime import session as portable_session
from mpt_trt.engines.onnxruntime.cuda.session import CudaSession
from support.simulated.cuda import Operation, SimulatedCuda

CPU = "CPUExecutionProvider"


class SimulatedCudaSession(CudaSession):
    """A session on simulated GPU memory. cuda: set by `install`."""

    cuda: SimulatedCuda

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        stream: Any,
        constants: dict[str, onnxruntime.OrtValue],
        custom_operators: Path | None = None,
    ):
        assert not constants, "the prepacked layout needs a GPU"
        options = portable_session.session_options(path)
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if custom_operators is not None:
            options.register_custom_ops_library(str(custom_operators))
        self._session = portable_session.open_session(model, path, options, (CPU, {}))
        self._stream = stream
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._bound: dict[tuple[str, str], tuple] = {}

    def bind_input(
        self, name: str, element_type: int, shape: tuple[int, ...], address: int
    ) -> None:
        self._bound["bind_input", name] = (name, "cpu", 0, element_type, shape, address)

    def bind_output(
        self, name: str, element_type: int, shape: tuple[int, ...], address: int
    ) -> None:
        self._bound["bind_output", name] = (name, "cpu", 0, element_type, shape, address)

    def bind_host_input(self, name: str, value: NDArray) -> None:
        copied = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(value))
        self._bound["bind_ortvalue_input", name] = (name, copied)

    def run(self) -> None:
        self.enqueue()
        self.cuda.cudaStreamSynchronize(self._stream)

    def enqueue(self) -> None:
        binding = self._session.io_binding()
        for (method, _), arguments in self._bound.items():
            getattr(binding, method)(*arguments)
        # The operation keeps the session alive, as a graph keeps what it has captured.
        operation = Operation("network", lambda: portable_session.run(self._session, binding))
        self.cuda.put(self._stream, operation)
