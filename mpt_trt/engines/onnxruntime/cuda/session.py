"""A network, loaded by ONNX Runtime's CUDA provider, that works in its caller's buffers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from mpt_trt.engines.onnxruntime.session import open_session, session_options
from mpt_trt.errors import MptTrtError

PROVIDER = "CUDAExecutionProvider"


class CudaSession:
    """A network that is loaded, and what its values are bound to."""

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Path,
        stream: Any,
        constants: dict[str, onnxruntime.OrtValue],
    ):
        """path: of the network that became `model`. constants: initializers that it leaves out.

        Raises MptTrtError when it cannot be loaded.
        """
        options = session_options(path)
        # Planned memory is allocated in a second run, which for steps is the one to be captured.
        options.enable_mem_pattern = False
        entries = {
            # What operators make of constants replaces them.
            "session.use_device_allocator_for_initializers": "1",
            # Constants are scales of tiles. Kernels are chosen when numbers of rows first come.
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
        self._binding.bind_input(name, "cuda", 0, element_type, shape, address)

    def bind_output(
        self, name: str, element_type: int, shape: tuple[int, ...], address: int
    ) -> None:
        self._binding.bind_output(name, "cuda", 0, element_type, shape, address)

    def has_input(self, name: str) -> bool:
        return name in self._inputs

    def bind_host_input(self, name: str, value: NDArray) -> None:
        """In host memory, copied."""
        self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def run(self) -> None:
        """Runs, and waits for the end."""
        self._session.run_with_iobinding(self._binding)

    def enqueue(self) -> None:
        """Puts a run on the stream, to be captured.

        Outside of a capture that would not be safe: what some operators need on the host, ONNX
        Runtime releases in a callback of the stream, from where CUDA does not permit that.
        """
        self._session.run_with_iobinding(self._binding, self._without_waiting)
