"""The embedding and the head, the two matrices with one row per token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range, Rank, VocabularySharding
from mpt_trt.network.graph import GraphBuilder
from mpt_trt.network.norms import emit_norm
from mpt_trt.network.vocabulary_tables import integers_name, scale_name
from mpt_trt.quantization.schemes import HeadType


@dataclass(frozen=True)
class Vocabulary:
    """Emits the embedding of tokens and the logits of hidden states.

    sharding: matrices that are split among ranks instead of copied to each. storage: of both; see
    `mpt_trt.network.vocabulary_tables`.
    """

    graph: GraphBuilder
    config: MptConfig
    rank: Rank
    sharding: VocabularySharding
    storage: HeadType = "auto"

    def emit_embedding(self, query_positions: str) -> str:
        """Adds the embedding of `input_ids`, `[batch, seq, hidden]`."""
        graph = self.graph
        tokens = self._embed_tokens()
        if self.config.position_embedding != "learned":
            return tokens
        # Padding may be beyond the last learned position; its row is never used.
        last = graph.constant("last_position", self.config.max_seq_len - 1, np.int64)
        clamped = graph.node("Min", [query_positions, last], "positions/clamped")
        learned = graph.node("Gather", [graph.weight("wpe"), clamped], "position_embedding")
        return graph.node("Add", [tokens, learned], "embedding_with_position")

    def _embed_tokens(self) -> str:
        graph = self.graph
        if not self.sharding.embedding:
            return graph.node("Gather", [self._whole("wte"), "input_ids"], "embedding")
        rows = sharding.vocabulary_rows(self.config, self.rank)
        # A rank beyond the vocabulary's end has no token, but its Gather needs a row to read.
        table = self._vocabulary_part("wte", rows if len(rows) else Range(0, 1))
        start = graph.constant("vocabulary/start", rows.start, np.int64)
        count = graph.constant("vocabulary/count", len(rows), np.int64)
        last = graph.constant("vocabulary/last", max(len(rows) - 1, 0), np.int64)
        axis = graph.constant("axis_2", [2], np.int64)
        local = graph.node("Sub", ["input_ids", start], "embedding/local_ids")
        above = graph.node("GreaterOrEqual", [local, "zero"], "embedding/not_below")
        below = graph.node("Less", [local, count], "embedding/not_above")
        held = graph.node("And", [above, below], "embedding/held")
        held = graph.node("Unsqueeze", [held, axis], "embedding/held_rows")
        clamped = graph.node("Clip", [local, "zero", last], "embedding/clamped_ids")
        part = graph.node("Gather", [table, clamped], "embedding/part")
        nothing = graph.scalar("nothing", 0.0)
        part = graph.node("Where", [held, part, nothing], "embedding/own_part")
        return graph.all_reduce(part, "embedding")

    def emit_logits(self, hidden: str) -> None:
        """Adds the final norm and `logits`, both only at the requested positions."""
        graph = self.graph
        chosen = graph.node("GatherND", [hidden, "logit_positions"], "head/hidden")
        normed = emit_norm(graph, self.config, "final_layernorm", chosen)
        product = self._sharded_head(normed) if self.sharding.head else self._whole_head(normed)
        is_scaled = self.config.logit_scale != 1.0
        name = "head/product_float" if is_scaled else "logits"
        logits = graph.node("Cast", [product], name, to=TensorProto.FLOAT)
        if is_scaled:
            scale = graph.constant("logit_scale", self.config.logit_scale, np.float32)
            graph.node("Mul", [logits, scale], "logits")

    @property
    def _head(self) -> str:
        return "wte" if self.config.tie_word_embeddings else "lm_head.weight"

    def _whole_head(self, normed: str) -> str:
        head = self._whole(self._head)
        return self.graph.node("Gemm", [normed, head], "head/product", transB=1)

    def _sharded_head(self, normed: str) -> str:
        """Adds the logits of all ranks' parts of the vocabulary, without padding."""
        graph = self.graph
        width = sharding.vocabulary_width(self.config, self.rank.tp_size)
        product = self._own_product(normed, width)
        gathered = graph.all_gather(product, "head/gathered")
        if width * self.rank.tp_size != self.config.vocab_size:
            ends = graph.constant("vocabulary/end", [self.config.vocab_size], np.int64)
            starts, axes = (
                graph.constant(f"vocabulary/{n}", [0], np.int64) for n in ("first", "axis")
            )
            gathered = graph.node("Slice", [gathered, starts, ends, axes], "head/unpadded")
        return graph.node("Transpose", [gathered], "head/product", perm=[1, 0])

    def _own_product(self, normed: str, width: int) -> str:
        """Adds the logits of this rank's part of the vocabulary, `[width, num_logits]`."""
        graph = self.graph
        if self.storage == "int8":
            # In this order the runtimes fuse the product with integers.
            head = self._dequantized(self._head, is_part=True)
            columns = graph.node("Gemm", [normed, head], "head/own_columns", transB=1)
            return graph.node("Transpose", [columns], "head/own_product", perm=[1, 0])
        rows = sharding.vocabulary_rows(self.config, self.rank)
        parts = [self._vocabulary_part(self._head, rows)] if len(rows) else []
        if len(rows) < width:
            parts.append(graph.zeros("head/padding", (width - len(rows), self.config.hidden_size)))
        head = parts[0] if len(parts) == 1 else graph.node("Concat", parts, "head/padded", axis=0)
        return graph.node("Gemm", [head, normed], "head/own_product", transB=1)

    def _whole(self, name: str) -> str:
        """Adds all rows of the embedding or the head."""
        is_quantized = self.storage == "int8"
        return self._dequantized(name, is_part=False) if is_quantized else self.graph.weight(name)

    def _dequantized(self, name: str, is_part: bool) -> str:
        """Adds all rows of a table of integers, or this rank's part, in the network's type.

        A tied head reads the rows of the embedding.
        """
        graph, table = self.graph, name.removesuffix(".weight")
        integers, scale = integers_name(table, is_part), scale_name(table, is_part)
        output = f"{integers}/dequantized"
        if output not in {node.name for node in graph.nodes}:
            inputs = [graph.weight(integers), graph.weight(scale)]
            graph.node("DequantizeLinear", inputs, output, axis=0)
        return output

    def _vocabulary_part(self, name: str, rows: Range) -> str:
        """Adds this rank's rows of the embedding or the head."""
        graph = self.graph
        if self.storage == "int8":
            return self._dequantized(name, is_part=True)
        both_are_sharded = self.sharding.embedding and self.sharding.head
        if not self.config.tie_word_embeddings or both_are_sharded:
            return graph.weight_rows(name, rows)
        # TensorRT identifies weights by address and rejects two sizes at the same one. So the rows
        # are sliced from the whole matrix, which the graph also contains, when it is loaded.
        first = graph.constant("vocabulary/first_row", [rows.start], np.int64)
        end = graph.constant("vocabulary/end_row", [rows.stop], np.int64)
        axis = graph.constant("axis_0", [0], np.int64)
        return graph.node("Slice", [graph.weight(name), first, end, axis], "vocabulary/own_rows")
