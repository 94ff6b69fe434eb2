"""Linear layers with unquantized matrices, which are the FT checkpoint's files."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import linear_name
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import Weight
from mpt_trt.network.graph import GraphBuilder, StoredTensor
from mpt_trt.network.linear.base import ft_tensors


@dataclass(frozen=True)
class PlainLinear:
    """Implements `LinearLayers` without quantization."""

    checkpoint: FtCheckpoint
    rank: Rank

    def tensors(self) -> dict[str, StoredTensor]:
        return ft_tensors(self.checkpoint, self.rank)

    def emit(self, graph: GraphBuilder, weight: Weight, value: str) -> str:
        return graph.node("MatMul", [value, graph.weight(weight.name)], linear_name(weight))
