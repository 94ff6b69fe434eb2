"""Rotary position embedding of the network: queries and keys rotated by their cache positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from mpt_trt.model.rope import Rope, rope_frequencies
from mpt_trt.network.graph import GraphBuilder

Rotation = tuple[str, str]
"""Cosine and sine of a step's angles, each `[batch, seq, head_dim / 2]` in the network's type."""


def emit_rotation(
    graph: GraphBuilder, rope: Rope, head_dim: int, cache_len: int, positions: str
) -> Rotation:
    """Adds the rotation of every token of a step, which all layers share.

    positions: int64 `[batch, seq]`. The angles are tables with one row per cache position. They are
    computed here in float64, because a GPU's fast sine is inexact at large positions.
    """
    frequencies = rope_frequencies(rope, head_dim)
    angles = np.arange(cache_len, dtype=np.float64)[:, None] * np.array(frequencies)
    # Padding may be beyond the cache's end; its row is never used.
    last = graph.constant("rotary/last", cache_len - 1, np.int64)
    rows = graph.node("Min", [positions, last], "rotary/positions")

    def emit_factor(name: str, table: np.ndarray) -> str:
        values = graph.constant(f"rotary/{name}_table", table, np.float32)
        if graph.element_type == TensorProto.FLOAT:
            return graph.node("Gather", [values, rows], f"rotary/{name}")
        factor = graph.node("Gather", [values, rows], f"rotary/{name}_float")
        return graph.node("Cast", [factor], f"rotary/{name}", to=graph.element_type)

    return emit_factor("cosine", np.cos(angles)), emit_factor("sine", np.sin(angles))


@dataclass(frozen=True)
class RotatedHeads:
    """Rotated heads of a rank, in the packed output of the QKV projection.

    num_rotated: query and key heads, which come first. num_values: value heads.
    """

    num_rotated: int
    num_values: int
    head_dim: int

    def emit(self, graph: GraphBuilder, name: str, packed: str, rotation: Rotation) -> str:
        """Adds the rotation of the layer `name`; packed: `[batch, seq, features]` Q | K | V.

        Queries and keys stay together, so that one node rotates both.
        """
        parts = [f"{name}/unrotated", f"{name}/flat_values"]
        sizes = [self.num_rotated * self.head_dim, self.num_values * self.head_dim]
        graph.split(packed, parts, sizes, axis=2, name=f"{name}/rotated_split")
        rotated = graph.node(
            "RotaryEmbedding",
            [parts[0], *rotation],
            f"{name}/rotated_heads",
            num_heads=self.num_rotated,
        )
        return graph.node("Concat", [rotated, parts[1]], f"{name}/rotated", axis=2)
