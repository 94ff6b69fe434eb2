"""Shared code of tests that compare a network with its rewrite for a GPU, both on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from mpt_trt.engines.onnxruntime.cuda import rewrites
from mpt_trt.engines.onnxruntime.cuda.shared_weights import share_weights
from mpt_trt.engines.onnxruntime.external_data import SharedWeight
from mpt_trt.engines.rank_descriptions import network_name

BOUND = 2e-5
# Rows of different lengths, one of a single token.
LENGTHS = np.array([5, 1, 9])
BATCH = len(LENGTHS)


@dataclass(frozen=True)
class Loaded:
    """A session with the weights that it takes as inputs, by name."""

    session: onnxruntime.InferenceSession
    weights: dict[str, onnxruntime.OrtValue]

    def run(self, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        """Runs the session with those of `feeds` that it has as inputs."""
        of, taken = onnxruntime.OrtValue.ortvalue_from_numpy, self.session.get_inputs()
        values = {
            each.name: of(np.ascontiguousarray(feeds[each.name]))
            for each in taken
            if each.name in feeds
        }
        names = [output.name for output in self.session.get_outputs()]
        found = self.session.run_with_ort_values(names, values | self.weights)
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}


def load(model: onnx.ModelProto, folder: Path, weights: list[SharedWeight]) -> Loaded:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    entries = {
        "session.model_external_initializers_file_folder_path": str(folder),
        "session.qdq_matmulnbits_accuracy_level": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Loaded(session, {weight.name: weight.as_value() for weight in weights})


def network_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / network_name(0), load_external_data=False)


def empty_cache(model: onnx.ModelProto) -> dict[str, NDArray]:
    caches = [value for value in model.graph.input if value.name.startswith("past_")]
    return {
        value.name: np.zeros(
            (BATCH, *(d.dim_value for d in value.type.tensor_type.shape.dim[1:])),
            helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for value in caches
    }


def after(
    cache: dict[str, NDArray], outputs: dict[str, NDArray], positions: NDArray[np.int64]
) -> dict[str, NDArray]:
    """Returns the cache after a step that began at `positions`."""
    found = {}
    for name, old in cache.items():
        if (present := name.replace("past_", "present_")) in outputs:
            found[name] = outputs[present]
            continue
        found[name], new = old.copy(), outputs[name.replace("past_", "new_")]
        for row, start in enumerate(positions):
            found[name][row, :, start : start + new.shape[2]] = new[row]
    return found


def prompt_feeds(vocab_size: int) -> dict[str, NDArray]:
    ids = np.random.default_rng(0).integers(0, vocab_size, (BATCH, LENGTHS.max()))
    return {
        "input_ids": ids,
        "write_positions": np.zeros(BATCH, np.int64),
        "logit_positions": np.stack([np.arange(BATCH), LENGTHS - 1], axis=1),
    }


def step_feeds(vocab_size: int) -> dict[str, NDArray]:
    ids = np.random.default_rng(1).integers(0, vocab_size, (BATCH, 1))
    return {"input_ids": ids, "write_positions": LENGTHS.astype(np.int64)}


def require_same(
    folder: Path, vocab_size: int, bound: float = BOUND
) -> tuple[int, onnx.ModelProto]:
    """A prompt and a step of the float32 network in `folder`, as it is and rewritten.

    bound: a multiple of the logits' standard deviation. Returns the number of weights that became
    inputs, and the network for steps.
    """
    original, shared = network_of(folder), network_of(folder)
    weights = share_weights(shared, folder).inputs
    reading, steps = rewrites.prefill_graph(shared), rewrites.decode_graph(shared)
    plain = load(original, folder, [])
    prompts, single = load(reading, folder, weights), load(steps, folder, weights)
    cache, feeds = empty_cache(original), prompt_feeds(vocab_size)
    rows = feeds["logit_positions"] @ [LENGTHS.max(), 1]
    own = {"logit_rows": rows, "key_length": LENGTHS.max(keepdims=True)}
    expected = plain.run(feeds | cache)
    require_close(expected, prompts.run(feeds | own | cache), bound)
    cache, feeds = after(cache, expected, feeds["write_positions"]), step_feeds(vocab_size)
    every_row = np.stack([np.arange(BATCH), np.zeros(BATCH, np.int64)], axis=1)
    expected = plain.run(feeds | cache | {"logit_positions": every_row})
    found = single.run(feeds | cache)
    require_close(expected, found, bound)
    logits = found["logits"].astype(np.float64)
    assert found["next_ids"].ravel().tolist() == logits.argmax(axis=-1).tolist()
    likelihood = logits.max(axis=-1) - np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(
        -np.log(found["sum_exp_relative_to_max"].ravel()), likelihood, atol=1e-5
    )
    assert found["next_positions"].tolist() == (LENGTHS + 1).tolist()
    return len(weights), steps


def require_close(expected: dict[str, NDArray], found: dict[str, NDArray], bound: float) -> None:
    """Elements of a quantized cache may be a step off."""
    for name, value in expected.items():
        is_quantized = value.dtype == np.int8
        allowed = 1 if is_quantized else bound * expected["logits"].std()
        difference = np.abs(found[name].astype(np.float64) - value.astype(np.float64))
        assert difference.max() <= allowed, name
