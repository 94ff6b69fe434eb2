"""Every kind of quantization on the demo model: against ModelOpt, and between numbers of ranks.

ModelOpt's own fake-quantized model is the reference. How near an engine can come to it:

- Only weights (int4_awq), or weights and an 8-bit cache: both compute with the same integers, but
  for weights that the npz's float16 rounds across a rounding border. A few percent of the
  quantization's own distance at most; with a float32 npz there is no difference.
- Activations (fp8, SmoothQuant): rounding is not continuous. Where two computations differ by d in
  some input, d / step of the values fall on the other side of a border, and each is off by a whole
  step: the next layer's difference is about sqrt(d * step). From the 1e-7 of float32 it reaches the
  size of a step after a few products, whatever is done. So over 7 blocks two correct computations
  are nearly as far from each other as from the unquantized model; over a single block there is no
  difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from mpt_trt.calibration.block_stream import Computation, activation_amax
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import read_calibration
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.engines.build.build import build_rank
from mpt_trt.engines.build.rank_network import NetworkInputs, make_networks
from mpt_trt.engines.spec import BuilderChoice, BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.logits import mean_divergence
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding, all_ranks
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import (
    GROUPED,
    Awq,
    Fp8,
    Gptq,
    Mixed,
    Quantization,
    SmoothQuant,
    WeightOnly,
    calibration_format,
)
from references.merged_ranks import MergedRanks
from references.modelopt_reference import fake_quantized_logits
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.cuda import require_same
from support.engines import (
    COMPUTE_CAPABILITIES,
    deviation,
    feed,
    make_network,
    make_rank_network,
    open_network,
    random_ids,
)
from support.paths import REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"
GROUP_SIZE = 64
LIMITS = BuildLimits(max_batch_size=2, max_input_len=96, max_output_len=16)

QUANTIZATIONS = {
    "int8_weight_only": Quantization(WeightOnly(8)),
    "int4_weight_only": Quantization(WeightOnly(4)),
    "int4_weight_only in groups": Quantization(WeightOnly(4, 32)),
    "int4_awq": Quantization(Awq()),
    "int4_awq, int8 cache": Quantization(Awq(), "int8"),
    "int4_gptq": Quantization(Gptq()),
    "mixed": Quantization(Mixed(6.5)),
    "sq": Quantization(SmoothQuant()),
    "sq per channel": Quantization(SmoothQuant(per_token=False)),
    "sq per token": Quantization(SmoothQuant(per_channel=False)),
    "sq per tensor": Quantization(SmoothQuant(per_channel=False, per_token=False)),
    "fp8": Quantization(Fp8()),
    "fp8, int8 cache": Quantization(Fp8(), "int8"),
    "int8 cache": Quantization(None, "int8"),
}
# Under ONNX Runtime outside of an engine, NumPy has no type for the buffers of these.
WITH_FP8_CACHE = {
    "fp8, fp8 cache": Quantization(Fp8(), "fp8"),
    "fp8 cache": Quantization(None, "fp8"),
    "sq, fp8 cache": Quantization(SmoothQuant(), "fp8"),
}


@dataclass(frozen=True)
class Model:
    """A model on its way.

    samples: what calibration reads, int64 `[number, seq]`. weight_type: of weights in its result.
    """

    hf: Path
    folder: Path
    samples: torch.Tensor
    group_size: int
    weight_type: type = np.float16

    def calibrated(
        self, quantization: Quantization, checkpoint: FtCheckpoint
    ) -> CalibratedQuantization:
        needed = calibration_format(quantization.scheme, quantization.kv_cache)
        if needed is None:
            return CalibratedQuantization(quantization)
        path = self.folder / f"{needed}.npz"
        if not path.exists():
            bits = quantization.scheme.bits if isinstance(quantization.scheme, Mixed) else None
            group_size = self.group_size if needed in GROUPED else None
            plan = CalibrationPlan(needed, group_size, bits)
            weight_dtype = np.dtype(self.weight_type)
            calibrate(open_model(self.hf), self.samples, plan, Computation(), weight_dtype, path)
        calibration = read_calibration(path, checkpoint)
        return CalibratedQuantization(quantization, calibration).with_choice()

    def checkpoint(
        self, quantization: Quantization, tp_size: int, storage_type: str = "float32"
    ) -> FtCheckpoint:
        is_smoothed = isinstance(quantization.scheme, SmoothQuant)
        target = self.folder / f"{storage_type}-{is_smoothed}" / f"{tp_size}-gpu"
        if not target.exists():
            config = read_hf_config(self.hf)
            int8 = None
            if is_smoothed:
                ranges = activation_amax(self.hf, self.samples, Computation())
                int8 = Int8Conversion(ranges, 0.5, {})
            settings = ConversionSettings(storage_type, tp_size, 0, "demo", {}, int8)
            source = HfCheckpoint(self.hf, weights(config))
            write_ft_checkpoint(source, config, settings, target)
        return read_ft_checkpoint(target)

    def networks(self, quantization: Quantization, tp_size: int) -> Path:
        """The float32 networks of all ranks in one folder, written once and not to be changed."""
        target = self.folder / f"{quantization.scheme}-{quantization.kv_cache}-{tp_size}"
        if not target.exists():
            checkpoint = self.checkpoint(quantization, tp_size)
            calibrated = self.calibrated(quantization, checkpoint)
            inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding(), calibrated)
            make_networks(inputs, target)
        return target


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Model:
    text = REPOSITORY / "mpt_trt" / "calibration" / "calibration.txt"
    tokens = read_tokenizer(DEMO).encode(text.read_text()[:4000])
    samples = torch.tensor(tokens[:256]).reshape(4, 64)
    return Model(DEMO, tmp_path_factory.mktemp("demo"), samples, GROUP_SIZE)


@pytest.fixture(scope="module")
def held_out() -> NDArray[np.int64]:
    """Tokens that neither training nor calibration has seen, `[1, 96]`."""
    tokens = read_tokenizer(DEMO).encode((DEMO / "heldout.txt").read_text()[:1000])
    return np.array([tokens[: LIMITS.max_input_len]])


@pytest.fixture(scope="module")
def reference(held_out: NDArray[np.int64]) -> NDArray[np.float32]:
    return reference_logits(DEMO, held_out[0].tolist()).numpy()


# --- against ModelOpt ----------------------------------------------------------------------------

# Name, what ModelOpt calls it, its cache, and the largest share of the quantization's own mean KL.
AGAINST_MODELOPT = {
    "int4_awq": ("int4_awq", "auto", 0.03),
    "int8 cache": (None, "int8", 0.05),
    "fp8 cache": (None, "fp8", 0.05),
    "fp8": ("fp8", "auto", 0.8),
    "fp8, fp8 cache": ("fp8", "fp8", 0.8),
    "sq per channel": ("int8_sq", "auto", 0.3),
}


@pytest.mark.parametrize("name", AGAINST_MODELOPT)
def test_engines_agree_with_modelopt(name, demo, held_out, reference, tmp_path):
    qformat, cache, share = AGAINST_MODELOPT[name]
    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    checkpoint = demo.checkpoint(quantization, 1)
    calibrated = demo.calibrated(quantization, checkpoint)
    folder = make_network(checkpoint, tmp_path / "network", LIMITS, calibrated)
    found = feed(open_network(folder), held_out, [held_out.shape[1]])[0]
    tokens = held_out[0].tolist()
    modelopt = fake_quantized_logits(DEMO, qformat, tokens, demo.samples, GROUP_SIZE, cache).numpy()
    own, theirs = mean_divergence(reference, found), mean_divergence(reference, modelopt)
    assert mean_divergence(modelopt, found) < share * theirs
    # And no worse than theirs.
    assert own < 1.3 * theirs


SPECS = {
    "multi-head": CheckpointSpec(hidden_size=64, num_heads=4, num_layers=1, seed=3),
    "grouped-query": CheckpointSpec(
        hidden_size=96, num_heads=6, num_kv_heads=2, num_layers=1, no_bias=False, seed=4
    ),
    "multi-query": CheckpointSpec(
        hidden_size=48, num_heads=3, num_kv_heads=1, num_layers=1, qk_ln=True, clip_qkv=1.5, seed=5
    ),
    "multi-head, biases": CheckpointSpec(
        hidden_size=64, num_heads=4, num_layers=1, no_bias=False, seed=6
    ),
    "rope": CheckpointSpec(
        hidden_size=64, num_heads=4, num_kv_heads=2, num_layers=1, rope={"rope_theta": 50}, seed=7
    ),
}


# Where activations or the cache are rounded, another order of sums can move one by a step.
REWRITTEN_BOUNDS = {
    "int4_awq": 2e-5,
    "int4_awq, int8 cache": 0.1,
    "int8 cache": 0.1,
    "sq": 0.1,
    "sq per tensor": 0.1,
    "fp8": 0.1,
}


@pytest.mark.parametrize("name", REWRITTEN_BOUNDS)
def test_a_gpu_would_compute_the_same(name, demo):
    """ONNX Runtime's rewritten graphs for a GPU; see support.cuda."""
    quantization = QUANTIZATIONS[name]
    folder = demo.networks(quantization, 1)
    vocab_size = demo.checkpoint(quantization, 1).config.vocab_size
    require_same(folder, vocab_size, REWRITTEN_BOUNDS[name])


@pytest.mark.parametrize("spec_name", SPECS)
@pytest.mark.parametrize("name", ["int4_awq", "int4_awq, int8 cache", "fp8", "fp8, fp8 cache"])
def test_a_single_block_is_that_of_modelopt(name, spec_name, tmp_path):
    spec, quantization = SPECS[spec_name], (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    hf = write_checkpoint(tmp_path / "hf", spec)
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(spec.vocab_size, (4, 32), generator=generator)
    model = Model(hf, tmp_path, samples, group_size=16, weight_type=np.float32)
    checkpoint = model.checkpoint(quantization, 1)
    calibrated = model.calibrated(quantization, checkpoint)
    engine = open_network(make_network(checkpoint, tmp_path / "network", LIMITS, calibrated))
    ids = random_ids(spec, rows=1, length=40)
    found = feed(engine, ids, [33, 1, 1, 1, 1, 3])[0]
    qformat = "fp8" if isinstance(quantization.scheme, Fp8) else "int4_awq"
    cache = quantization.kv_cache
    tokens = ids[0].tolist()
    modelopt = fake_quantized_logits(hf, qformat, tokens, samples, 16, cache).numpy()
    plain = reference_logits(hf, tokens).numpy()
    error = np.sqrt(np.mean((modelopt - plain) ** 2))
    difference = np.sqrt(np.mean((found - modelopt) ** 2))
    assert difference < 1e-3 * error


# --- between numbers of ranks --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[CheckpointSpec], Model]:
    """Random models by their spec, so that each is calibrated once per format."""

    @functools.cache
    def make(spec: CheckpointSpec) -> Model:
        folder = tmp_path_factory.mktemp("small")
        hf = write_checkpoint(folder / "hf", spec)
        return Model(hf, folder, torch.arange(32).reshape(2, 16), group_size=32)

    return make


@pytest.fixture(scope="module")
def logits_of_ranks(demo: Model, held_out: NDArray[np.int64]) -> Callable[..., NDArray[np.float32]]:
    """Logits of the held-out text by (quantization, number of ranks), computed once."""
    pieces = [held_out.shape[1] - 3, 1, 2]

    @functools.cache
    def compute(quantization: Quantization, tp_size: int) -> NDArray[np.float32]:
        ranks = MergedRanks(demo.networks(quantization, tp_size), tp_size)
        return feed(ranks, held_out, pieces)[0]

    return compute


# Measuring the formats of `mixed` on the demo model takes half a minute; below is a small model.
OF_DEMO = [
    pytest.param(name, marks=[pytest.mark.nightly] if name == "mixed" else [])
    for name in QUANTIZATIONS
]


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("name", OF_DEMO)
def test_any_number_of_ranks_gives_the_same(name, tp_size, logits_of_ranks, reference):
    """Weights are quantized before they are cut, so only sums are added in another order.

    If activations are also rounded, the difference grows to the size of their rounding (see above).
    """
    quantization = QUANTIZATIONS[name]
    alone, together = (logits_of_ranks(quantization, number) for number in (1, tp_size))
    rounds_activations = isinstance(quantization.scheme, Fp8 | SmoothQuant)
    if quantization.kv_cache == "auto" and not rounds_activations:
        assert deviation(together, alone) < 1e-4
        return
    from_alone = mean_divergence(alone, together)
    assert from_alone < 1.5 * mean_divergence(reference, alone)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_any_number_of_ranks_gives_the_same_with_mixed_formats(tp_size, small_model):
    """On a small model, because every candidate of every matrix is rounded."""
    spec = CheckpointSpec(hidden_size=128, num_heads=4, seed=9)
    model, quantization = small_model(spec), QUANTIZATIONS["mixed"]
    calibrated = model.calibrated(quantization, model.checkpoint(quantization, 1))
    assert len(set(calibrated.quantization.scheme.formats)) > 1
    ids = random_ids(spec, rows=1, length=40)
    alone, together = (
        feed(MergedRanks(model.networks(quantization, number), number), ids, [37, 1, 2])
        for number in (1, tp_size)
    )
    assert deviation(together, alone) < 1e-4


def test_ranks_hold_the_integers_of_the_whole(demo):
    """Side by side, the packed 4-bit files of two ranks are those of one."""
    quantization = QUANTIZATIONS["int4_awq"]
    whole, parts = (demo.networks(quantization, number) / "weights" for number in (1, 2))
    config = read_hf_config(DEMO)
    for layer in ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
        name = f"model.layers.3.{layer}.weight.int4"
        width = config.intermediate_size if layer.endswith("h_to_4h") else config.hidden_size
        expected = np.fromfile(whole / f"{name}.0.bin", np.uint8).reshape(-1, width // 2)
        found = [np.fromfile(parts / f"{name}.{rank}.bin", np.uint8) for rank in (0, 1)]
        axis = 1 if layer.endswith("h_to_4h") else 0
        shape = [-1, width // 2]
        shape[1] //= 2 if axis == 1 else 1
        joined = np.concatenate([part.reshape(shape) for part in found], axis=axis)
        np.testing.assert_array_equal(joined, expected)


# --- the plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", QUANTIZATIONS | WITH_FP8_CACHE)
def test_tensorrt_builds_a_rank_of_two(name, storage_type, small_model, tmp_path):
    spec = CheckpointSpec(hidden_size=64, num_heads=4, num_layers=1, seed=7)
    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    model = small_model(spec)
    checkpoint = model.checkpoint(quantization, 2, storage_type)
    calibrated = model.calibrated(quantization, checkpoint)
    networks, plan = tmp_path / "networks", tmp_path / "plan"
    rank = all_ranks(2)[1]
    make_rank_network(
        NetworkInputs(checkpoint, LIMITS, VocabularySharding(), calibrated), rank, networks
    )
    build_rank(networks, 1, BuilderChoice("tensorrt_rtx", ("8.9",)), plan)
    assert (plan / "rank1.engine").stat().st_size > 0


@pytest.mark.parametrize("name", ["fp8", "fp8 cache"])
def test_fp8_is_refused_for_gpus_without_it(name, tmp_path):
    spec = CheckpointSpec(num_layers=1)
    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    hf = write_checkpoint(tmp_path / "hf", spec)
    model = Model(hf, tmp_path, torch.arange(16).reshape(1, 16), group_size=16)
    checkpoint = model.checkpoint(quantization, 1)
    folder = make_network(
        checkpoint, tmp_path / "n", LIMITS, model.calibrated(quantization, checkpoint)
    )
    builder = BuilderChoice("tensorrt_rtx", ("8.0", *COMPUTE_CAPABILITIES, "8.9"))
    with pytest.raises(MptTrtError, match=r"8\.0, 8\.6 cannot compute with fp8, which needs 8\.9"):
        build_rank(folder, 0, builder, tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    only_new = replace(builder, compute_capabilities=("8.9",))
    build_rank(folder, 0, only_new, tmp_path / "plan")


def test_a_failed_build_says_who_multiplies_integers(tmp_path):
    """A network that TensorRT cannot parse: it names neither the cause nor a way out itself."""
    spec = CheckpointSpec(num_layers=1)
    model = Model(
        write_checkpoint(tmp_path / "hf", spec), tmp_path, torch.arange(16).reshape(1, 16), 16
    )
    builder = BuilderChoice("tensorrt_rtx", COMPUTE_CAPABILITIES)
    for name, is_named in (("sq", True), ("int8_weight_only", False)):
        quantization = QUANTIZATIONS[name]
        checkpoint = model.checkpoint(quantization, 1)
        calibrated = model.calibrated(quantization, checkpoint)
        folder = make_network(checkpoint, tmp_path / name, LIMITS, calibrated)
        # Of the same size: another one would be refused before TensorRT sees it.
        network = folder / "rank0.onnx"
        model_proto = onnx.load(network, load_external_data=False)
        node = next(node for node in model_proto.graph.node if node.op_type == "Add")
        node.op_type = "Bad"
        network.write_bytes(model_proto.SerializeToString())
        with pytest.raises(MptTrtError, match="cannot parse the network") as caught:
            build_rank(folder, 0, builder, tmp_path / "plan", is_trusted=True)
        assert ("use backend tensorrt_llm" in str(caught.value)) == is_named


# --- ONNX Runtime --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage_type", ["float16", "bfloat16"])
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("name", QUANTIZATIONS | WITH_FP8_CACHE)
def test_onnx_runtime_runs_16_bit_networks(name, num_heads, storage_type, small_model, tmp_path):
    """Networks are as near as float32's, also with one head, which changes the graph."""
    quantization = (QUANTIZATIONS | WITH_FP8_CACHE)[name]
    spec = CheckpointSpec(hidden_size=32, num_heads=num_heads, num_layers=1, seed=8)
    model = small_model(spec)
    ids = random_ids(spec, rows=2, length=12)
    found = []
    for dtype in ("float32", storage_type):
        checkpoint = model.checkpoint(quantization, 1, dtype)
        calibrated = model.calibrated(quantization, checkpoint)
        engine = open_network(make_network(checkpoint, tmp_path / dtype, LIMITS, calibrated))
        found.append(feed(engine, ids, [9, 1, 2]))
    plain = np.stack([reference_logits(model.hf, row.tolist()).numpy() for row in ids])
    errors = [float(np.sqrt(np.mean((logits - plain) ** 2))) for logits in found]
    rounding = {"float16": 0.01, "bfloat16": 0.05}[storage_type] * plain.std()
    assert errors[1] < 1.5 * errors[0] + rounding
