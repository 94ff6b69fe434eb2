"""Interface of the network's linear layers, and code that its implementations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from numpy.typing import NDArray

from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import linear_name
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight, weights
from mpt_trt.network.graph import ELEMENT_TYPES, GraphBuilder, StoredTensor
from mpt_trt.network.linear.specs import PRE_QUANT_SCALE, QUANTIZED_MATRIX, SCALE, TensorSpec


class LinearLayers(Protocol):
    """Linear layers of one rank, without their biases."""

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors that the rank's network stores, by name; contents are computed when written.

        The matrices have the sizes of `specs.layer_specs`.
        """
        ...

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        """Adds the product of `value` `[..., in_features]` and a block's matrix.

        Returns the product's name, which is the layer's.
        """
        ...


def linear_weights(config: MptConfig) -> list[Weight]:
    """Matrices of all blocks; only these are quantized."""
    return [weight for weight in weights(config) if weight.is_linear]


def ft_tensors(checkpoint: FtCheckpoint, rank: Rank) -> dict[str, StoredTensor]:
    """The rank's FT files, without FT's zeros for norms that have no bias."""
    element_type = ELEMENT_TYPES[checkpoint.storage_type]
    return {
        name: StoredTensor(file.name, element_type, file.shape, checkpoint.folder / file.name)
        for name, file in checkpoint.rank_files(rank).items()
        if file.weight.hf_name is not None
    }


def with_quantized_matrices(
    checkpoint: FtCheckpoint, rank: Rank, layer_tensors: Callable[[Weight], dict[str, StoredTensor]]
) -> dict[str, StoredTensor]:
    """The rank's FT files, with `layer_tensors` of each matrix instead of the matrix.

    layer_tensors: returns tensors by name relative to the layer.
    """
    tensors = ft_tensors(checkpoint, rank)
    for weight in linear_weights(checkpoint.config):
        del tensors[weight.name]
        tensors |= named_by_layer(weight, layer_tensors(weight))
    return tensors


def named_by_layer(weight: Weight, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Gives the tensors their full names."""
    return {f"{linear_name(weight)}.{name}": tensor for name, tensor in tensors.items()}


def computed(name: str, spec: TensorSpec, pieces: Callable[[], Iterator[NDArray]]) -> StoredTensor:
    """Makes a tensor whose file `model.{name}.bin` is computed when it is written."""
    return StoredTensor(f"model.{name}.bin", ELEMENT_TYPES[spec.dtype], spec.shape, pieces)


def dequantized(graph: GraphBuilder, name: str, **attributes: int) -> str:
    """Adds the product of layer `name`'s stored integers and scales, in the network's type.

    Both runtimes fuse this with the matrix product, so they read integers from memory.
    """
    inputs = [graph.weight(f"{name}.{QUANTIZED_MATRIX}"), graph.weight(f"{name}.{SCALE}")]
    return graph.node("DequantizeLinear", inputs, f"{name}/weight", **attributes)


def scaled_input(graph: GraphBuilder, name: str, value: str) -> str:
    """Adds `value` times the pre-quant scale of layer `name`, if one is stored."""
    scale = f"{name}.{PRE_QUANT_SCALE}"
    if not graph.has_weight(scale):
        return value
    return graph.node("Mul", [value, graph.weight(scale)], f"{name}/scaled_input")
