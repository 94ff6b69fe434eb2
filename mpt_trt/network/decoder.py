"""The decoder of one rank as an ONNX graph that TensorRT and ONNX Runtime both run.

Opset 24, standard operators only. One step of the network takes the next tokens of every row of a
batch (a prompt, a piece of one, or one token), writes their keys and values into the cache in
place, and returns logits at the positions asked for:

    input_ids        int64 [batch, seq]       tokens; rows may be right-padded with anything
    write_positions  int64 [batch]            cache position of each row's first token
    logit_positions  int64 [num_logits, 2]    (row, index in seq) pairs
    past_key.{i}     [batch, kv_heads, cache_len, head_dim]   likewise past_value.{i}
    logits           float32 [num_logits, vocab]
    present_key.{i}  the same buffer as past_key.{i}, updated; likewise present_value.{i}

A quantized cache has one byte an element, and TensorRT's cache layer does not take that; there, the
caller copies the step's keys and values into the cache (see mpt_trt.network.kv_cache):

    past_key.{i}     int8 or float8e4m3fn, likewise past_value.{i}
    new_key.{i}      likewise, [batch, kv_heads, seq, head_dim]; and new_value.{i}

A token at cache position p attends to the positions 0..p of its row, so what padding wrote beyond a
row's end is never seen before it is overwritten.

The weights are external data in the folder WEIGHTS_FOLDER beside the graph: the FT checkpoint's own
files and, where matrices are quantized, what `mpt_trt.network.linear` makes of them.

With several ranks, each computes its heads and its part of the feed-forward layer, and the ranks'
results meet in collective nodes. Every rank returns the same logits of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig, alibi_slopes
from mpt_trt.model.sharding import Range, Rank, VocabularySharding
from mpt_trt.network.graph import ELEMENT_TYPES, Content, GraphBuilder
from mpt_trt.network.kv_cache import KINDS, Cache, cache_shape, make_cache
from mpt_trt.network.linear.base import LinearLayers
from mpt_trt.network.linear.make_linear import make_linear


@dataclass(frozen=True)
class Network:
    """A rank's graph and the content of its weights, by file name in WEIGHTS_FOLDER."""

    model: onnx.ModelProto
    files: dict[str, Content]


def build_network(
    checkpoint: FtCheckpoint,
    rank: Rank,
    cache_len: int,
    vocabulary: VocabularySharding | None = None,
    calibrated: CalibratedQuantization = NOT_QUANTIZED,
) -> Network:
    """The graph of one rank; what is not quantized is in the checkpoint's storage type.

    cache_len: positions of the KV cache of a row (TensorRT wants them static).

    Raises MptTrtError when the checkpoint was converted for another number of ranks, or is none for
    this kind of quantization.
    """
    if checkpoint.tp_size != rank.tp_size:
        raise MptTrtError(
            f"{checkpoint.folder}: tensor_parallelism = {checkpoint.tp_size}, but an engine for "
            f"{rank.tp_size} ranks was asked for; convert with -tp {rank.tp_size}"
        )
    if rank.tp_size == 1:
        vocabulary = VocabularySharding(embedding=False, head=False)
    config = checkpoint.config
    shape = cache_shape(config, rank, cache_len)
    cache = make_cache(shape, calibrated)
    linear_layers = make_linear(checkpoint, rank, calibrated)
    graph = GraphBuilder(linear_layers.tensors(), ELEMENT_TYPES[checkpoint.storage_type], rank)
    decoder = _Decoder(
        graph, config, rank, vocabulary or VocabularySharding(), linear_layers, cache
    )
    decoder.emit()
    name = f"{checkpoint.model_name} rank {rank.index} of {rank.tp_size}"
    return Network(graph.to_model(name), graph.used)


@dataclass(frozen=True)
class _Decoder:
    """Emits the graph of one rank, from tokens to logits."""

    graph: GraphBuilder
    config: MptConfig
    rank: Rank
    vocabulary: VocabularySharding
    linear_layers: LinearLayers
    cache: Cache

    @property
    def num_heads(self) -> int:
        return len(sharding.query_heads(self.config, self.rank))

    @property
    def num_kv_heads(self) -> int:
        return len(sharding.kv_heads(self.config, self.rank))

    def emit(self) -> None:
        graph = self.graph
        graph.input("input_ids", TensorProto.INT64, ["batch", "seq"])
        graph.input("write_positions", TensorProto.INT64, ["batch"])
        graph.input("logit_positions", TensorProto.INT64, ["num_logits", 2])
        self.cache.add_inputs(graph)
        positions = self._query_positions()
        bias = self._attention_bias(positions)
        hidden = self._embed(positions)
        for layer in range(self.config.num_layers):
            hidden = self._attention(f"layers.{layer}", layer, hidden, bias)
            hidden = self._feed_forward(f"layers.{layer}", hidden)
        self._logits(hidden)
        graph.output("logits", TensorProto.FLOAT, ["num_logits", self.config.vocab_size])
        self.cache.add_outputs(graph)

    def _query_positions(self) -> str:
        """Cache position of every token of the step, int64 `[batch, seq]`."""
        graph = self.graph
        zero, one = graph.constant("zero", 0, np.int64), graph.constant("one", 1, np.int64)
        last_axis = graph.constant("axis_1", [1], np.int64)
        seq = graph.node("Shape", ["input_ids"], "positions/seq_shape", start=1, end=2)
        seq = graph.node("Squeeze", [seq], "positions/seq")
        offsets = graph.node("Range", [zero, seq, one], "positions/offsets")
        first = graph.node("Unsqueeze", ["write_positions", last_axis], "positions/first")
        return graph.node("Add", [first, offsets], "positions/query")

    def _attention_bias(self, query_positions: str) -> str:
        """What attention adds to its scores, `[batch, heads or 1, seq, keys]`.

        ALiBi's slope times the (negative) distance to the key; -inf for keys after the query. The
        distance is taken before rounding to the network's type, which cannot hold large positions.
        """
        graph = self.graph
        keys = self.cache.key_positions(graph, query_positions)
        axes = graph.constant("axes_1_3", [1, 3], np.int64)
        queries = graph.node("Unsqueeze", [query_positions, axes], "bias/query_positions")
        distance = graph.node("Sub", [keys, queries], "bias/distance")
        visible = graph.node("LessOrEqual", [distance, "zero"], "bias/visible")
        hidden = graph.constant("minus_infinity", -np.inf, np.float32)
        if self.config.position_embedding == "alibi":
            distance = graph.node("Cast", [distance], "bias/distance_float", to=TensorProto.FLOAT)
            slopes = alibi_slopes(self.config.num_heads, self.config.alibi_bias_max)
            heads = sharding.query_heads(self.config, self.rank)
            local = np.reshape(slopes[heads.start : heads.stop], (1, -1, 1, 1))
            slopes_name = graph.constant("alibi_slopes", local, np.float32)
            score = graph.node("Mul", [distance, slopes_name], "bias/alibi")
        else:
            score = graph.constant("no_bias", 0, np.float32)
        bias = graph.node("Where", [visible, score, hidden], "bias/masked")
        if graph.element_type == TensorProto.FLOAT:
            return bias
        return graph.node("Cast", [bias], "bias/attention_bias", to=graph.element_type)

    def _embed(self, query_positions: str) -> str:
        graph = self.graph
        tokens = self._embed_tokens()
        if self.config.position_embedding == "alibi":
            return tokens
        # Padding may lie beyond the last learned position; what it reads there is never used.
        last = graph.constant("last_position", self.config.max_seq_len - 1, np.int64)
        clamped = graph.node("Min", [query_positions, last], "positions/clamped")
        learned = graph.node("Gather", [graph.weight("wpe"), clamped], "position_embedding")
        return graph.node("Add", [tokens, learned], "embedding_with_position")

    def _embed_tokens(self) -> str:
        graph = self.graph
        if not self.vocabulary.embedding:
            return graph.node("Gather", [graph.weight("wte"), "input_ids"], "embedding")
        rows = sharding.vocabulary_rows(self.config, self.rank)
        # A rank beyond the vocabulary's end needs some row to read; no token is its own.
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

    def _attention(self, prefix: str, layer: int, hidden: str, bias: str) -> str:
        graph, name = self.graph, f"{prefix}.attention"
        normed = self._norm(f"{prefix}.input_layernorm", hidden)
        query, key, value = self._query_key_value(name, normed)
        keys, values = (
            self.cache.update(graph, layer, kind, new)
            for kind, new in zip(KINDS, (key, value), strict=True)
        )
        context = graph.node(
            "Attention",
            [query, keys, values, bias],
            f"{name}/scaled_dot_product",
            scale=self.config.softmax_scale,
        )
        context = graph.node("Transpose", [context], f"{name}/transposed", perm=[0, 2, 1, 3])
        merged = graph.constant("merged_heads", [0, 0, -1], np.int64)
        context = graph.node("Reshape", [context, merged], f"{name}/merged")
        output = self._linear_of_ranks(f"{name}.dense", context)
        return graph.node("Add", [hidden, output], f"{name}/residual")

    def _query_key_value(self, name: str, normed: str) -> tuple[str, str, str]:
        """Q `[batch, heads, seq, head_dim]`, K and V `[batch, kv_heads, seq, head_dim]`."""
        graph = self.graph
        packed = self._linear(f"{name}.query_key_value", normed)
        if self.config.clip_qkv is not None:
            low = graph.scalar("clip_low", -self.config.clip_qkv)
            high = graph.scalar("clip_high", self.config.clip_qkv)
            packed = graph.node("Clip", [packed, low, high], f"{name}/clipped")
        if self.config.qk_ln:
            packed = self._normalize_query_and_key(name, packed)
        total = self.num_heads + 2 * self.num_kv_heads
        shape = graph.constant("split_heads", [0, 0, total, self.config.head_dim], np.int64)
        packed = graph.node("Reshape", [packed, shape], f"{name}/heads")
        packed = graph.node("Transpose", [packed], f"{name}/heads_first", perm=[0, 2, 1, 3])
        parts = [f"{name}/{part}" for part in ("query", "key", "value")]
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        graph.split(packed, parts, sizes, axis=1, name=f"{name}/split")
        return parts[0], parts[1], parts[2]

    def _normalize_query_and_key(self, name: str, packed: str) -> str:
        """Layer norm over all of a token's query features, and over all of its key features."""
        graph, head_dim = self.graph, self.config.head_dim
        parts = [f"{name}/flat_{part}" for part in ("query", "key", "value")]
        sizes = [n * head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        graph.split(packed, parts, sizes, axis=2, name=f"{name}/flat_split")
        if self.rank.tp_size == 1:
            epsilon = self.config.qk_ln_epsilon
            query = self._layer_norm(f"{name}.q_layernorm", parts[0], epsilon)
            key = self._layer_norm(f"{name}.k_layernorm", parts[1], epsilon)
        else:
            query, key = self._normalize_across_ranks(name, parts[0], parts[1])
        return graph.node("Concat", [query, key, parts[2]], f"{name}/normalized", axis=2)

    def _normalize_across_ranks(self, name: str, query: str, key: str) -> tuple[str, str]:
        """The layer norms of query and key, whose features lie on several ranks.

        Sums and sums of squares of both meet in one all-reduce, in float32.
        """
        graph = self.graph
        held = sharding.qkv_columns(self.config, self.rank)
        columns = (held[0], held[1].shifted(-self.config.hidden_size))
        widths = (self.config.hidden_size, self.config.kv_size)
        values = [
            graph.node("Cast", [value], f"{value}/float", to=TensorProto.FLOAT)
            for value in (query, key)
        ]
        means = []
        for value, part, width in zip(values, columns, widths, strict=True):
            # Ranks that hold the same K/V heads add the same sums, each its share.
            copies = len(part) * self.rank.tp_size / width
            scale = graph.constant(f"{value}/share", 1 / (width * copies), np.float32)
            means += self._means(value, scale)
        packed = graph.node("Concat", means, f"{name}/own_means", axis=2)
        packed = graph.all_reduce(packed, f"{name}/means", TensorProto.FLOAT)
        found = [f"{name}/{kind}" for kind in ("q_mean", "q_square", "k_mean", "k_square")]
        graph.split(packed, found, [1, 1, 1, 1], axis=2, name=f"{name}/split_means")
        return (
            self._apply_norm(f"{name}.q_layernorm", values[0], found[0], found[1], columns[0]),
            self._apply_norm(f"{name}.k_layernorm", values[1], found[2], found[3], columns[1]),
        )

    def _means(self, value: str, scale: str) -> list[str]:
        """This rank's share of the mean and of the mean square, each `[batch, seq, 1]`."""
        graph = self.graph
        axis = graph.constant("axis_2", [2], np.int64)
        square = graph.node("Mul", [value, value], f"{value}/squared")
        sums = [
            graph.node("ReduceSum", [part, axis], f"{part}/sum", keepdims=1)
            for part in (value, square)
        ]
        return [graph.node("Mul", [total, scale], f"{total}/share_of_mean") for total in sums]

    def _apply_norm(self, name: str, value: str, mean: str, square: str, columns: Range) -> str:
        graph = self.graph
        squared_mean = graph.node("Mul", [mean, mean], f"{name}/squared_mean")
        variance = graph.node("Sub", [square, squared_mean], f"{name}/variance")
        epsilon = graph.constant("qk_ln_epsilon", self.config.qk_ln_epsilon, np.float32)
        deviation = graph.node("Add", [variance, epsilon], f"{name}/variance_and_epsilon")
        deviation = graph.node("Sqrt", [deviation], f"{name}/deviation")
        centred = graph.node("Sub", [value, mean], f"{name}/centred")
        normed = graph.node("Div", [centred, deviation], f"{name}/float")
        normed = graph.node("Cast", [normed], f"{name}/normed", to=graph.element_type)
        weight = graph.weight_rows(f"{name}.weight", columns)
        normed = graph.node("Mul", [normed, weight], f"{name}/scaled")
        if not graph.has_weight(f"{name}.bias"):
            return normed
        bias = graph.weight_rows(f"{name}.bias", columns)
        return graph.node("Add", [normed, bias], name)

    def _feed_forward(self, prefix: str, hidden: str) -> str:
        graph, name = self.graph, f"{prefix}.mlp"
        normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
        wide = self._linear(f"{name}.dense_h_to_4h", normed)
        wide = graph.node("Gelu", [wide], f"{name}/gelu", approximate="none")
        output = self._linear_of_ranks(f"{name}.dense_4h_to_h", wide)
        return graph.node("Add", [hidden, output], f"{name}/residual")

    def _logits(self, hidden: str) -> None:
        """Logits at the positions asked for; the final norm runs on those alone."""
        graph = self.graph
        chosen = graph.node("GatherND", [hidden, "logit_positions"], "head/hidden")
        normed = self._norm("final_layernorm", chosen)
        product = self._sharded_head(normed) if self.vocabulary.head else self._whole_head(normed)
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
        head = self.graph.weight(self._head)
        return self.graph.node("Gemm", [normed, head], "head/product", transB=1)

    def _sharded_head(self, normed: str) -> str:
        """Every rank's part of the vocabulary as rows, gathered, without the padding."""
        graph = self.graph
        rows = sharding.vocabulary_rows(self.config, self.rank)
        width = sharding.vocabulary_width(self.config, self.rank.tp_size)
        parts = [self._vocabulary_part(self._head, rows)] if len(rows) else []
        if len(rows) < width:
            parts.append(graph.zeros("head/padding", (width - len(rows), self.config.hidden_size)))
        head = parts[0] if len(parts) == 1 else graph.node("Concat", parts, "head/padded", axis=0)
        product = graph.node("Gemm", [head, normed], "head/own_product", transB=1)
        gathered = graph.all_gather(product, "head/gathered")
        if width * self.rank.tp_size != self.config.vocab_size:
            ends = graph.constant("vocabulary/end", [self.config.vocab_size], np.int64)
            starts, axes = (
                graph.constant(f"vocabulary/{n}", [0], np.int64) for n in ("first", "axis")
            )
            gathered = graph.node("Slice", [gathered, starts, ends, axes], "head/unpadded")
        return graph.node("Transpose", [gathered], "head/product", perm=[1, 0])

    def _vocabulary_part(self, name: str, rows: Range) -> str:
        """This rank's rows of the embedding or the head."""
        graph = self.graph
        both_are_sharded = self.vocabulary.embedding and self.vocabulary.head
        if not self.config.tie_word_embeddings or both_are_sharded:
            return graph.weight_rows(name, rows)
        # TensorRT tells weights apart by address, and refuses two sizes at one; so the rows are cut
        # out of the whole matrix, which the graph holds anyway. Both runtimes do that at load.
        first = graph.constant("vocabulary/first_row", [rows.start], np.int64)
        end = graph.constant("vocabulary/end_row", [rows.stop], np.int64)
        axis = graph.constant("axis_0", [0], np.int64)
        return graph.node("Slice", [graph.weight(name), first, end, axis], "vocabulary/own_rows")

    def _norm(self, name: str, value: str) -> str:
        epsilon = self.config.layer_norm_epsilon
        if self.config.norm_type == "layernorm":
            return self._layer_norm(name, value, epsilon)
        inputs = [value, self.graph.weight(f"{name}.weight")]
        return self.graph.node("RMSNormalization", inputs, name, axis=-1, epsilon=epsilon)

    def _layer_norm(self, name: str, value: str, epsilon: float) -> str:
        graph = self.graph
        inputs = [value, graph.weight(f"{name}.weight")]
        if graph.has_weight(f"{name}.bias"):
            inputs.append(graph.weight(f"{name}.bias"))
        return graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=epsilon)

    def _linear(self, name: str, value: str) -> str:
        """A linear layer; its bias, where it has one, is added to the product."""
        return self._add_bias(name, self.linear_layers.emit(self.graph, name, value))

    def _linear_of_ranks(self, name: str, value: str) -> str:
        """A linear layer whose input features lie on several ranks; they meet before the bias."""
        product = self.linear_layers.emit(self.graph, name, value)
        return self._add_bias(name, self.graph.all_reduce(product, f"{name}/all_ranks"))

    def _add_bias(self, name: str, product: str) -> str:
        graph = self.graph
        if not graph.has_weight(f"{name}.bias"):
            return product
        return graph.node("Add", [product, graph.weight(f"{name}.bias")], f"{name}/biased")
