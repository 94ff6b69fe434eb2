"""Networks of quantized matrices against their published formulas and against the plain model.

The plain model gets the weights that the stored integers and scales stand for. What a network
computes in float32 differs from it by the order of sums alone, so the bound is that of
test_network.py; the formulas are written out once more here, element by element.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Range, Rank
from mpt_trt.network.linear import awq
from mpt_trt.network.linear.weight_only import WeightOnlyLinear
from mpt_trt.quantization import integers
from mpt_trt.quantization.schemes import (
    Awq,
    Fp8,
    Quantization,
    SmoothQuant,
    WeightOnly,
    default_group_size,
)
from references import plain_mpt
from support.checkpoints import CheckpointSpec, config_dict, tensors
from support.engines import (
    FEATURES,
    ONLY_RANK,
    Logits,
    deviation,
    feed,
    make_ft_checkpoint,
    make_network,
    open_network,
    random_ids,
    reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT32_BOUND = 2e-5
FLOAT16_BOUND = 1.5e-2
HF_NAMES = {
    "attention.query_key_value": "attn.Wqkv",
    "attention.dense": "attn.out_proj",
    "mlp.dense_h_to_4h": "ffn.up_proj",
    "mlp.dense_4h_to_h": "ffn.down_proj",
}
SCHEMES = {"int8": WeightOnly(8), "int4": WeightOnly(4), "int4 groups": WeightOnly(4, 16)}
PIECES = [8, 1, 1, 1, 1, 1]


# --- the formulas, element by element ------------------------------------------------------------


def rounded(value: float) -> int:
    """Nearest integer, halves away from zero."""
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def expected_integers(matrix: NDArray, bits: int, group_size: int) -> tuple[NDArray, NDArray]:
    """Integers `[in, out]` and unrounded scales `[in / group_size, out]` (format, section 5)."""
    height, width = matrix.shape
    half = 2 ** (bits - 1)
    found = np.zeros((height, width), np.int64)
    scales = np.zeros((height // group_size, width), np.float32)
    for group in range(height // group_size):
        rows = range(group * group_size, (group + 1) * group_size)
        for column in range(width):
            largest = max(abs(np.float32(matrix[row, column])) for row in rows)
            scale = np.float32(largest / np.float32(half))
            scales[group, column] = scale
            for row in rows:
                quotient = np.float32(matrix[row, column]) / scale if scale else 0.0
                found[row, column] = min(max(rounded(float(quotient)), -half), half - 1)
    return found, scales


def nibbles(packed: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.int64]:
    """4-bit integers, the even one of each pair in the low half of a byte."""
    flat = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1).astype(np.int64)
    signed = np.where(flat > 7, flat - 16, flat)
    return signed[: math.prod(shape)].reshape(shape)


matrices = st.tuples(
    st.integers(1, 5), st.integers(1, 9), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1)
)


@given(matrices, st.booleans())
def test_integers_are_those_of_the_formula(case: tuple[int, int, int, int], by_group: bool) -> None:
    groups, width, bits, seed = case
    random = np.random.default_rng(seed)
    height = 16 * groups
    # Multiples of a sixteenth of the largest, so that halves are met; some columns of zeros.
    matrix = random.integers(-16, 17, (height, width)).astype(np.float16) / 16
    matrix[:, random.random(width) < 0.2] = 0
    group_size = 16 if by_group else height
    expected, scales = expected_integers(matrix, bits, group_size)
    amax = integers.group_amax(matrix, 16) if by_group else integers.column_amax(matrix)[None]
    found_scales = amax / np.float32(2 ** (bits - 1))
    np.testing.assert_array_equal(found_scales, scales)
    found = np.concatenate(list(integers.quantize(matrix, found_scales, bits)))
    np.testing.assert_array_equal(found, expected)
    if bits == 4:
        packed = np.concatenate(list(integers.packed(iter([found]))))
        np.testing.assert_array_equal(nibbles(packed, found.shape), expected)


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_pairs_of_rows_pack_as_their_transpose(pairs: int, width: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-8, 8, (2 * pairs, width), np.int8)
    transposed = np.ascontiguousarray(values.T)
    found = integers.pack_int4_rows(values).T.reshape(-1)
    np.testing.assert_array_equal(found, integers.pack_int4(transposed))


@pytest.mark.parametrize("group_size", [6, 64, 128])
def test_quotients_beside_halves_are_rounded_as_such(group_size: int) -> None:
    """A division by way of the reciprocal would round many of these elsewhere."""
    random = np.random.default_rng(0)
    scales = (random.random((130, 5)) * 10.0 ** random.integers(-6, 2, (130, 5))).astype(np.float32)
    halves = random.integers(-20, 21, (130, 5, group_size)).astype(np.float32) / 2
    weight = halves * scales[..., None]
    away = random.choice(np.array([-np.inf, np.inf], np.float32), weight.shape)
    weight = np.where(random.random(weight.shape) < 0.5, weight, np.nextafter(weight, away))
    scales[3, 2] = 0
    divisors = np.where(scales == 0, np.float32(1), scales)[..., None]
    expected = np.clip(np.rint(weight / divisors), -8, 7).reshape(130, -1)
    by_reciprocal = np.clip(np.rint(weight * (1 / divisors)), -8, 7).reshape(130, -1)
    assert (by_reciprocal != expected).any()
    found = awq.quantized_rows(weight.reshape(130, -1), scales)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_largest_magnitudes(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((96, 10), np.float32)
    matrix = values.astype(STORAGE_TYPES[dtype])
    exact = np.abs(matrix.astype(np.float32))
    np.testing.assert_array_equal(integers.column_amax(matrix), exact.max(0))
    by_group = exact.reshape(6, 16, 10).max(1)
    np.testing.assert_array_equal(integers.group_amax(matrix, 16), by_group)


@pytest.mark.parametrize("rows_read", [1, 7, 64])
@pytest.mark.parametrize("rows_at_a_time", [2, 10, 128])
def test_rows_that_a_rank_holds_come_in_order(rows_read: int, rows_at_a_time: int) -> None:
    matrix = np.arange(90 * 8, dtype=np.float32).reshape(90, 8)
    blocks = (matrix[start : start + rows_read] for start in range(0, 90, rows_read))
    rows, columns = [Range(3, 30), Range(60, 63), Range(75, 90)], Range(2, 6)
    parts = awq._held_parts(blocks, rows, columns)
    found = [block.copy() for block in awq._joined(parts, rows_at_a_time)]
    assert all(len(block) == rows_at_a_time for block in found[:-1])
    expected = np.concatenate([matrix[part.start : part.stop, 2:6] for part in rows])
    np.testing.assert_array_equal(np.concatenate(found), expected)


@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_blocks_of_rows_pack_as_the_whole(height: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(-8, 8, (2 * height + 1, width), np.int8)
    cuts = sorted({2 * int(i) for i in random.integers(0, height + 1, 3)})
    blocks = np.split(values, cuts)
    found = np.concatenate(list(integers.packed(iter(blocks))))
    np.testing.assert_array_equal(found, integers.pack_int4(values))
    np.testing.assert_array_equal(nibbles(found, values.shape), values)


@given(st.floats(-126, 126, width=32))
def test_halves_are_rounded_away_from_zero(value: float) -> None:
    for exact in (value, math.trunc(value) + math.copysign(0.5, value)):
        assert rounded_by_quantize([exact]) == [rounded(float(np.float32(exact)))]


def test_the_largest_number_below_a_half_is_rounded_down() -> None:
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert rounded_by_quantize([below, -below, 0.5, -0.5]) == [0, 0, 1, -1]


def rounded_by_quantize(values: list[float]) -> list[int]:
    row = np.array([values], np.float32)
    (block,) = integers.quantize(row, np.ones_like(row), 8)
    return block[0].tolist()


def test_many_blocks_are_quantized_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).standard_normal((96, 10), np.float32)
    scales = integers.group_amax(matrix, 16) / np.float32(8)
    whole = np.concatenate(list(integers.quantize(matrix, scales, 4)))
    by_column = integers.column_amax(matrix)[None] / np.float32(128)
    whole_by_column = np.concatenate(list(integers.quantize(matrix, by_column, 8)))
    monkeypatch.setattr(integers, "BLOCK_ELEMENTS", 150)
    blocks = list(integers.quantize(matrix, scales, 4))
    assert len(blocks) > 6 and all(len(block) % 2 == 0 for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    blocks = list(integers.quantize(matrix, by_column, 8))
    assert len(blocks) > 6 and all(len(block) % 2 == 0 for block in blocks[:-1])
    np.testing.assert_array_equal(np.concatenate(blocks), whole_by_column)
    np.testing.assert_array_equal(integers.group_amax(matrix, 16) / np.float32(8), scales)


# --- weight-only networks ------------------------------------------------------------------------


def fits(spec: CheckpointSpec, scheme: WeightOnly) -> bool:
    sizes = (spec.hidden_size, spec.ffn_size)
    return scheme.group_size is None or all(size % scheme.group_size == 0 for size in sizes)


def with_matrices(
    spec: CheckpointSpec, storage_type: str, change: Callable[[NDArray], NDArray]
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, every matrix of a block put through `change` as `[in, out]`."""
    dtype = getattr(torch, storage_type)
    found = {name: tensor.to(dtype).float() for name, tensor in tensors(spec).items()}
    for name, tensor in found.items():
        if ".blocks." in name and tensor.ndim == 2:
            found[name] = torch.from_numpy(change(tensor.numpy().T).T.copy())
    return found


def logits_of(spec: CheckpointSpec, weights: dict[str, torch.Tensor], ids: NDArray) -> Logits:
    return plain_mpt.forward(config_dict(spec), weights, torch.from_numpy(ids)).numpy()


def dequantized(scheme: WeightOnly, storage_type: str) -> Callable[[NDArray], NDArray]:
    scale_type = {"float32": np.float32, "float16": np.float16}[storage_type]

    def change(matrix: NDArray) -> NDArray:
        group_size = scheme.group_size or len(matrix)
        amax = np.abs(matrix).reshape(-1, group_size, matrix.shape[1]).max(axis=1)
        scales = amax / np.float32(2 ** (scheme.bits - 1))
        rows = np.repeat(scales, group_size, axis=0)
        half = 2 ** (scheme.bits - 1)
        quotient = matrix / rows
        rounded = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5)
        stored = np.repeat(scales.astype(scale_type).astype(np.float32), group_size, axis=0)
        return np.clip(rounded, -half, half - 1) * stored

    return change


@pytest.mark.parametrize("label", SCHEMES)
@pytest.mark.parametrize("name", FEATURES)
def test_weight_only_networks_compute_with_the_dequantized_weights(name, label, tmp_path):
    spec, scheme = FEATURES[name], SCHEMES[label]
    if not fits(spec, scheme):
        checkpoint = make_ft_checkpoint(tmp_path, spec)
        with pytest.raises(MptTrtError, match=r"group_size = 16: .* legal sizes are none"):
            WeightOnlyLinear(checkpoint, ONLY_RANK, scheme)
        return
    ids = random_ids(spec, rows=2, length=13)
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    calibrated = CalibratedQuantization(Quantization(scheme))
    found = feed(
        open_network(make_network(checkpoint, tmp_path / "n", calibrated=calibrated)), ids, PIECES
    )
    weights = with_matrices(spec, "float32", dequantized(scheme, "float32"))
    assert deviation(found, logits_of(spec, weights, ids)) < FLOAT32_BOUND
    assert deviation(found, reference(spec, ids)) > 100 * FLOAT32_BOUND, "nothing is quantized"


@pytest.mark.parametrize("label", SCHEMES)
def test_scales_of_float16_networks_are_stored_in_float16(label, tmp_path):
    spec, scheme = CheckpointSpec(num_heads=6, num_kv_heads=2, no_bias=False), SCHEMES[label]
    ids = random_ids(spec, rows=2, length=13)
    checkpoint = make_ft_checkpoint(tmp_path, spec, "float16")
    calibrated = CalibratedQuantization(Quantization(scheme))
    found = feed(
        open_network(make_network(checkpoint, tmp_path / "n", calibrated=calibrated)), ids, PIECES
    )
    weights = with_matrices(spec, "float16", dequantized(scheme, "float16"))
    assert FLOAT32_BOUND < deviation(found, logits_of(spec, weights, ids)) < FLOAT16_BOUND


@pytest.mark.parametrize(("label", "most"), [("int8", 0.52), ("int4", 0.28), ("int4 groups", 0.28)])
def test_size_of_the_block_matrices(label, most, tmp_path):
    """Integers and scales together, of what float16 takes; groups of 128."""
    scheme = SCHEMES[label]
    if scheme.group_size is not None:
        scheme = replace(scheme, group_size=128)
    spec = CheckpointSpec(hidden_size=128, num_heads=2, num_layers=1, vocab_size=16)
    checkpoint = make_ft_checkpoint(tmp_path, spec, "float16")
    folder = make_network(
        checkpoint, tmp_path / "n", calibrated=CalibratedQuantization(Quantization(scheme))
    )
    size = sum(
        path.stat().st_size
        for path in (folder / "weights").iterdir()
        if "weight.int" in path.name or "weight.scale" in path.name
    )
    assert size < most * 2 * 12 * spec.hidden_size**2


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "rank0.onnx", load_external_data=False).graph


@pytest.mark.parametrize("label", SCHEMES)
def test_integers_are_stored_as_integers(label, tmp_path):
    spec, scheme = CheckpointSpec(num_layers=1), SCHEMES[label]
    checkpoint = make_ft_checkpoint(tmp_path, spec)
    folder = make_network(
        checkpoint, tmp_path / "n", calibrated=CalibratedQuantization(Quantization(scheme))
    )
    graph = graph_of(folder)
    wanted = onnx.TensorProto.INT8 if scheme.bits == 8 else onnx.TensorProto.INT4
    stored = {t.name: t for t in graph.initializer}
    products = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len(products) == 4
    for node in products:
        assert stored[node.input[0]].data_type == wanted
    names = {f"layers.0.{layer}.weight" for layer in HF_NAMES}
    assert not names & stored.keys(), "the matrix is there in float, too"


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [1, 2])
def test_groups_must_fit_the_ranks(tp_size, tmp_path):
    """48 input features are three groups of 16; 24 of a rank are none."""
    checkpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(num_heads=4))
    checkpoint = replace(checkpoint, tp_size=tp_size)
    rank, scheme = Rank(0, tp_size), WeightOnly(4, 16)
    if tp_size == 1:
        WeightOnlyLinear(checkpoint, rank, scheme)
        return
    with pytest.raises(MptTrtError, match=r"group_size = 16: .* 24, 48, 96 input features"):
        WeightOnlyLinear(checkpoint, rank, scheme)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        (CheckpointSpec(hidden_size=1024, num_heads=8), 128),
        (CheckpointSpec(hidden_size=256, num_heads=4), 64),
        (CheckpointSpec(hidden_size=96, num_heads=3), 32),
        (CheckpointSpec(hidden_size=48, num_heads=4), 16),
    ],
)
def test_default_group_size_fits_every_number_of_ranks(spec, size, tmp_path):
    from mpt_trt.checkpoint.hf_config import parse_hf_config

    config = parse_hf_config(config_dict(spec), tmp_path / "config.json")
    assert default_group_size(config) == size


@pytest.mark.parametrize(
    ("quantization", "needed"),
    [
        (Quantization(Awq()), "int4_awq"),
        (Quantization(Fp8()), "fp8"),
        (Quantization(None, "int8"), "kv_cache"),
        (Quantization(SmoothQuant(), "fp8"), "kv_cache"),
    ],
)
def test_calibration_is_asked_for(quantization, needed):
    with pytest.raises(MptTrtError, match=f"needs a calibration result: .* --qformat {needed}"):
        CalibratedQuantization(quantization)


def test_a_plain_checkpoint_has_no_integers(tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(num_layers=1))
    with pytest.raises(
        MptTrtError, match=r"smoothquant = None, but 0\.5 is needed; convert .* -sq"
    ):
        make_network(
            checkpoint,
            tmp_path / "n",
            calibrated=CalibratedQuantization(Quantization(SmoothQuant())),
        )


@pytest.mark.parametrize("scheme", [None, WeightOnly(8)])
def test_a_smoothed_checkpoint_is_no_plain_one(scheme, tmp_path):
    checkpoint: FtCheckpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(num_layers=1))
    smoothed = replace(checkpoint, smoothing=0.5)
    with pytest.raises(MptTrtError, match="not a full-precision checkpoint"):
        make_network(
            smoothed, tmp_path / "n", calibrated=CalibratedQuantization(Quantization(scheme))
        )
