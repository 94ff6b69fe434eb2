"""Products with unquantized matrices: the FT checkpoint's own files."""

from __future__ import annotations

from dataclasses import dataclass

from mpt_trt.ft_checkpoint import FtCheckpoint
from mpt_trt.onnx_graph import GraphBuilder, StoredTensor
from mpt_trt.products.base import ft_tensors
from mpt_trt.sharding import Shard


@dataclass(frozen=True)
class PlainProducts:
    """See `Products`."""

    checkpoint: FtCheckpoint
    shard: Shard

    def tensors(self) -> dict[str, StoredTensor]:
        return ft_tensors(self.checkpoint, self.shard)

    def emit(self, graph: GraphBuilder, name: str, value: str) -> str:
        return graph.node("MatMul", [value, graph.weight(f"{name}.weight")], name)
