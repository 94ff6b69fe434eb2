"""All ranks of a network in one graph: what a collective does becomes a Sum or a Concat.

So several ranks are run in one process, without MPI. Nodes, values and caches of rank r carry the
prefix `rank{r}/`; the inputs of a step are shared.
"""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from mpt_trt.network.graph import COLLECTIVE, COLLECTIVE_DOMAIN

SHARED = ("input_ids", "write_positions", "logit_positions")


class MergedRanks:
    """A StepModel (see mpt_trt.engines.interface) over rank{r}.onnx of one folder.

    `step` returns rank 0's logits after checking that those of all ranks are the same, bit for bit.
    """

    def __init__(self, folder: Path, tp_size: int, max_batch_size: int = 8, num_threads: int = 1):
        graphs = [
            onnx.load(folder / f"rank{r}.onnx", load_external_data=False) for r in range(tp_size)
        ]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = num_threads
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
        # As in the CPU engine: products of quantized weights with exact activations.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        merged = merge([model.graph for model in graphs])
        self._session = onnxruntime.InferenceSession(merged.SerializeToString(), options)
        self._tp_size = tp_size
        self._cache: dict[str, NDArray] = {}
        self._cache_inputs = [i for i in self._session.get_inputs() if "past_" in i.name]
        self.capacity = int(self._cache_inputs[0].shape[2])
        self.max_batch_size, self.max_step_tokens = max_batch_size, self.capacity
        self.vocab_size = int(graphs[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value)

    def start(self, batch_size: int) -> None:
        types = {
            "tensor(float)": np.float32,
            "tensor(float16)": np.float16,
            "tensor(int8)": np.int8,
        }
        self._cache = {
            i.name: np.zeros((batch_size, *i.shape[1:]), types[i.type]) for i in self._cache_inputs
        }

    def step(
        self,
        input_ids: NDArray[np.int64],
        write_positions: NDArray[np.int64],
        logit_positions: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        feeds = dict(zip(SHARED, (input_ids, write_positions, logit_positions), strict=True))
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, feeds | self._cache), strict=True))
        for name, old in self._cache.items():
            if (new := found.get(name.replace("past_", "new_"))) is None:
                self._cache[name] = found[name.replace("past_", "present_")]
                continue
            for row, start in enumerate(write_positions):
                old[row, :, start : start + new.shape[2]] = new[row]
        logits = [found[f"rank{rank}/logits"] for rank in range(self._tp_size)]
        for other in logits[1:]:
            assert np.array_equal(logits[0], other), "ranks do not agree"
        return logits[0]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self._cache = {name: value[rows] for name, value in self._cache.items()}


def merge(graphs: list[onnx.GraphProto]) -> onnx.ModelProto:
    """One model of all ranks' graphs; their collectives must come in the same order."""
    nodes: list[onnx.NodeProto] = []
    waiting: list[list[onnx.NodeProto]] = []
    for rank, graph in enumerate(graphs):
        own = [_renamed(node, rank) for node in graph.node]
        nodes += [node for node in own if node.op_type != COLLECTIVE]
        waiting.append([node for node in own if node.op_type == COLLECTIVE])
    for together in zip(*waiting, strict=True):
        nodes += _meeting(list(together))
    merged = helper.make_graph(
        _sorted(nodes, [name for graph in graphs for name in SHARED] + _initial(graphs)),
        "merged",
        [i for i in graphs[0].input if i.name in SHARED]
        + [_prefixed(i, r) for r, g in enumerate(graphs) for i in g.input if i.name not in SHARED],
        [_prefixed(o, rank) for rank, graph in enumerate(graphs) for o in graph.output],
        [_prefixed(t, rank) for rank, graph in enumerate(graphs) for t in graph.initializer],
    )
    return helper.make_model(merged, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def _meeting(together: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    assert {node.domain for node in together} == {COLLECTIVE_DOMAIN}
    inputs = [node.input[0] for node in together]
    attributes = {a.name: helper.get_attribute_value(a) for a in together[0].attribute}
    assert attributes["nb_rank"] == len(together)
    if attributes["collective_operation"] == b"all_reduce":
        assert attributes["reduce_op"] == b"sum"
        return [helper.make_node("Sum", inputs, node.output) for node in together]
    assert attributes["collective_operation"] == b"all_gather"
    return [helper.make_node("Concat", inputs, node.output, axis=0) for node in together]


def _sorted(nodes: list[onnx.NodeProto], known: list[str]) -> list[onnx.NodeProto]:
    """Topological order; fails for a cycle, and for an input that nothing gives."""
    producers = dict.fromkeys(known)
    producers |= {name: index for index, node in enumerate(nodes) for name in node.output}
    needed = {
        index: {producers[name] for name in node.input} - {None} for index, node in enumerate(nodes)
    }
    return [nodes[index] for index in TopologicalSorter(needed).static_order()]


def _initial(graphs: list[onnx.GraphProto]) -> list[str]:
    return [
        f"rank{rank}/{value.name}"
        for rank, graph in enumerate(graphs)
        for value in (*graph.input, *graph.initializer)
    ]


def _renamed(node: onnx.NodeProto, rank: int) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"rank{rank}/{node.name}"
    copy.input[:] = [name if name in SHARED else f"rank{rank}/{name}" for name in node.input]
    copy.output[:] = [f"rank{rank}/{name}" for name in node.output]
    return copy


def _prefixed(value, rank: int):
    copy = type(value)()
    copy.CopyFrom(value)
    copy.name = f"rank{rank}/{value.name}"
    return copy
