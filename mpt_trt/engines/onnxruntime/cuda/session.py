"""Sessions of ONNX Runtime's CUDA provider, with all values in the caller's buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from mpt_trt.engines.onnxruntime.session import open_session, run, session_options
from mpt_trt.errors import MptTrtError

PROVIDER = "CUDAExecutionProvider"


class CudaSession:
    """A loaded network and the bindings of its values."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        stream: Any,
        constants: dict[str, onnxruntime.OrtValue],
        custom_operators: Path | None = None,
    ):
        """Loads the network; raises MptTrtError if that fails.

        path: path of the network that became `model`. stream: CUDA stream of all runs. constants:
        initializers that the model lacks. custom_operators: library of operators that are not
        ONNX Runtime's own.
        """
        options = session_options(path)
        if custom_operators is not None:
            options.register_custom_ops_library(str(custom_operators))
        # Memory patterns allocate in the second run, which may be the one that is captured.
        options.enable_mem_pattern = False
        entries = {
            # Converted constants replace the original ones.
            "session.use_device_allocator_for_initializers": "1",
            # Only the prepacked layout has constants. Kernels are chosen at the first run of each
            # number of rows.
            "ep.cuda.fpa_intb_gemm": "1" if constants else "0",
            "ep.cuda.fpa_intb_profile_m": "1",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        options.add_external_initializers(list(constants), list(constants.values()))
        provider = {
            "user_compute_stream": str(int(stream)),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        self._session = open_session(model, path, options, (PROVIDER, provider))
        if PROVIDER not in self._session.get_providers():
            raise MptTrtError(
                f"ONNX Runtime {onnxruntime.__version__} does not find CUDA's libraries; install "
                "onnxruntime-gpu[cuda,cudnn], or hide the GPU with CUDA_VISIBLE_DEVICES="
            )
        self._binding = self._session.io_binding()
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._without_waiting = onnxruntime.RunOptions()
        self._without_waiting.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind_input(
        self, name: str, element_type: int, shape: tuple[int, ...], address: int
    ) -> None:
        """Binds an input to GPU memory. element_type: ONNX type."""
        self._binding.bind_input(name, "cuda", 0, element_type, shape, address)

    def bind_output(
        self, name: str, element_type: int, shape: tuple[int, ...], address: int
    ) -> None:
        """Binds an output to GPU memory. element_type: ONNX type."""
        self._binding.bind_output(name, "cuda", 0, element_type, shape, address)

    def has_input(self, name: str) -> bool:
        """Returns whether the network has such an input."""
        return name in self._inputs

    def bind_host_input(self, name: str, value: NDArray) -> None:
        """Binds an input to a copy of `value` in host memory."""
        self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def run(self) -> None:
        """Runs the network and waits for its end."""
        run(self._session, self._binding)

    def enqueue(self) -> None:
        """Puts a run on the stream that is being captured.

        This is not safe outside of a capture: ONNX Runtime releases host memory of some operators
        in a callback of the stream, where CUDA does not permit it.
        """
        run(self._session, self._binding, self._without_waiting)
