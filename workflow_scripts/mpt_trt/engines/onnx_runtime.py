"""Runs a rank's network under ONNX Runtime, on a CPU or a CUDA GPU.

It stands in where no TensorRT GPU is: same graph, same weights. One thing is rewritten when the
graph is loaded, in memory only: a bfloat16 network becomes float32 on the CPU, which has no
bfloat16 kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.engines.cpu_collectives import Collectives, replace_collectives
from mpt_trt.engines.manifest import Manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.numerics import BFLOAT16, convert
from mpt_trt.ranks import Communicator

ERROR_SEVERITY = 3


class OnnxRuntimeEngine:
    """One rank's network, loaded; see `mpt_trt.generation.StepModel` for the contract."""

    def __init__(
        self,
        engine_dir: Path,
        manifest: Manifest,
        num_threads: int = 0,
        communicator: Communicator | None = None,
    ):
        rank = 0 if communicator is None else communicator.rank
        path = engine_dir / manifest.ranks[rank].network
        self._limits = manifest.limits
        self.vocab_size = manifest.config.vocab_size
        self.capacity = manifest.limits.cache_len
        self.max_batch_size = manifest.limits.max_batch_size
        self.max_step_tokens = manifest.limits.max_input_len
        self.max_logits: int | None = None
        self._provider = _provider()
        self._collectives = None if communicator is None else Collectives(communicator)
        self._session, self._weights = _open_session(
            path, self._provider, num_threads, manifest.tp_size
        )
        self._cache_inputs = [i for i in self._session.get_inputs() if i.name.startswith("past_")]
        self._cache: dict[str, NDArray | onnxruntime.OrtValue] = {}
        self._binding = self._session.io_binding()

    @property
    def description(self) -> str:
        version = onnxruntime.__version__
        arithmetic = ", float32 arithmetic" if self._weights else ""
        return f"ONNX Runtime {version} ({self._provider}{arithmetic})"

    def start(self, batch_size: int) -> None:
        """An empty cache of `batch_size` rows; raises MptTrtError when the rows do not fit."""
        self._limits.require_rows(batch_size)
        rows = {
            i.name: np.zeros((batch_size, *i.shape[1:]), _numpy_type(i.type))
            for i in self._cache_inputs
        }
        self._bind_cache(rows)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """One step; see the network's docstring. Returns `[num_logits, vocab]`."""
        feeds = (
            ("input_ids", input_ids),
            ("write_positions", write_positions),
            ("logit_positions", logit_positions),
        )
        for name, value in feeds:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(value, np.int64))
        logits = np.empty((len(logit_positions), self.vocab_size), np.float32)
        self._binding.bind_ortvalue_output(
            "logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits)
        )
        with nullcontext() if self._collectives is None else self._collectives.step():
            self._session.run_with_iobinding(self._binding)
        return logits

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Cache row i becomes a copy of old row rows[i]."""
        old = {name: value.numpy() for name, value in self._cache.items()}
        self._bind_cache({name: value[rows] for name, value in old.items()})

    def _bind_cache(self, rows: dict[str, NDArray]) -> None:
        """Binds each cache as input and output, so that the network updates it in place."""
        device = "cuda" if self._provider == "CUDAExecutionProvider" else "cpu"
        self._cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0)
            for name, value in rows.items()
        }
        for name, value in self._cache.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_", "present_", 1), value)


def _provider() -> str:
    available = onnxruntime.get_available_providers()
    cuda = "CUDAExecutionProvider"
    return cuda if cuda in available else "CPUExecutionProvider"


def _open_session(
    path: Path, provider: str, num_threads: int, tp_size: int
) -> tuple[onnxruntime.InferenceSession, list[onnxruntime.OrtValue]]:
    """The session, and the converted weights that must live as long as it does."""
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise MptTrtError(f"{path}: damaged ({error}); build the engine again") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERROR_SEVERITY
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    weights = []
    if provider == "CPUExecutionProvider":
        weights = _bfloat16_to_float32(model, path.parent, options)
    if tp_size > 1:
        replace_collectives(model, options)
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider]
        )
    except Exception as error:  # the library raises many types, without a common base
        raise MptTrtError(f"{path}: ONNX Runtime cannot load the network: {error}") from None
    return session, weights


def _bfloat16_to_float32(
    model: onnx.ModelProto, folder: Path, options: onnxruntime.SessionOptions
) -> list[onnxruntime.OrtValue]:
    """Turns every bfloat16 in the graph to float32; returns the weights, converted in memory."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    external = {}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.BFLOAT16:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            external[tensor.name] = _read_bfloat16(tensor, folder)
            tensor.data_type = TensorProto.FLOAT
        else:
            value = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in external.values()]
    options.add_external_initializers(list(external), values)
    return values


def _read_bfloat16(tensor: TensorProto, folder: Path) -> NDArray[np.float32]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    stored = np.memmap(
        folder / place["location"],
        BFLOAT16,
        "r",
        offset=int(place.get("offset", 0)),
        shape=tuple(tensor.dims),
    )
    return convert(stored, np.dtype(np.float32))


def _numpy_type(onnx_type: str) -> type:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[onnx_type]
