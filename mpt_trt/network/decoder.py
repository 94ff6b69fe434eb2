"""The decoder of one rank as an ONNX graph for TensorRT and ONNX Runtime.

Opset 24, standard operators only. One step of the network takes the next tokens of every row of a
batch (a prompt, a piece of one, or one token), writes their keys and values into the cache in
place, and returns logits at the requested positions:

    input_ids        int64 [batch, seq]       tokens; any right padding of rows
    write_positions  int64 [batch]            cache position of each row's first token
    logit_positions  int64 [num_logits, 2]    (row, index in seq) pairs
    past_key.{i}     [batch, kv_heads, cache_len, head_dim]   likewise past_value.{i}
    logits           float32 [num_logits, vocab]
    present_key.{i}  the same buffer as past_key.{i}, updated; likewise present_value.{i}

A quantized cache has one byte per element, which TensorRT's cache layer does not support. So the
caller copies the step's keys and values into the cache (see mpt_trt.network.kv_cache):

    past_key.{i}     int8 or float8e4m3fn, likewise past_value.{i}
    new_key.{i}      likewise, [batch, kv_heads, seq, head_dim]; and new_value.{i}

A token at cache position p attends to the positions 0..p of its row, so values of padding after a
row's end are overwritten before any token attends to them.

The weights are external data in the folder WEIGHTS_FOLDER next to the graph: the FT checkpoint's
files and the quantized matrices of `mpt_trt.network.linear`.

Each of several ranks computes its heads and its part of the feed-forward layer; collective nodes
combine the results. Every rank returns the same logits of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.model.tensors import BlockMatrices, BlockMatrix, block_matrices
from mpt_trt.network.attention import Attention
from mpt_trt.network.graph import ELEMENT_TYPES, Content, GraphBuilder
from mpt_trt.network.kv_cache import Cache, cache_shape, make_cache
from mpt_trt.network.linear.base import LinearLayers
from mpt_trt.network.linear.biased import emit_linear, emit_row_split_linear
from mpt_trt.network.linear.make_linear import make_linear
from mpt_trt.network.norms import emit_norm_before
from mpt_trt.network.vocabulary import Vocabulary
from mpt_trt.network.vocabulary_tables import int8_tables


@dataclass(frozen=True)
class Network:
    """A rank's graph, and the content of its weights by file name in WEIGHTS_FOLDER."""

    model: onnx.ModelProto
    files: dict[str, Content]


def build_network(
    checkpoint: FtCheckpoint,
    rank: Rank,
    cache_len: int,
    vocabulary: VocabularySharding | None = None,
    calibrated: CalibratedQuantization = NOT_QUANTIZED,
) -> Network:
    """Builds the graph of one rank; unquantized tensors have the checkpoint's storage type.

    cache_len: positions per row of the KV cache, which TensorRT requires to be static.

    Raises MptTrtError when the checkpoint has another tensor-parallel size or does not fit the
    quantization.
    """
    if checkpoint.tp_size != rank.tp_size:
        raise MptTrtError(
            f"{checkpoint.folder}: tensor_parallelism = {checkpoint.tp_size}, but an engine for "
            f"{rank.tp_size} ranks was requested; convert with -tp {rank.tp_size}"
        )
    if rank.tp_size == 1:
        vocabulary = VocabularySharding(embedding=False, head=False)
    config = checkpoint.config
    cache = make_cache(cache_shape(config, rank, cache_len), calibrated)
    linear_layers = make_linear(checkpoint, rank, calibrated)
    head = calibrated.quantization.head
    stored = linear_layers.tensors() | ({} if head == "auto" else int8_tables(checkpoint, rank))
    graph = GraphBuilder(stored, ELEMENT_TYPES[checkpoint.storage_type], rank)
    decoder = _Decoder(
        graph,
        config,
        Vocabulary(graph, config, rank, vocabulary or VocabularySharding(), head),
        Attention(graph, config, rank, linear_layers, cache),
        linear_layers,
        cache,
    )
    decoder.emit()
    name = f"{checkpoint.model_name} rank {rank.index} of {rank.tp_size}"
    return Network(graph.to_model(name), graph.used)


@dataclass(frozen=True)
class _Decoder:
    """Emits the graph of one rank, from tokens to logits."""

    graph: GraphBuilder
    config: MptConfig
    vocabulary: Vocabulary
    attention: Attention
    linear_layers: LinearLayers
    cache: Cache

    def emit(self) -> None:
        graph = self.graph
        graph.input("input_ids", TensorProto.INT64, ["batch", "seq"])
        graph.input("write_positions", TensorProto.INT64, ["batch"])
        graph.input("logit_positions", TensorProto.INT64, ["num_logits", 2])
        self.cache.add_inputs(graph)
        positions = self._query_positions()
        bias = self.attention.emit_bias(positions)
        rotation = self.attention.emit_rotation(positions)
        hidden = self.vocabulary.emit_embedding(positions)
        for layer in range(self.config.num_layers):
            matrices = block_matrices(self.config, layer)
            hidden = self.attention.emit(layer, matrices, hidden, bias, rotation)
            hidden = self._feed_forward(layer, matrices, hidden)
        self.vocabulary.emit_logits(hidden)
        graph.output("logits", TensorProto.FLOAT, ["num_logits", self.config.vocab_size])
        self.cache.add_outputs(graph)

    def _query_positions(self) -> str:
        """Adds the cache position of every token of the step, int64 `[batch, seq]`."""
        graph = self.graph
        zero, one = graph.constant("zero", 0, np.int64), graph.constant("one", 1, np.int64)
        last_axis = graph.constant("axis_1", [1], np.int64)
        seq = graph.node("Shape", ["input_ids"], "positions/seq_shape", start=1, end=2)
        seq = graph.node("Squeeze", [seq], "positions/seq")
        offsets = graph.node("Range", [zero, seq, one], "positions/offsets")
        first = graph.node("Unsqueeze", ["write_positions", last_axis], "positions/first")
        return graph.node("Add", [first, offsets], "positions/query")

    def _feed_forward(self, layer: int, matrices: BlockMatrices, hidden: str) -> str:
        graph, name = self.graph, f"layers.{layer}.mlp"
        up, down = matrices[BlockMatrix.UP], matrices[BlockMatrix.DOWN]
        normed = emit_norm_before(graph, self.config, up, hidden)
        wide = emit_linear(graph, self.linear_layers, up, normed)
        wide = graph.node("Gelu", [wide], f"{name}/gelu", approximate="none")
        output = emit_row_split_linear(graph, self.linear_layers, down, wide)
        return graph.node("Add", [hidden, output], f"{name}/residual")
