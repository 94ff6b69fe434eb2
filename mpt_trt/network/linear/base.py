"""What every kind of product offers to the network, and what the kinds share."""

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


class LinearLayers(Protocol):
    """The products of one rank."""

    def tensors(self) -> dict[str, StoredTensor]:
        """Everything the rank's network stores, by name; the content is computed when written."""
        ...

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        """Adds `value` `[..., in_features]` times the matrix of layer `name`, named like it."""
        ...


def linear_weights(config: MptConfig) -> dict[str, Weight]:
    """The matrices that quantization is about, by layer: `layers.0.attention.dense`."""
    return {linear_name(weight): weight for weight in weights(config) if weight.is_linear}


def place(name: str) -> tuple[int, str]:
    """Layer and matrix: (3, "attention.dense") of "layers.3.attention.dense"."""
    _, layer, matrix = name.split(".", 2)
    return int(layer), matrix


def ft_tensors(checkpoint: FtCheckpoint, rank: Rank) -> dict[str, StoredTensor]:
    """The rank's FT files, without the zeros that FT has where a norm has no bias."""
    element_type = ELEMENT_TYPES[checkpoint.storage_type]
    return {
        name: StoredTensor(file.name, element_type, file.shape, checkpoint.folder / file.name)
        for name, file in checkpoint.rank_files(rank).items()
        if file.weight.hf_name is not None
    }


def made(
    name: str, element_type: int, shape: tuple[int, ...], pieces: Callable[[], Iterator[NDArray]]
) -> StoredTensor:
    """A tensor whose file is computed; its name is that of the tensor."""
    return StoredTensor(f"model.{name}.bin", element_type, shape, pieces)


def dequantized(graph: GraphBuilder, name: str, **attributes: int) -> str:
    """The stored integers of `name` times the stored scales, in the network's type.

    Both runtimes fuse this with the product, so that integers are what is read from memory.
    """
    inputs = [graph.weight(f"{name}.weight.quantized"), graph.weight(f"{name}.weight.scale")]
    return graph.node("DequantizeLinear", inputs, f"{name}/weight", **attributes)


def scaled_input(graph: GraphBuilder, name: str, value: str) -> str:
    """`value` times the pre-quant scale of its layer, where one is stored."""
    scale = f"{name}.pre_quant_scale"
    if not graph.has_weight(scale):
        return value
    return graph.node("Mul", [value, graph.weight(scale)], f"{name}/scaled_input")
