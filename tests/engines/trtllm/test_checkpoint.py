"""TensorRT-LLM checkpoints: against its loader's rules, our own networks, and ModelOpt's export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import torch as torch_file
from safetensors.numpy import load_file

from mpt_trt.calibration.block_stream import Computation
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import read_calibration
from mpt_trt.engines.trtllm import checkpoint as trtllm_checkpoint
from mpt_trt.engines.trtllm.checkpoint import TrtllmConversion, write_trtllm_checkpoint
from mpt_trt.engines.trtllm.safetensors_file import StreamedTensor, write_safetensors
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.network.graph import StoredTensor
from mpt_trt.network.linear.make_linear import make_linear
from mpt_trt.quantization.schemes import Awq, Fp8, Quantization, SmoothQuant, WeightOnly
from mpt_trt.system.files import content_hash
from references import trtllm_loader
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.engines import call_tool
from support.ft import random_amax, write_ft

MODELOPT_SQ = SmoothQuant(per_channel=True, per_token=False)
PLUGIN_SQ = {
    "per channel, per token": SmoothQuant(0.5, True, True),
    # Alpha 0.5 would be ModelOpt's form.
    "per channel": SmoothQuant(0.75, True, False),
    "per token": SmoothQuant(0.5, False, True),
    "per tensor": SmoothQuant(0.5, False, False),
}
NAMES = {
    "attention.query_key_value": ("attention.qkv", "attn.Wqkv"),
    "attention.dense": ("attention.dense", "attn.out_proj"),
    "mlp.dense_h_to_4h": ("mlp.fc", "ffn.up_proj"),
    "mlp.dense_4h_to_h": ("mlp.proj", "ffn.down_proj"),
}

# Small models, and the number of ranks that they are cut for.
small = partial(CheckpointSpec, hidden_size=48, num_layers=2, vocab_size=96)
PLAIN = {
    "multi-head": (small(num_heads=6), 1),
    "6 heads, 3 ranks": (small(num_heads=6), 3),
    "grouped-query": (small(num_heads=6, num_kv_heads=2, clip_qkv=0.7), 2),
    "2 K/V heads on 4 ranks": (small(num_heads=8, num_kv_heads=2), 4),
    "multi-query on 4 ranks": (small(num_kv_heads=1, alibi_bias_max=16), 4),
    "24 heads, untied head": (
        small(hidden_size=96, num_heads=24, num_kv_heads=8, tie_word_embeddings=False),
        2,
    ),
    "vocabulary of 101": (small(vocab_size=101), 1),
}
# Wide enough for the 4-bit kernels: 128 inputs and outputs per rank.
wide = partial(CheckpointSpec, hidden_size=256, num_layers=1, vocab_size=96, seed=3)
WIDE = {
    "multi-head": (wide(), 1),
    "6 heads, 3 ranks": (wide(hidden_size=384, num_heads=6), 3),
    "grouped-query": (wide(num_kv_heads=2, clip_qkv=0.7, alibi_bias_max=16), 2),
    "multi-query on 2 ranks": (wide(num_kv_heads=1, num_layers=2), 2),
}


WHOLE_EMBEDDING = VocabularySharding()


@dataclass(frozen=True)
class Workshop:
    """A folder with one model in any requested form, each made once.

    dtype: type of the original.
    """

    folder: Path
    spec: CheckpointSpec
    tp_size: int
    dtype: torch.dtype = torch.float32

    @property
    def hf(self) -> Path:
        target = self.folder / "hf"
        if not target.exists():
            write_checkpoint(target, self.spec, dtype=self.dtype)
        return target

    def ft(self, storage_type: str = "float16", alpha: float | None = None) -> FtCheckpoint:
        target = self.folder / f"ft-{storage_type}-{alpha}" / f"{self.tp_size}-gpu"
        if not target.exists():
            int8 = None if alpha is None else Int8Conversion(random_amax(self.spec), alpha, {})
            write_ft(self.hf, target, storage_type, self.tp_size, int8)
        return read_ft_checkpoint(target)

    def calibrated(
        self, checkpoint: FtCheckpoint, quantization: Quantization, plan: CalibrationPlan | None
    ) -> CalibratedQuantization:
        if plan is None:
            return CalibratedQuantization(quantization)
        target = self.folder / f"{plan.quantization_format}-{plan.group_size}.npz"
        if not target.exists():
            samples = torch.randint(self.spec.vocab_size, (2, 12), generator=generator())
            computation = Computation(batch_size=2)
            source = open_model(self.hf)
            calibrate(source, samples, plan, computation, np.dtype(np.float32), target)
        return CalibratedQuantization(quantization, read_calibration(target, checkpoint))

    def write(
        self,
        checkpoint: FtCheckpoint,
        calibrated: CalibratedQuantization,
        vocabulary: VocabularySharding = WHOLE_EMBEDDING,
    ) -> trtllm_loader.Loaded:
        target = self.folder / "trtllm"
        conversion = TrtllmConversion(checkpoint, calibrated, vocabulary)
        write_trtllm_checkpoint(conversion, target, workers=2)
        return trtllm_loader.load(target)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workshop]:
    """A function that makes the workshop of a model, whose forms no test may change."""

    @cache
    def folder_of(spec: CheckpointSpec, dtype: torch.dtype) -> Path:
        return tmp_path_factory.mktemp("workshop")

    def workshop(
        spec: CheckpointSpec, tp_size: int, dtype: torch.dtype = torch.float32
    ) -> Workshop:
        return Workshop(folder_of(spec, dtype), spec, tp_size, dtype)

    return workshop


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


def stored_bytes(stored: StoredTensor) -> bytes:
    if isinstance(stored.content, Path):
        return stored.content.read_bytes()
    return b"".join(np.ascontiguousarray(piece).tobytes() for piece in stored.content())


def own_tensors(
    checkpoint: FtCheckpoint, rank: int, calibrated: CalibratedQuantization
) -> dict[str, StoredTensor]:
    """Tensors that mpt-trt's own network stores for a rank."""
    return make_linear(checkpoint, Rank(rank, checkpoint.tp_size), calibrated).tensors()


def own_values(stored: StoredTensor, dtype: type) -> NDArray:
    return np.frombuffer(stored_bytes(stored), dtype).reshape(stored.shape)


def own_nibbles(stored: StoredTensor) -> NDArray[np.int8]:
    """ONNX's INT4: two elements a byte along the flattened array, the even one in the low half."""
    packed = np.frombuffer(stored_bytes(stored), np.uint8)
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1).astype(np.int8)
    return np.where(flat > 7, flat - 16, flat).astype(np.int8).reshape(stored.shape)


def layers_of(checkpoint: FtCheckpoint) -> list[tuple[str, str]]:
    """(FT layer, TensorRT-LLM layer) of every matrix."""
    return [
        (f"layers.{layer}.{ft}", f"transformer.layers.{layer}.{name}")
        for layer in range(checkpoint.config.num_layers)
        for ft, (name, _) in NAMES.items()
    ]


# --- unquantized ---------------------------------------------------------------------------------


@pytest.mark.parametrize("storage_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_checkpoints_hold_the_models_own_tensors(name, storage_type, shared):
    spec, tp_size = PLAIN[name]
    workshop = shared(spec, tp_size)
    found = workshop.write(workshop.ft(storage_type), CalibratedQuantization())
    dtype = getattr(torch, storage_type)
    expected = {key: value.to(dtype) for key, value in tensors(spec).items()}
    for layer in range(spec.num_layers):
        block = f"transformer.blocks.{layer}"
        for own, hf in NAMES.values():
            matrix = trtllm_loader.whole_matrix(found, layer, own)
            assert torch.equal(matrix, expected[f"{block}.{hf}.weight"].float())
        for own, hf in (("input_layernorm", "norm_1"), ("post_layernorm", "norm_2")):
            for rank in found.ranks:
                stored = rank[f"transformer.layers.{layer}.{own}.weight"]
                assert torch.equal(stored, expected[f"{block}.{hf}.weight"])
    embedding = expected["transformer.wte.weight"]
    head = embedding if spec.tie_word_embeddings else expected["lm_head.weight"]
    assert torch.equal(torch.cat([rank["lm_head.weight"] for rank in found.ranks]), head)
    for rank in found.ranks:
        assert torch.equal(rank["transformer.vocab_embedding.weight"], embedding)
        assert torch.equal(rank["transformer.ln_f.weight"], expected["transformer.norm_f.weight"])


@pytest.mark.parametrize("name", PLAIN)
def test_config_says_what_the_model_is(name, shared):
    spec, tp_size = PLAIN[name]
    workshop = shared(spec, tp_size)
    config = workshop.write(workshop.ft(), CalibratedQuantization()).config
    assert {
        "dtype": "float16",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads or spec.num_heads,
        "max_position_embeddings": spec.max_seq_len,
        "clip_qkv": spec.clip_qkv,
        "alibi_bias_max": spec.alibi_bias_max,
        "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "use_parallel_embedding": False,
    }.items() <= config.items()


def test_end_tokens_provenance_and_tokenizer_travel_with_it(tmp_path):
    hf = write_checkpoint(tmp_path / "hf", small(num_heads=6))
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    call_tool("convert_hf_mpt_to_ft.py", "-i", hf, "-o", tmp_path / "ft", "-t", "float16")
    target = tmp_path / "trtllm"
    for _ in range(2):  # the second one replaces what is of the same kind
        call_tool(
            *("convert_ft_to_trtllm.py", "--model_dir", tmp_path / "ft/1-gpu"),
            *("--output_dir", target),
        )
    manifest = json.loads((target / "manifest.json").read_text())
    ft = json.loads((tmp_path / "ft/1-gpu/manifest.json").read_text())
    for key in ("mpt_trt_version", "provenance", "end_ids", "ignored_end_ids"):
        assert manifest[key] == ft[key], key
    assert manifest["end_ids"] == [7, 9]
    assert manifest["ignored_end_ids"] == {"config.json": [0]}
    names = sorted(path.name for path in (target / "tokenizer").iterdir())
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(names)
    assert sorted(manifest["files"]) == [f"tokenizer/{name}" for name in names]
    for name, known in manifest["files"].items():
        assert known == content_hash(target / name) == content_hash(hf / Path(name).name)


def test_a_sharded_embedding_is_divided_by_rows(shared):
    spec, tp_size = PLAIN["6 heads, 3 ranks"]
    workshop = shared(spec, tp_size)
    found = workshop.write(
        workshop.ft("float32"), CalibratedQuantization(), VocabularySharding(embedding=True)
    )
    assert found.config["use_parallel_embedding"] is True
    parts = [rank["transformer.vocab_embedding.weight"] for rank in found.ranks]
    assert torch.equal(torch.cat(parts), tensors(spec)["transformer.wte.weight"])


# --- quantized: the integers of our own networks -------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", WIDE)
def test_weight_only_variants_hold_what_trtllm_build_quantizes(name, bits, shared):
    """The matrices of the FT checkpoint, from which our own networks are quantized."""
    workshop = shared(*WIDE[name])
    checkpoint = workshop.ft()
    found = workshop.write(checkpoint, CalibratedQuantization(Quantization(WeightOnly(bits))))
    assert found.config["quantization"]["quant_algo"] == f"W{bits}A16"
    for rank, stored in enumerate(found.ranks):
        own = own_tensors(checkpoint, rank, CalibratedQuantization())
        for ft, name in layers_of(checkpoint):
            expected = own_values(own[f"{ft}.weight"], np.float16)
            np.testing.assert_array_equal(stored[f"{name}.weight"].numpy().T, expected)


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("group_size", [64, 128])
def test_awq_has_the_integers_of_our_own_network(group_size, name, shared):
    workshop = shared(*WIDE[name])
    checkpoint = workshop.ft()
    # With a quantized cache, our own network does not fold scales into V either.
    quantization = Quantization(Awq(group_size), "int8")
    plan = CalibrationPlan("int4_awq", group_size)
    calibrated = workshop.calibrated(checkpoint, quantization, plan)
    found = workshop.write(checkpoint, calibrated)
    assert found.config["quantization"]["group_size"] == group_size
    for rank, stored in enumerate(found.ranks):
        own = own_tensors(checkpoint, rank, calibrated)
        for ft, name in layers_of(checkpoint):
            integers = trtllm_loader.unpacked(stored[f"{name}.weight"]).numpy()
            expected = own_nibbles(own[f"{ft}.weight.quantized"])
            np.testing.assert_array_equal(integers.T, expected)
            scales = stored[f"{name}.weights_scaling_factor"].numpy().astype(np.float16)
            np.testing.assert_array_equal(
                scales.T, own_values(own[f"{ft}.weight.scale"], np.float16)
            )
            if f"{ft}.pre_quant_scale" in own:
                np.testing.assert_array_equal(
                    stored[f"{name}.prequant_scaling_factor"].numpy(),
                    own_values(own[f"{ft}.pre_quant_scale"], np.float16),
                )
    assert_near_the_model(found, workshop.spec, 0.2)


@pytest.mark.parametrize("storage_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PLAIN)
def test_fp8_has_the_values_of_our_own_network(name, storage_type, shared):
    workshop = shared(*PLAIN[name])
    checkpoint = workshop.ft(storage_type)
    calibrated = workshop.calibrated(checkpoint, Quantization(Fp8(), "fp8"), CalibrationPlan("fp8"))
    found = workshop.write(checkpoint, calibrated)
    for rank, stored in enumerate(found.ranks):
        own = own_tensors(checkpoint, rank, calibrated)
        for ft, name in layers_of(checkpoint):
            values = stored[f"{name}.weight"].view(torch.uint8).numpy()
            expected = own_values(own[f"{ft}.weight.quantized"], np.uint8)
            np.testing.assert_array_equal(values.T, expected)
            _, layer, matrix = ft.split(".", 2)
            scales = calibrated.calibration.fp8_scales(int(layer), matrix)
            assert stored[f"{name}.weights_scaling_factor"].item() == np.float32(scales.weight)
            activation = stored[f"{name}.activation_scaling_factor"].item()
            assert activation == np.float32(scales.activation)
    assert_near_the_model(found, workshop.spec, 0.05)


@pytest.mark.parametrize("name", [name for name in PLAIN if not PLAIN[name][0].clip_qkv])
@pytest.mark.parametrize("label", PLUGIN_SQ)
def test_plugin_form_has_the_integers_of_our_own_network(label, name, shared):
    spec, tp_size = PLAIN[name]
    workshop = shared(replace(spec, alibi_bias_max=8), tp_size)
    scheme = PLUGIN_SQ[label]
    checkpoint = workshop.ft("float16", scheme.alpha)
    calibrated = CalibratedQuantization(Quantization(scheme))
    found = workshop.write(checkpoint, calibrated)
    assert found.config["quantization"]["smoothquant_val"] == scheme.alpha
    for rank, stored in enumerate(found.ranks):
        own = own_tensors(checkpoint, rank, calibrated)
        files = checkpoint.rank_int8_files(Rank(rank, tp_size))
        for ft, name in layers_of(checkpoint):
            expected = own_values(own[f"{ft}.weight.quantized"], np.int8)
            np.testing.assert_array_equal(stored[f"{name}.weight"].numpy().T, expected)
            read = partial(read_floats, checkpoint.folder)
            if scheme.per_token:
                scale = own_values(own[f"{ft}.weight.scale"], np.float32)
            else:
                column = "_col" if scheme.per_channel else ""
                scale = read(getattr(files[ft], f"scale_y_accum_quant{column}"))
                output = stored[f"{name}.act_scale"].item()
                assert output == read(files[ft].scale_y_quant_orig).item()
            np.testing.assert_array_equal(
                stored[f"{name}.per_channel_scale"].numpy().reshape(-1), scale.reshape(-1)
            )
            if files[ft].smoother is not None:
                smoother = stored[f"{name}.smoother"].numpy()[0]
                np.testing.assert_array_equal(smoother, read(files[ft].smoother))


def read_floats(folder: Path, file) -> NDArray[np.float32]:
    return np.fromfile(folder / file.name, np.float32)


@pytest.mark.parametrize("label", PLUGIN_SQ)
def test_plugin_form_quantizes_each_input_with_its_own_scale(label, shared):
    """1 where scales are computed per token; else 127 over the largest input of each layer."""
    spec, tp_size = PLAIN["multi-head"]
    workshop = shared(spec, tp_size)
    scheme = PLUGIN_SQ[label]
    checkpoint = workshop.ft("float16", scheme.alpha)
    stored = workshop.write(checkpoint, CalibratedQuantization(Quantization(scheme))).ranks[0]
    files = checkpoint.rank_int8_files(Rank(0, 1))
    places = {
        "attention.query_key_value": "input_layernorm.scale_to_int",
        "mlp.dense_h_to_4h": "post_layernorm.scale_to_int",
        "attention.dense": "attention.quantization_scaling_factor",
        "mlp.dense_4h_to_h": "mlp.quantization_scaling_factor",
    }
    for ft, place in places.items():
        key = f"transformer.layers.1.{place}"
        if not scheme.per_token:
            expected = read_floats(checkpoint.folder, files[f"layers.1.{ft}"].scale_x_orig_quant)
            assert stored[key].item() == expected.item()
        elif "scale_to_int" in place:
            assert stored[key].item() == 1
        else:
            assert key not in stored


@pytest.mark.parametrize("name", PLAIN)
def test_modelopts_form_rounds_the_result_of_int8_sq(name, shared):
    """It also supports clip_qkv and another alibi_bias_max, which the plugins lack."""
    workshop = shared(*PLAIN[name])
    checkpoint = workshop.ft()
    calibrated = workshop.calibrated(
        checkpoint, Quantization(MODELOPT_SQ), CalibrationPlan("int8_sq")
    )
    found = workshop.write(checkpoint, calibrated)
    assert found.config["quantization"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert_near_the_model(found, workshop.spec, 0.02)
    for layer in range(workshop.spec.num_layers):
        for ft, (name, _) in NAMES.items():
            matrix = calibrated.calibration.smoothquant_matrix(layer, ft)
            steps = np.abs(matrix.weight).max(axis=1) / 127
            stored = trtllm_loader.whole_matrix(found, layer, name).numpy()
            scaled = stored / matrix.pre_quant_scale.astype(np.float16).astype(np.float32)
            assert (np.abs(scaled - matrix.weight) <= 0.51 * steps[:, None]).all()


def assert_near_the_model(found: trtllm_loader.Loaded, spec: CheckpointSpec, bound: float) -> None:
    """All matrices, put together from all ranks; `bound` is relative to the largest weight."""
    original = tensors(spec)
    for layer in range(spec.num_layers):
        for own, hf in NAMES.values():
            expected = original[f"transformer.blocks.{layer}.{hf}.weight"]
            matrix = trtllm_loader.whole_matrix(found, layer, own)
            largest = expected.abs().max()
            assert 0 < (matrix - expected).abs().max() < bound * largest


@pytest.mark.parametrize("cache", ["int8", "fp8"])
@pytest.mark.parametrize("scheme", [None, Fp8(), SmoothQuant()])
def test_caches_have_one_scale_a_layer(scheme, cache, shared):
    spec, tp_size = PLAIN["2 K/V heads on 4 ranks"]
    workshop = shared(spec, tp_size)
    checkpoint = workshop.ft("float16", 0.5 if isinstance(scheme, SmoothQuant) else None)
    plan = CalibrationPlan("fp8" if scheme == Fp8() else "kv_cache")
    calibrated = workshop.calibrated(checkpoint, Quantization(scheme, cache), plan)
    found = workshop.write(checkpoint, calibrated)
    assert found.config["quantization"]["kv_cache_quant_algo"] == cache.upper()
    for layer in range(spec.num_layers):
        ranges = calibrated.calibration.kv_amax(layer)
        expected = max(ranges.key, ranges.value) / {"int8": 127, "fp8": 448}[cache]
        for rank in found.ranks:
            scale = rank[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
            assert scale.item() == pytest.approx(expected, rel=1e-6)


# --- ModelOpt's own export -----------------------------------------------------------------------


# Differences in config.json: ours, ModelOpt's. docs/formats.md has the reasons.
DIFFERENT = {
    "architecture": ("MPTForCausalLM", "MptForCausalLM"),  # both are known to TensorRT-LLM
    "logits_dtype": ("float32", "float16"),
}


def export_by_modelopt(
    workshop: Workshop, qformat: str, kv_cache: str = "auto"
) -> trtllm_loader.Loaded:
    """Loads ModelOpt's export of the model that it quantizes, without checks."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    from references.modelopt_reference import quantize_whole, whole_model

    model = whole_model(workshop.hf)
    samples = torch.randint(workshop.spec.vocab_size, (2, 12), generator=generator())
    quantize_whole(model, qformat, samples, 128, kv_cache)
    target = workshop.folder / f"modelopt-{qformat}-{kv_cache}-{workshop.tp_size}"
    export_tensorrt_llm_checkpoint(model, "mpt", torch.float16, target, workshop.tp_size)
    ranks = range(workshop.tp_size)
    return trtllm_loader.Loaded(
        json.loads((target / "config.json").read_text()),
        [torch_file.load_file(target / f"rank{rank}.safetensors") for rank in ranks],
    )


def assert_same_but_for(
    found: trtllm_loader.Loaded, expected: trtllm_loader.Loaded, extra: set[str]
) -> None:
    """extra: last parts of the names of tensors that are not compared."""
    for key, value in found.config.items():
        assert (value, expected.config[key]) == DIFFERENT.get(key, (value, value)), key
    for own, theirs in zip(found.ranks, expected.ranks, strict=True):
        names = {name for name in theirs if name.rpartition(".")[2] not in extra}
        assert names == {name for name in own if name.rpartition(".")[2] not in extra}
        for name in names:
            assert (own[name].shape, own[name].dtype) == (theirs[name].shape, theirs[name].dtype)
            assert_agrees(name, own[name], theirs[name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("qformat", "scheme"), [("int4_awq", Awq(128)), ("fp8", Fp8()), ("int8_sq", MODELOPT_SQ)]
)
def test_agreement_with_modelopts_export(qformat, scheme, tp_size, shared):
    spec = wide(num_layers=2, vocab_size=128, clip_qkv=1.5)
    workshop = shared(spec, tp_size, torch.float16)
    checkpoint = workshop.ft("float16")
    plan = CalibrationPlan(qformat, 128 if qformat == "int4_awq" else None)
    calibrated = workshop.calibrated(checkpoint, Quantization(scheme), plan)
    # ModelOpt's embeddings always are.
    found = workshop.write(checkpoint, calibrated, VocabularySharding(embedding=True))
    assert_same_but_for(found, export_by_modelopt(workshop, qformat), set())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_scales_of_caches_beside_those_of_modelopt(cache, shared):
    """int8 scales are the same; ModelOpt raises fp8 scales below 1 to 1."""
    workshop = shared(wide(vocab_size=128), 1, torch.float16)
    checkpoint = workshop.ft("float16")
    calibrated = workshop.calibrated(checkpoint, Quantization(Fp8(), cache), CalibrationPlan("fp8"))
    found = workshop.write(checkpoint, calibrated, VocabularySharding(embedding=True))
    expected = export_by_modelopt(workshop, "fp8", cache)
    scales = {f"{what}cache_scaling_factor" for what in ("kv_", "k_", "v_")}
    assert_same_but_for(found, expected, scales)
    name = "transformer.layers.0.attention."
    own, theirs = found.ranks[0], expected.ranks[0]
    of_keys_and_values = [theirs[f"{name}{what}_cache_scaling_factor"].item() for what in "kv"]
    scale = own[f"{name}kv_cache_scaling_factor"].item()
    if cache == "int8":
        assert scale == pytest.approx(max(of_keys_and_values), rel=1e-5)
    else:
        assert scale < 1 and of_keys_and_values == [1, 1]


def assert_agrees(name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compares up to the last digits, which depend on the order of additions."""
    if found.dtype in (torch.int8, torch.float8_e4m3fn):
        differing = found.view(torch.int8) != expected.view(torch.int8)
        assert differing.float().mean() < 1e-4, name
        return
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


# --- the file format -----------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from([np.float32, np.float16, np.int8]),
            st.lists(st.integers(0, 5), min_size=1, max_size=3),
        ),
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
)
def test_streamed_files_are_read_by_safetensors(tmp_path_factory, described, seed):
    random = np.random.default_rng(seed)
    arrays = {
        f"tensor.{i}": random.integers(-9, 9, shape).astype(dtype)
        for i, (dtype, shape) in enumerate(described)
    }

    def streamed(array: NDArray) -> StreamedTensor:
        pieces = np.array_split(array.reshape(-1), 3)
        return StreamedTensor(array.dtype, array.shape, lambda: iter(pieces))

    path = tmp_path_factory.mktemp("streamed") / "a.safetensors"
    write_safetensors(path, {name: streamed(array) for name, array in arrays.items()})
    found = load_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "block", [np.zeros(3, np.float32), np.zeros(4, np.float16)], ids=["short", "other type"]
)
def test_blocks_must_be_what_the_header_says(block, tmp_path):
    tensor = StreamedTensor(np.dtype(np.float32), (4,), lambda: iter([block]))
    with pytest.raises(ValueError, match="a: "):
        write_safetensors(tmp_path / "a.safetensors", {"a": tensor})


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    workshop = Workshop(tmp_path, *PLAIN["multi-head"])
    workshop.write(workshop.ft(), CalibratedQuantization())
    before = hashes(tmp_path / "trtllm")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trtllm_checkpoint, "write_safetensors", fail)
    with pytest.raises(KeyboardInterrupt):
        workshop.write(workshop.ft("float32"), CalibratedQuantization())
    assert hashes(tmp_path / "trtllm") == before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- rejections ----------------------------------------------------------------------------------

usual = partial(CheckpointSpec, num_layers=1, vocab_size=96)
REFUSED = {
    "biases": (usual(no_bias=False), "no_bias = false: backend tensorrt_llm"),
    "qk_ln": (usual(qk_ln=True), r"attn_config\.qk_ln = true"),
    "softmax_scale": (usual(softmax_scale=0.6), r"attn_config\.softmax_scale = 0\.6"),
    "logit_scale": (usual(logit_scale=0.4), r"logit_scale = 0\.4"),
    "inv_sqrt_d_model": (usual(logit_scale="inv_sqrt_d_model"), r"logit_scale = 0\.14"),
    "learned positions": (usual(alibi=False), r"attn_config\.alibi = false"),
    "rmsnorm": (usual(norm_type="rmsnorm"), "norm_type = rmsnorm"),
    "epsilon": (usual(layer_norm_epsilon=0.02), r"layer_norm_epsilon = 0\.02"),
    "expansion": (usual(expansion_ratio=2), r"expansion_ratio = 2\.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_model_class_lacks_is_refused(name, tmp_path):
    spec, message = REFUSED[name]
    workshop = Workshop(tmp_path, spec, 1)
    assert_refused(
        f"{message}.*use backend tensorrt or tensorrt_rtx", workshop.ft(), CalibratedQuantization()
    )


def assert_refused(
    message: str,
    checkpoint: FtCheckpoint,
    calibrated: CalibratedQuantization,
    vocabulary: VocabularySharding = WHOLE_EMBEDDING,
) -> None:
    with pytest.raises(MptTrtError, match=message):
        TrtllmConversion(checkpoint, calibrated, vocabulary)


@pytest.mark.parametrize(
    ("spec", "storage_type", "scheme", "message"),
    [
        (wide(), "float16", WeightOnly(4, 64), r"quantization\.group_size = 64"),
        (wide(), "float32", WeightOnly(8), "dtype = float32"),
        (
            usual(),
            "float16",
            WeightOnly(8),
            r"shape = \[48, 144\] of layers\.0\.attention\.query_key_value\.weight",
        ),
    ],
)
def test_quantizations_without_kernels_are_refused(spec, storage_type, scheme, message, tmp_path):
    checkpoint = Workshop(tmp_path, spec, 1).ft(storage_type)
    assert_refused(message, checkpoint, CalibratedQuantization(Quantization(scheme)))


def test_matrices_of_a_rank_must_fit_the_kernels(tmp_path):
    """128 features are not a multiple of 64 on 4 ranks."""
    checkpoint = Workshop(tmp_path, wide(hidden_size=128), 4).ft()
    message = r"shape = \[128, 384\] of layers\.0.* over 4 rank"
    assert_refused(message, checkpoint, CalibratedQuantization(Quantization(WeightOnly(8))))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (usual(clip_qkv=0.5), r"clip_qkv = 0\.5.*per_token: false"),
        (usual(alibi_bias_max=16), r"alibi_bias_max = 16.*per_token: false"),
    ],
)
def test_the_smoothquant_plugin_clips_nothing(spec, message, tmp_path):
    checkpoint = Workshop(tmp_path, spec, 1).ft("float16", 0.5)
    assert_refused(message, checkpoint, CalibratedQuantization(Quantization(SmoothQuant())))


def test_a_vocabulary_must_divide_among_the_ranks(tmp_path):
    checkpoint = Workshop(tmp_path, usual(vocab_size=97), 2).ft()
    assert_refused("vocab_size = 97.*equal parts", checkpoint, CalibratedQuantization())


def test_the_head_is_always_divided(tmp_path):
    checkpoint = Workshop(tmp_path, usual(), 2).ft()
    assert_refused(
        "shard_head = False", checkpoint, CalibratedQuantization(), VocabularySharding(head=False)
    )
    alone = Workshop(tmp_path / "alone", usual(), 1).ft()
    TrtllmConversion(alone, CalibratedQuantization(), VocabularySharding(head=False))


def test_small_groups_of_awq_are_refused(tmp_path):
    workshop = Workshop(tmp_path, wide(num_layers=1), 1)
    checkpoint = workshop.ft()
    calibrated = workshop.calibrated(
        checkpoint, Quantization(Awq()), CalibrationPlan("int4_awq", 32)
    )
    assert_refused("group_size = 32.*groups of 128 and 64", checkpoint, calibrated)


def test_the_form_of_smoothquant_decides_what_is_needed(tmp_path):
    workshop = Workshop(tmp_path, usual(), 1)
    plain, smoothed = workshop.ft(), workshop.ft("float16", 0.5)
    plugin, modelopt = Quantization(SmoothQuant()), Quantization(MODELOPT_SQ)
    assert_refused(r"smoothquant = None, but 0\.5 is needed", plain, CalibratedQuantization(plugin))
    assert_refused("int8_sq, but there is none", plain, CalibratedQuantization(modelopt))
    ranges = workshop.calibrated(plain, modelopt, CalibrationPlan("kv_cache"))
    assert_refused(r"kv_cache-None\.npz has another format", plain, ranges)
    assert_refused("not a full-precision checkpoint", smoothed, CalibratedQuantization())
    result = workshop.calibrated(smoothed, modelopt, CalibrationPlan("int8_sq"))
    assert_refused("not a full-precision checkpoint", smoothed, result)


# --- the tool ------------------------------------------------------------------------------------


def test_tool_writes_a_checkpoint(tmp_path, capsys):
    workshop = Workshop(tmp_path, *PLAIN["grouped-query"])
    checkpoint = workshop.ft()
    arguments = ("--model_dir", checkpoint.folder, "--output_dir", tmp_path / "out")
    call_tool("convert_ft_to_trtllm.py", *arguments, "--use_parallel_embedding", "--workers=2")
    assert trtllm_loader.load(tmp_path / "out").config["use_parallel_embedding"] is True
    assert "out: 2 ranks, 0.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantization=int4_awq",), "int4_awq needs a calibration result"),
        (("--workers=0",), "--workers = 0: at least 1 is required"),
        (("--quantization=int4_weight_only", "--group_size=64"), "group_size = 64"),
    ],
)
def test_tool_leaves_nothing_of_what_it_refuses(options, message, tmp_path):
    checkpoint = Workshop(tmp_path, *PLAIN["multi-head"]).ft()
    target = tmp_path / "out"
    with pytest.raises(MptTrtError, match=message):
        call_tool(
            "convert_ft_to_trtllm.py",
            *("--model_dir", checkpoint.folder, "--output_dir", target, *options),
        )
    assert not target.exists()
