"""Networks of quantized matrices against their published formulas and against the plain model.

The plain model gets the weights that the stored integers and scales represent. A float32 network
differs from it only by the order of sums, so the bound is that of test_network.py; the formulas are
written out once more here, over whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Rank
from mpt_trt.network.linear.weight_only import WeightOnlyLinear
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
        with pytest.raises(MptTrtError, match=r"group_size = 16: .* valid sizes are none"):
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


# --- rejections ----------------------------------------------------------------------------------


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
