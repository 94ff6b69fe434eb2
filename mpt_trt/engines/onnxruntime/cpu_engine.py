"""Runs a rank's network under ONNX Runtime on a CPU, the fallback on machines without a GPU.

It uses the same graph and the same weights as TensorRT. Parts that ONNX Runtime does not support
are rewritten in memory when the graph is loaded (see `rewrites`).
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto

from mpt_trt.engines.manifest import Manifest
from mpt_trt.engines.onnxruntime.collectives import Collectives, replace_collectives
from mpt_trt.engines.onnxruntime.cpu_cache import make_cpu_cache, take_any_cache_length
from mpt_trt.engines.onnxruntime.cpu_settings import CpuSettings
from mpt_trt.engines.onnxruntime.described_network import require_described
from mpt_trt.engines.onnxruntime.integer_tables import read_integer_tables
from mpt_trt.engines.onnxruntime.rewrites import (
    compute_in_float32,
    provide_weights,
    scale_queries,
    spell_out_scale_types,
)
from mpt_trt.engines.onnxruntime.session import naming_network, open_session, run, session_options
from mpt_trt.engines.spec import EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.sharding import Rank
from mpt_trt.network.external_files import read_network
from mpt_trt.network.graph import ELEMENT_TYPES
from mpt_trt.network.kv_cache import cache_shape
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly
from mpt_trt.system.mpi import Communicator

CPU = "CPUExecutionProvider"
# ONNX Runtime's accuracy levels: integer weights are multiplied by float32, or by int8.
ACCURACY_LEVELS = {"exact": "1", "int8": "4"}


class OnnxRuntimeEngine:
    """A rank's loaded network; implements `mpt_trt.engines.interface.StepModel`."""

    def __init__(
        self,
        engine_dir: Path,
        manifest: Manifest,
        cpu: CpuSettings,
        communicator: Communicator | None = None,
    ):
        rank = 0 if communicator is None else communicator.rank
        path, spec = engine_dir / manifest.ranks[rank].network, manifest.spec
        self._limits = spec.limits
        self._rounds_activations = cpu.activations == "int8"
        if self._rounds_activations:
            _require_integer_weights(engine_dir, spec)
        self.vocab_size = spec.config.vocab_size
        self.capacity = spec.limits.cache_len
        self.max_batch_size = spec.limits.max_batch_size
        self.max_step_tokens = spec.limits.max_input_len
        self.max_logits: int | None = None
        self._collectives = None if communicator is None else Collectives(communicator)
        self._computes_in_float32 = _lacks_kernels(spec)
        self._session, self._weights = _open_session(path, cpu, spec, Rank(rank, spec.tp_size))
        self._binding = self._session.io_binding()
        self._cache = make_cpu_cache(
            self._binding,
            cache_shape(spec.config, Rank(rank, spec.tp_size), self.capacity),
            spec.quantization.kv_cache,
            _computing_type(spec),
        )

    @property
    def description(self) -> str:
        """Runtime, version and arithmetic, for reports."""
        version = onnxruntime.__version__
        arithmetic = ", float32 arithmetic" if self._computes_in_float32 else ""
        rounding = ", int8 activations" if self._rounds_activations else ""
        return f"ONNX Runtime {version} ({CPU}{arithmetic}{rounding})"

    def start(self, batch_size: int) -> None:
        """Empties the cache; raises MptTrtError when it has fewer than `batch_size` rows."""
        self._limits.require_rows(batch_size)
        self._cache.start(batch_size)

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Runs one step; see `StepModel.step`."""
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
        self._cache.before_step(input_ids.shape[1], write_positions)
        with nullcontext() if self._collectives is None else self._collectives.step():
            run(self._session, self._binding)
        self._cache.after_step(write_positions)
        return logits

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Makes cache row i a copy of the old row `rows[i]`."""
        self._cache.reorder(rows)

    def select_rows(self, first: int, count: int) -> None:
        """Limits the following steps to some cache rows; see `RowModel.select_rows`."""
        self._cache.select_rows(first, count)

    def copy_row(self, source: int, target: int) -> None:
        """Makes cache row `target` a copy of row `source`."""
        self._cache.copy_row(source, target)


def _lacks_kernels(spec: EngineSpec) -> bool:
    """Returns whether ONNX Runtime's CPU provider lacks kernels for the network's type.

    It has none for bfloat16, and its products of integers return only float32.
    """
    quantizes_activations = isinstance(spec.scheme, SmoothQuant | Fp8)
    is_half = spec.dtype == "float16"
    return spec.dtype == "bfloat16" or (is_half and quantizes_activations)


def _require_integer_weights(engine_dir: Path, spec: EngineSpec) -> None:
    if not isinstance(spec.scheme, WeightOnly | Awq | Gptq | Mixed):
        raise MptTrtError(
            f"{engine_dir}: activations = int8 needs 4- or 8-bit integer weights with exact "
            "activations, which this engine does not have; leave it out"
        )


def _computing_type(spec: EngineSpec) -> int:
    """ONNX type of the session's arithmetic, and of a cache without quantization."""
    return TensorProto.FLOAT if _lacks_kernels(spec) else ELEMENT_TYPES[spec.dtype]


def _open_session(
    path: Path, cpu: CpuSettings, spec: EngineSpec, rank: Rank
) -> tuple[onnxruntime.InferenceSession, list[onnxruntime.OrtValue]]:
    """Opens the session; returns it with converted weights, which must live as long."""
    model = read_network(path)
    require_described(model, spec, rank, path)
    options = session_options(path)
    options.intra_op_num_threads = cpu.num_threads
    # By default, products of quantized weights would round activations to 8 bits.
    level = ACCURACY_LEVELS[cpu.activations]
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    if isinstance(spec.scheme, Fp8):
        # Otherwise weights are dequantized at every step, one by one, and 1.31 even fuses such
        # products into an operator that does not support fp8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    weights = []
    with naming_network(path):
        tables = read_integer_tables(model, path.parent, _computing_type(spec))
        if _lacks_kernels(spec):
            stored_type = ELEMENT_TYPES[spec.dtype]
            weights = compute_in_float32(model, stored_type, path.parent, options)
        weights += provide_weights(model, tables, options)
        spell_out_scale_types(model, _computing_type(spec))
        if _computing_type(spec) == TensorProto.FLOAT:
            scale_queries(model)
        take_any_cache_length(model)
        if spec.tp_size > 1:
            replace_collectives(model, options)
    return open_session(model, path, options, (CPU, {})), weights
