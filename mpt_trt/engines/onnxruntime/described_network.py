"""Compares a network's inputs and outputs with what config.json describes."""

from __future__ import annotations

from pathlib import Path

import onnx

from mpt_trt.engines.spec import EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.sharding import Rank
from mpt_trt.network.graph import ELEMENT_TYPES
from mpt_trt.network.kv_cache import KINDS, cache_shape


def require_described(model: onnx.ModelProto, spec: EngineSpec, rank: Rank, path: Path) -> None:
    """Raises MptTrtError unless cache and logits of the network `path` are as the spec says."""
    shape = cache_shape(spec.config, rank, spec.limits.cache_len)
    cache_type = spec.quantization.kv_cache
    element = ELEMENT_TYPES[spec.dtype if cache_type == "auto" else cache_type]
    sizes = [shape.num_kv_heads, shape.cache_len, shape.head_dim]
    names = [f"past_{kind}.{layer}" for layer in range(shape.num_layers) for kind in KINDS]
    expected = dict.fromkeys(names, (element, sizes))
    found = {v.name: _type_of(v) for v in model.graph.input if v.name.startswith("past_")}
    vocabularies = [_type_of(v)[1] for v in model.graph.output if v.name == "logits"]
    if found != expected or vocabularies != [[spec.config.vocab_size]]:
        raise MptTrtError(
            f"{path}: not the network that config.json describes, because its cache or its logits "
            f"have another shape or type; delete {path.parent} and build the engine again"
        )


def _type_of(value: onnx.ValueInfoProto) -> tuple[int, list[int]]:
    """Element type, and all sizes but the first."""
    tensor = value.type.tensor_type
    return tensor.elem_type, [size.dim_value for size in tensor.shape.dim][1:]
