"""Calibration results on disk: round trips, AMMO's loader, and rejected files."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpt_trt.calibration.model_source import ModelSource, open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import CalibrationResult, read_calibration
from mpt_trt.calibration.writer import calibration_writer
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import block_matrices
from mpt_trt.quantization.calibrated_weights import (
    AwqMatrix,
    CalibratedMatrix,
    Fp8Scales,
    KvAmax,
    SmoothQuantMatrix,
)
from mpt_trt.quantization.schemes import QuantizationFormat
from references.ammo_loader import MATRICES as AMMO_MATRICES
from references.ammo_loader import load_awq, load_fp8
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.engines import convert
from support.ft import random_amax, write_ft

FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
SPEC = CheckpointSpec(num_heads=6, num_kv_heads=2)
FORMATS: list[QuantizationFormat] = ["int4_awq", "fp8", "int8_sq", "kv_cache"]
GROUP_SIZE = 16
MATRICES = list(block_matrices(MptConfig(4, 1, 1, 1, 4, 4, 4, 1.0), 0))


def values_for(
    source: ModelSource, layer: int, matrix: str, qformat: QuantizationFormat, seed: int = 0
) -> CalibratedMatrix:
    """Makes a possible calibration result: the model's matrix, smoothed by random factors."""
    generator = np.random.default_rng([seed, layer, MATRICES.index(matrix)])
    if qformat == "fp8":
        return Fp8Scales(*(float(np.float32(x)) for x in generator.random(2)))
    weight = source.reader.tensor(block_matrices(source.config, layer)[matrix]).astype(np.float32)
    smoothing = generator.uniform(0.5, 2, weight.shape[1]).astype(np.float32)
    weight = weight / smoothing
    if qformat == "int4_awq":
        groups = np.abs(weight).reshape(len(weight), -1, GROUP_SIZE)
        return AwqMatrix(weight, groups.max(-1) / np.float32(7), smoothing)
    scales = np.abs(weight).max(1) / np.float32(127)
    return SmoothQuantMatrix(weight, scales, smoothing, float(np.float32(generator.random())))


def write_result(
    source: ModelSource,
    qformat: QuantizationFormat,
    target: Path,
    weight_dtype: np.dtype = FLOAT32,
    seed: int = 0,
) -> Path:
    with calibration_writer(target, source.config, source.reader, weight_dtype) as writer:
        writer.model(CalibrationPlan(qformat))
        for layer in range(source.config.num_layers):
            writer.kv_amax(layer, KvAmax(1.5 + layer, 2.5 + layer))
            for matrix in MATRICES if qformat != "kv_cache" else ():
                writer.matrix(layer, matrix, values_for(source, layer, matrix, qformat, seed))
    return target


def read_matrix(result: CalibrationResult, layer: int, matrix: str) -> CalibratedMatrix:
    return {
        "int4_awq": result.awq_matrix,
        "int8_sq": result.smoothquant_matrix,
        "fp8": result.fp8_scales,
    }[result.quantization_format](layer, matrix)


def assert_same(found: CalibratedMatrix, expected: CalibratedMatrix, dtype: np.dtype) -> None:
    assert type(found) is type(expected)
    for name, value in vars(expected).items():
        value = (
            value.astype(dtype).astype(np.float32) if name == "weight" and np.ndim(value) else value
        )
        np.testing.assert_array_equal(getattr(found, name), value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SPEC as `hf` and `ft/1-gpu`, and a result of each format. Not to be changed."""
    folder = tmp_path_factory.mktemp("npz")
    source = open_model(write_checkpoint(folder / "hf", SPEC))
    convert(folder / "hf", folder / "ft" / "1-gpu")
    for qformat in FORMATS:
        write_result(source, qformat, folder / f"{qformat}.npz")
    return folder


@pytest.fixture
def checkpoint(made: Path) -> FtCheckpoint:
    return read_ft_checkpoint(made / "ft" / "1-gpu")


# --- round trips ---------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> CheckpointSpec:
    num_heads = draw(st.sampled_from([1, 2, 3, 6]))
    divisors = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return CheckpointSpec(
        hidden_size=48 * draw(st.integers(1, 2)),
        num_heads=num_heads,
        num_kv_heads=draw(st.sampled_from([None, *divisors])),
        num_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.sampled_from([5, 97, 128])),
        expansion_ratio=draw(st.sampled_from([1, 2.5, 4])) if num_heads else 4,
        no_bias=draw(st.booleans()),
        qk_ln=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        alibi=draw(st.booleans()),
        norm_type=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        seed=draw(st.integers(0, 100)),
    )


def has_whole_groups(spec: CheckpointSpec) -> bool:
    return spec.ffn_size % GROUP_SIZE == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spec=specs().filter(has_whole_groups),
    qformat=st.sampled_from(FORMATS),
    weight_dtype=st.sampled_from([FLOAT16, FLOAT32]),
)
def test_what_was_written_is_read(
    spec: CheckpointSpec,
    qformat: QuantizationFormat,
    weight_dtype: np.dtype,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("round")
    source = open_model(write_checkpoint(folder / "hf", spec))
    target = write_result(source, qformat, folder / "x.npz", weight_dtype)
    result = read_calibration(target, convert(folder / "hf", folder / "ft"))
    assert result.quantization_format == qformat
    assert result.group_size == (GROUP_SIZE if qformat == "int4_awq" else None)
    for layer in range(spec.num_layers):
        assert result.kv_amax(layer) == KvAmax(1.5 + layer, 2.5 + layer)
        for matrix in MATRICES if qformat != "kv_cache" else ():
            expected = values_for(source, layer, matrix, qformat)
            assert_same(read_matrix(result, layer, matrix), expected, weight_dtype)


def test_threads_read_side_by_side(made: Path, checkpoint: FtCheckpoint) -> None:
    """Networks are made like this. Python 3.12's zipfile mixes up offsets of parallel readers."""
    result = read_calibration(made / "int4_awq.npz", checkpoint)
    places = [
        (layer, matrix) for layer in range(checkpoint.config.num_layers) for matrix in MATRICES
    ]
    expected = {place: result.awq_matrix(*place) for place in places}

    def read(number: int) -> None:
        place = places[number % len(places)]
        found = result.awq_matrix(*place)
        np.testing.assert_array_equal(found.weight, expected[place].weight)
        np.testing.assert_array_equal(found.scales, expected[place].scales)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(400)))


@pytest.mark.parametrize("qformat", FORMATS)
def test_same_input_same_bytes(qformat: QuantizationFormat, made: Path, tmp_path: Path) -> None:
    again = write_result(open_model(made / "hf"), qformat, tmp_path / "again.npz")
    assert again.read_bytes() == (made / f"{qformat}.npz").read_bytes()


def test_an_interrupted_write_leaves_what_was_there(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.npz"
    target.write_text("older")
    source = open_model(made / "hf")
    with (
        pytest.raises(RuntimeError),
        calibration_writer(target, source.config, source.reader, FLOAT32) as writer,
    ):
        writer.model(CalibrationPlan("fp8"))
        raise RuntimeError
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("storage_type", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("weight_dtype", [FLOAT16, FLOAT32])
def test_a_result_belongs_to_every_form_of_its_model(
    storage_type: str, tp_size: int, weight_dtype: np.dtype, made: Path, tmp_path: Path
) -> None:
    """Storage type and tensor-parallel size do not make it another model."""
    write_ft(made / "hf", tmp_path / "ft", storage_type, tp_size)
    target = write_result(open_model(made / "hf"), "int4_awq", tmp_path / "x.npz", weight_dtype)
    read_calibration(target, read_ft_checkpoint(tmp_path / "ft"))
    # And the other way round: calibrated from the FT checkpoint.
    source = open_model(tmp_path / "ft")
    write_result(source, "int4_awq", target, weight_dtype)
    read_calibration(target, read_ft_checkpoint(made / "ft" / "1-gpu"))


# --- AMMO's loader -------------------------------------------------------------------------------


def test_the_original_loader_reads_fp8(made: Path) -> None:
    source = open_model(made / "hf")
    found = load_fp8(made / "fp8.npz", SPEC.num_layers)
    for layer in range(SPEC.num_layers):
        for ours, theirs in zip(MATRICES, AMMO_MATRICES, strict=True):
            expected = values_for(source, layer, ours, "fp8")
            assert found[layer][theirs] == (expected.activation, expected.weight)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("weight_dtype", [FLOAT16, FLOAT32])
def test_the_original_loader_reads_awq(
    tp_size: int, weight_dtype: np.dtype, tmp_path: Path
) -> None:
    """Loaded integers and scales represent the model's weights, rank by rank."""
    spec = replace(SPEC, hidden_size=96)
    source = open_model(write_checkpoint(tmp_path / "hf", spec))
    path = write_result(source, "int4_awq", tmp_path / "x.npz", weight_dtype)
    ranks = [load_awq(path, spec.num_layers, tp_size, rank) for rank in range(tp_size)]
    original = {name: tensor.numpy() for name, tensor in tensors(spec).items()}
    for rank in ranks:
        assert rank.embedding.dtype == weight_dtype and rank.embedding.shape == (128, 96)
        np.testing.assert_allclose(
            rank.embedding[:97], original["transformer.wte.weight"], atol=1e-3
        )
        final = original["transformer.norm_f.weight"]
        np.testing.assert_allclose(rank.final_norm, final, atol=1e-3)
    for layer in range(spec.num_layers):
        base = f"transformer.blocks.{layer}"
        for norms in (rank.norms[layer] for rank in ranks):
            for norm, name in zip(norms, ("norm_1", "norm_2"), strict=True):
                np.testing.assert_allclose(norm, original[f"{base}.{name}.weight"], atol=1e-3)
        wqkv = np.split(original[f"{base}.attn.Wqkv.weight"], [96, 128])
        whole = {
            "attention:qkv": [
                np.concatenate([np.split(part, tp_size)[r] for part in wqkv])
                for r in range(tp_size)
            ],
            "attention:dense": np.split(original[f"{base}.attn.out_proj.weight"], tp_size, 1),
            "mlp:fc": np.split(original[f"{base}.ffn.up_proj.weight"], tp_size),
            "mlp:proj": np.split(original[f"{base}.ffn.down_proj.weight"], tp_size, 1),
        }
        for matrix, parts in whole.items():
            for rank, part in zip(ranks, parts, strict=True):
                found = rank.matrices[layer][matrix]
                # The largest positive weight of a group becomes 7 of 8 steps.
                step = found.scales.repeat(GROUP_SIZE, axis=0).T
                error = np.abs(found.dequantized() - part / found.smoothing)
                assert (error <= step * 1.01).all()
                assert (error <= step * 0.51).mean() > 0.8


# --- refusals ------------------------------------------------------------------------------------


def edited(path: Path, target: Path, edit: Callable[[dict[str, NDArray]], None]) -> Path:
    """The archive with its arrays changed."""
    with np.load(path) as npz:
        arrays = dict(npz)
    edit(arrays)
    np.savez(target, **arrays)
    return target


OTHERS = {
    "other weights": (replace(SPEC, seed=9), r"made for another model: \S+ at \[\d+"),
    "vocabulary": (replace(SPEC, vocab_size=98), r"the shape of wte is \[98, 48\] there, but \[97"),
    "layers": (replace(SPEC, num_layers=3), "the number of layers is 3 there, but 2 in the check"),
    "width": (replace(SPEC, hidden_size=96), r"the shape of wte is \[97, 96\] there, but \[97, 48"),
    "K/V heads": (replace(SPEC, num_kv_heads=3), r"query_key_value.weight is \[96, 48\] there"),
    "feed-forward": (replace(SPEC, expansion_ratio=2), r"h_to_4h.weight is \[96, 48\] there, but"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("qformat", FORMATS)
def test_results_of_other_models_are_refused(
    name: str, qformat: QuantizationFormat, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    spec, message = OTHERS[name]
    source = open_model(write_checkpoint(tmp_path / "hf", spec))
    path = write_result(source, qformat, tmp_path / "x.npz")
    with pytest.raises(MptTrtError, match=message) as caught:
        read_calibration(path, checkpoint)
    assert str(path) in str(caught.value) and "calibrate the model again" in str(caught.value)


def without_our_keys(arrays: dict[str, NDArray]) -> None:
    for key in [key for key in arrays if not key.startswith("_np:")]:
        del arrays[key]


def test_files_without_our_keys_are_read_as_far_as_they_go(
    made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    path = edited(made / "int4_awq.npz", tmp_path / "ammo.npz", without_our_keys)
    result = read_calibration(path, checkpoint)
    ours = read_calibration(made / "int4_awq.npz", checkpoint)
    for matrix in MATRICES:
        assert_same(result.awq_matrix(1, matrix), ours.awq_matrix(1, matrix), FLOAT32)
    with pytest.raises(MptTrtError, match="no amax of keys and values, like files made by AMMO"):
        result.kv_amax(0)


@pytest.mark.parametrize("name", ["other weights", "vocabulary", "K/V heads", "feed-forward"])
def test_files_without_our_keys_of_other_models_are_refused(
    name: str, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    source = open_model(write_checkpoint(tmp_path / "hf", OTHERS[name][0]))
    path = write_result(source, "int4_awq", tmp_path / "ours.npz")
    path = edited(path, tmp_path / "ammo.npz", without_our_keys)
    with pytest.raises(MptTrtError, match="made for another model"):
        read_calibration(path, checkpoint)


@pytest.mark.parametrize("seed", [SPEC.seed, 9])
def test_ranges_belong_to_the_smoothed_form_of_their_model(
    seed: int, made: Path, tmp_path: Path
) -> None:
    spec = replace(SPEC, seed=seed)
    model = write_checkpoint(tmp_path / "hf", spec)
    write_ft(model, tmp_path / "sq", int8=Int8Conversion(random_amax(spec), 0.5, {}))
    smoothed = read_ft_checkpoint(tmp_path / "sq")
    if seed == SPEC.seed:
        assert read_calibration(made / "kv_cache.npz", smoothed).kv_amax(1) == KvAmax(2.5, 3.5)
    else:
        with pytest.raises(MptTrtError, match=r"made for another model: wte at \[\d+, \d+\]"):
            read_calibration(made / "kv_cache.npz", smoothed)


DENSE = "_np:layers:1:attention:dense"
Q, K = "_np:layers:1:attention:qkv:q", "_np:layers:1:attention:qkv:k"


def put(key: str, values: object) -> Callable[[dict[str, NDArray]], None]:
    def edit(arrays: dict[str, NDArray]) -> None:
        arrays[key] = np.asarray(values)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a.pop(f"{DENSE}:weight"), f"{DENSE}:weight is missing"),
        (lambda a: a.pop(f"{DENSE}:prequant_scaling_factor"), "prequant_scaling_factor is missing"),
        (put(f"{DENSE}:weight", np.ones((48, 32))), r"weight is \[48, 32\] there, but \[48, 48\]"),
        (put(f"{DENSE}:weights_scaling_factor", np.ones(7)), "holds 7 scales instead of 144"),
        (
            put("_np:layers:0:attention:dense:weights_scaling_factor", np.ones((48, 4))),
            "12 .* do not divide|holds 192 scales|holds 144 scales",
        ),
        (
            put("_np:layers:0:attention:dense:weights_scaling_factor", np.ones((7, 1))),
            "has 7 scales for 2304 weights",
        ),
    ],
)
def test_archives_that_do_not_fit_are_refused_at_once(
    edit: Callable, message: str, made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    path = edited(made / "int4_awq.npz", tmp_path / "x.npz", edit)
    with pytest.raises(MptTrtError, match=message):
        read_calibration(path, checkpoint)


@pytest.mark.parametrize(
    ("edit", "matrix", "message"),
    [
        (
            put(f"{K}:prequant_scaling_factor", np.full(48, 0.7)),
            "attention.query_key_value",
            f"{K}:prequant_scaling_factor differs from that of {Q}",
        ),
        (
            put(f"{DENSE}:prequant_scaling_factor", np.zeros(48)),
            "attention.dense",
            "holds 0.0, not positive",
        ),
        (
            put(f"{DENSE}:weight", np.full((48, 48), np.nan)),
            "attention.dense",
            f"{DENSE}:weight holds NaN or Inf",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_when_they_are_read(
    edit: Callable, matrix: str, message: str, made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    path = edited(made / "int4_awq.npz", tmp_path / "x.npz", edit)
    result = read_calibration(path, checkpoint)
    with pytest.raises(MptTrtError, match=message):
        result.awq_matrix(1, matrix)


def test_another_format_is_named(made: Path, checkpoint: FtCheckpoint) -> None:
    result = read_calibration(made / "fp8.npz", checkpoint)
    with pytest.raises(MptTrtError, match=r"holds the result of fp8, but int4_awq is needed; .*qf"):
        result.awq_matrix(0, "attention.dense")


def test_of_qkv_the_largest_scale_counts(
    made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    path = edited(made / "fp8.npz", tmp_path / "x.npz", put(f"{K}:weights_scaling_factor", [9.0]))
    result = read_calibration(path, checkpoint)
    assert result.fp8_scales(1, "attention.query_key_value").weight == 9.0


def test_objects_are_not_unpickled(made: Path, checkpoint: FtCheckpoint, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with np.load(made / "kv_cache.npz") as npz:
        arrays = dict(npz)
    arrays["_np:final_layernorm:weight"] = np.array([{"a": 1}], object)
    np.savez(path, allow_pickle=True, **arrays)
    with pytest.raises(MptTrtError, match="final_layernorm"):
        read_calibration(path, checkpoint)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_cut_off_archives_are_refused(
    kept: float, made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    content = (made / "int4_awq.npz").read_bytes()
    path = tmp_path / "x.npz"
    path.write_bytes(content[: int(kept * len(content) if kept < 1 else kept)])
    with pytest.raises(MptTrtError, match=r"x\.npz: cannot be read as an npz archive"):
        read_calibration(path, checkpoint)


def test_damage_inside_is_noticed(made: Path, checkpoint: FtCheckpoint, tmp_path: Path) -> None:
    content = bytearray((made / "int4_awq.npz").read_bytes())
    with zipfile.ZipFile(made / "int4_awq.npz") as archive:
        start = archive.getinfo(f"{DENSE}:weight.npy").header_offset
    content[start + 2000] ^= 0xFF
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    result = read_calibration(path, checkpoint)
    with pytest.raises(MptTrtError, match=f"{DENSE}:weight is damaged"):
        result.awq_matrix(1, "attention.dense")


def test_other_archives_and_missing_files(
    made: Path, checkpoint: FtCheckpoint, tmp_path: Path
) -> None:
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(MptTrtError, match="holds no layers in AMMO's layout"):
        read_calibration(tmp_path / "other.npz", checkpoint)
    with pytest.raises(MptTrtError, match=r"none\.npz: no such file; calibrate the model"):
        read_calibration(tmp_path / "none.npz", checkpoint)
