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

A token at cache position p attends to the positions 0..p of its row, so what padding wrote beyond a
row's end is never seen before it is overwritten.

The weights are the FT checkpoint's own files, as external data in the folder WEIGHTS_FOLDER beside
the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpt_trt import sharding
from mpt_trt.config import MptConfig, alibi_slopes
from mpt_trt.errors import MptTrtError
from mpt_trt.ft_checkpoint import FtCheckpoint, FtFile
from mpt_trt.sharding import Shard

OPSET = 24
# The first IR version that knows opset 24's types; newer ones are refused by older readers.
IR_VERSION = 11
WEIGHTS_FOLDER = "weights"
ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


@dataclass(frozen=True)
class Network:
    """A rank's graph and the FT files that it reads, by the name each has in WEIGHTS_FOLDER."""

    model: onnx.ModelProto
    files: dict[str, Path]


def build_network(checkpoint: FtCheckpoint, shard: Shard, cache_len: int) -> Network:
    """The graph of one rank in the checkpoint's storage type.

    cache_len: positions of the KV cache of a row (TensorRT wants them static).

    Raises MptTrtError for what the graph cannot express.
    """
    if checkpoint.tp_size != shard.tp_size:
        raise MptTrtError(
            f"{checkpoint.folder}: tensor_parallelism = {checkpoint.tp_size}, but an engine for "
            f"{shard.tp_size} ranks was asked for; convert with -tp {shard.tp_size}"
        )
    if shard.tp_size > 1:
        raise MptTrtError(
            f"{checkpoint.folder}: tensor_parallelism = {shard.tp_size}: engines of several ranks "
            "are not supported; convert with -tp 1"
        )
    graph = _Graph(checkpoint.rank_files(shard), ELEMENT_TYPES[checkpoint.storage_type])
    _Decoder(graph, checkpoint.config, shard, cache_len).emit()
    name = f"{checkpoint.model_name} rank {shard.rank} of {shard.tp_size}"
    files = {file.name: checkpoint.folder / file.name for file in graph.used.values()}
    return Network(graph.to_model(name), files)


@dataclass
class _Graph:
    """Collects nodes, inputs, outputs and initializers; values are referred to by name.

    weights: the rank's FT files by weight name. used: those that a node has read.
    """

    weights: dict[str, FtFile]
    element_type: int
    used: dict[str, FtFile] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def node(self, op_type: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Adds a node with one output, which is named like the node, and returns that name."""
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def input(self, name: str, element_type: int, shape: list[str | int]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element_type, shape))
        return name

    def output(self, name: str, element_type: int, shape: list[str | int]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, element_type, shape))

    def constant(self, name: str, values: object, dtype: type) -> str:
        """A small tensor stored in the graph itself; the same name is stored once."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(values, dtype), name)
        return name

    def scalar(self, name: str, value: float) -> str:
        """A number in the network's own type."""
        self.initializers[name] = helper.make_tensor(name, self.element_type, [], [value])
        return name

    def split(self, value: str, parts: list[str], sizes: list[int], axis: int, name: str) -> None:
        """Cuts `value` along `axis` into values named `parts`."""
        lengths = self.constant(f"sizes_{'_'.join(map(str, sizes))}", sizes, np.int64)
        self.nodes.append(helper.make_node("Split", [value, lengths], parts, name=name, axis=axis))

    def has_weight(self, name: str) -> bool:
        """Whether the checkpoint has the tensor and it is not FT's placeholder of zeros."""
        file = self.weights.get(name)
        return file is not None and file.weight.hf_name is not None

    def weight(self, name: str) -> str:
        """An FT file as an initializer."""
        file = self.weights[name]
        self.used[name] = file
        tensor = TensorProto(name=name, data_type=self.element_type, dims=file.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=f"{WEIGHTS_FOLDER}/{file.name}")
        self.initializers[name] = tensor
        return name

    def to_model(self, name: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, list(self.initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mpt-trt",
        )


@dataclass(frozen=True)
class _Decoder:
    """Emits the graph of one rank, from tokens to logits."""

    graph: _Graph
    config: MptConfig
    shard: Shard
    cache_len: int

    @property
    def num_heads(self) -> int:
        return len(sharding.query_heads(self.config, self.shard))

    @property
    def num_kv_heads(self) -> int:
        return len(sharding.kv_heads(self.config, self.shard))

    def emit(self) -> None:
        graph = self.graph
        graph.input("input_ids", TensorProto.INT64, ["batch", "seq"])
        graph.input("write_positions", TensorProto.INT64, ["batch"])
        graph.input("logit_positions", TensorProto.INT64, ["num_logits", 2])
        cache_shape = ["batch", self.num_kv_heads, self.cache_len, self.config.head_dim]
        for layer in range(self.config.num_layers):
            for kind in ("key", "value"):
                graph.input(f"past_{kind}.{layer}", graph.element_type, cache_shape)
        positions = self._query_positions()
        bias = self._attention_bias(positions)
        hidden = self._embed(positions)
        for layer in range(self.config.num_layers):
            hidden = self._attention(f"layers.{layer}", layer, hidden, bias)
            hidden = self._feed_forward(f"layers.{layer}", hidden)
        self._logits(hidden)
        graph.output("logits", TensorProto.FLOAT, ["num_logits", self.config.vocab_size])
        for layer in range(self.config.num_layers):
            for kind in ("key", "value"):
                graph.output(f"present_{kind}.{layer}", graph.element_type, cache_shape)

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
        """What attention adds to its scores, `[batch, heads or 1, seq, cache_len]`.

        ALiBi's slope times the (negative) distance to the key; -inf for keys after the query. The
        distance is taken before rounding to the network's type, which cannot hold large positions.
        """
        graph = self.graph
        cache_len = graph.node("Shape", ["past_key.0"], "bias/cache_shape", start=2, end=3)
        cache_len = graph.node("Squeeze", [cache_len], "bias/cache_len")
        keys = graph.node("Range", ["zero", cache_len, "one"], "bias/key_positions")
        axes = graph.constant("axes_1_3", [1, 3], np.int64)
        queries = graph.node("Unsqueeze", [query_positions, axes], "bias/query_positions")
        distance = graph.node("Sub", [keys, queries], "bias/distance")
        visible = graph.node("LessOrEqual", [distance, "zero"], "bias/visible")
        hidden = graph.constant("minus_infinity", -np.inf, np.float32)
        if self.config.position_embedding == "alibi":
            distance = graph.node("Cast", [distance], "bias/distance_float", to=TensorProto.FLOAT)
            slopes = alibi_slopes(self.config.num_heads, self.config.alibi_bias_max)
            heads = sharding.query_heads(self.config, self.shard)
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
        tokens = graph.node("Gather", [graph.weight("wte"), "input_ids"], "embedding")
        if self.config.position_embedding == "alibi":
            return tokens
        # Padding may lie beyond the last learned position; what it reads there is never used.
        last = graph.constant("last_position", self.config.max_seq_len - 1, np.int64)
        clamped = graph.node("Min", [query_positions, last], "positions/clamped")
        learned = graph.node("Gather", [graph.weight("wpe"), clamped], "position_embedding")
        return graph.node("Add", [tokens, learned], "embedding_with_position")

    def _attention(self, prefix: str, layer: int, hidden: str, bias: str) -> str:
        graph, name = self.graph, f"{prefix}.attention"
        normed = self._norm(f"{prefix}.input_layernorm", hidden)
        query, key, value = self._query_key_value(name, normed)
        present = {}
        for kind, update in (("key", key), ("value", value)):
            present[kind] = graph.node(
                "TensorScatter",
                [f"past_{kind}.{layer}", update, "write_positions"],
                f"present_{kind}.{layer}",
                axis=-2,
            )
        context = graph.node(
            "Attention",
            [query, present["key"], present["value"], bias],
            f"{name}/scaled_dot_product",
            scale=self.config.softmax_scale,
        )
        context = graph.node("Transpose", [context], f"{name}/transposed", perm=[0, 2, 1, 3])
        merged = graph.constant("merged_heads", [0, 0, -1], np.int64)
        context = graph.node("Reshape", [context, merged], f"{name}/merged")
        output = self._linear(f"{name}.dense", context)
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
        epsilon = self.config.qk_ln_epsilon
        query = self._layer_norm(f"{name}.q_layernorm", parts[0], epsilon)
        key = self._layer_norm(f"{name}.k_layernorm", parts[1], epsilon)
        return graph.node("Concat", [query, key, parts[2]], f"{name}/normalized", axis=2)

    def _feed_forward(self, prefix: str, hidden: str) -> str:
        graph, name = self.graph, f"{prefix}.mlp"
        normed = self._norm(f"{prefix}.post_attention_layernorm", hidden)
        wide = self._linear(f"{name}.dense_h_to_4h", normed)
        wide = graph.node("Gelu", [wide], f"{name}/gelu", approximate="none")
        output = self._linear(f"{name}.dense_4h_to_h", wide)
        return graph.node("Add", [hidden, output], f"{name}/residual")

    def _logits(self, hidden: str) -> None:
        """Logits at the positions asked for; the final norm runs on those alone."""
        graph = self.graph
        chosen = graph.node("GatherND", [hidden, "logit_positions"], "head/hidden")
        normed = self._norm("final_layernorm", chosen)
        head = graph.weight("wte" if self.config.tie_word_embeddings else "lm_head.weight")
        is_float = graph.element_type == TensorProto.FLOAT
        is_scaled = self.config.logit_scale != 1.0
        name = "logits" if is_float and not is_scaled else "head/product"
        logits = graph.node("Gemm", [normed, head], name, transB=1)
        if not is_float:
            name = "head/product_float" if is_scaled else "logits"
            logits = graph.node("Cast", [logits], name, to=TensorProto.FLOAT)
        if is_scaled:
            scale = graph.constant("logit_scale", self.config.logit_scale, np.float32)
            graph.node("Mul", [logits, scale], "logits")

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
        graph = self.graph
        product = graph.node("MatMul", [value, graph.weight(f"{name}.weight")], name)
        if not graph.has_weight(f"{name}.bias"):
            return product
        return graph.node("Add", [product, graph.weight(f"{name}.bias")], f"{name}/biased")
