"""Calibration block by block against ModelOpt on the whole model, and the ranges of activations."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelopt.torch.export import quant_utils
from numpy.typing import NDArray
from torch import Tensor, nn

from mpt_trt.calibration import modelopt
from mpt_trt.calibration.block_stream import (
    ActivationAmax,
    Computation,
    activation_amax,
    equal_batch_size,
    stream_blocks,
)
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import CalibrationResult, read_calibration
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.torch_tensors import ModelTensors
from mpt_trt.quantization.calibrated_weights import AwqMatrix
from references.modelopt_reference import logits_of, quantize_whole, whole_model
from support.checkpoints import CheckpointSpec, tensors, write_checkpoint
from support.engines import convert

FOUR_AT_A_TIME = Computation(batch_size=4)
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
GROUP_SIZE = 16
# Supported by transformers, and not; heads of 8, 16 and 20 features.
SPECS = {
    "multi-head": CheckpointSpec(num_heads=6, clip_qkv=1.5, seed=1),
    "grouped-query": CheckpointSpec(
        hidden_size=80, num_heads=4, num_kv_heads=2, no_bias=False, clip_qkv=1.5, seed=2
    ),
    "multi-query": CheckpointSpec(
        num_heads=3, num_kv_heads=1, qk_ln=True, norm_type="rmsnorm", alibi=False, seed=3
    ),
    "wide": CheckpointSpec(
        hidden_size=64, expansion_ratio=2.5, num_layers=3, tie_word_embeddings=False, seed=4
    ),
}
MATRICES = {
    "attention.query_key_value": "attn.Wqkv",
    "attention.dense": "attn.out_proj",
    "mlp.dense_h_to_4h": "ffn.up_proj",
    "mlp.dense_4h_to_h": "ffn.down_proj",
}


def samples_of(spec: CheckpointSpec, number: int = 6, length: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(spec.seed)
    return torch.randint(spec.vocab_size, (number, length), generator=generator)


def calibrated(
    folder: Path,
    spec: CheckpointSpec,
    plan: CalibrationPlan,
    weight_dtype: np.dtype = FLOAT32,
    computation: Computation = FOUR_AT_A_TIME,
) -> CalibrationResult:
    """The result for a model that is written to `folder/hf` and `folder/ft`."""
    source = open_model(write_checkpoint(folder / "hf", spec))
    target = folder / "result.npz"
    calibrate(source, samples_of(spec), plan, computation, weight_dtype, target)
    return read_calibration(target, ft_of(folder))


def ft_of(folder: Path) -> FtCheckpoint:
    return convert(folder / "hf", folder / "ft" / "1-gpu")


def quantized_whole(folder: Path, spec: CheckpointSpec, qformat: str | None, kv: str = "auto"):
    model = whole_model(folder / "hf")
    quantize_whole(model, qformat, samples_of(spec), GROUP_SIZE, kv)
    return model


def block_of(model: nn.Module, layer: int) -> nn.Module:
    return getattr(model, "transformer", model).blocks[layer]


def assert_near(found, expected: Tensor, tolerance: float = 1e-5) -> None:
    expected = expected.detach().float().numpy()
    np.testing.assert_allclose(found, expected.reshape(np.shape(found)), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("name", SPECS)
def test_awq_is_what_modelopt_makes_of_the_whole_model(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    result = calibrated(tmp_path, spec, CalibrationPlan("int4_awq", GROUP_SIZE))
    assert (result.quantization_format, result.group_size) == ("int4_awq", GROUP_SIZE)
    model = quantized_whole(tmp_path, spec, "int4_awq")
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            found = result.awq_matrix(layer, matrix)
            module = block_of(model, layer).get_submodule(path)
            assert_near(found.pre_quant_scale, quant_utils.get_prequant_scaling_factor(module))
            assert_near(found.weight, module.weight)
            assert_near(found.scales, quant_utils.get_weight_scaling_factor(module))
            assert found.pre_quant_scale.std() > 0.01  # AWQ did something


def test_scales_by_error_have_less_error(tmp_path: Path) -> None:
    """Nothing but the scales changes; every group's error falls, or stays."""
    spec = SPECS["multi-head"]
    by_amax = calibrated(tmp_path / "amax", spec, CalibrationPlan("int4_awq", GROUP_SIZE))
    plan = CalibrationPlan("int4_awq", GROUP_SIZE, scales="error")
    by_error = calibrated(tmp_path / "error", spec, plan)
    assert (by_amax.scales, by_error.scales) == ("amax", "error")
    assert by_error.quantization_format == "int4_awq"
    squares = mean_squares(whole_model(tmp_path / "amax" / "hf"), spec)
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            plain, found = (each.awq_matrix(layer, matrix) for each in (by_amax, by_error))
            np.testing.assert_array_equal(found.weight, plain.weight)
            np.testing.assert_array_equal(found.pre_quant_scale, plain.pre_quant_scale)
            assert (found.scales < 0).any()
            errors = [
                group_errors(each, squares[layer, path] * found.pre_quant_scale**2)
                for each in (found, plain)
            ]
            assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
            assert errors[0].sum() < 0.8 * errors[1].sum()


def mean_squares(model: nn.Module, spec: CheckpointSpec) -> dict[tuple[int, str], NDArray]:
    """Mean square of each input feature of each linear layer."""
    found: dict[tuple[int, str], NDArray] = {}
    for layer in range(spec.num_layers):
        for path in MATRICES.values():

            def keep(_, inputs, key=(layer, path)) -> None:
                found[key] = inputs[0].double().square().flatten(0, -2).mean(0).numpy()

            block_of(model, layer).get_submodule(path).register_forward_pre_hook(keep)
    with torch.no_grad():
        model(samples_of(spec))
    return found


def group_errors(matrix: AwqMatrix, importance: NDArray) -> NDArray:
    """Weighted squared error of each group, rounded with its scale."""
    groups = matrix.weight.reshape(*matrix.scales.shape, -1).astype(np.float64)
    scales = matrix.scales[..., None].astype(np.float64)
    rounded = np.rint(groups / scales).clip(-8, 7) * scales
    weights = importance.reshape(groups.shape[1:])
    return ((rounded - groups) ** 2 * weights).sum(-1)


@pytest.mark.parametrize("name", SPECS)
def test_fp8_is_what_modelopt_makes_of_the_whole_model(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    result = calibrated(tmp_path, spec, CalibrationPlan("fp8"))
    assert (result.quantization_format, result.group_size) == ("fp8", None)
    model = quantized_whole(tmp_path, spec, "fp8")
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            found = result.fp8_scales(layer, matrix)
            module = block_of(model, layer).get_submodule(path)
            assert_near(found.weight, quant_utils.get_weight_scaling_factor(module))
            assert_near(found.activation, quant_utils.get_activation_scaling_factor(module))


@pytest.mark.parametrize("name", SPECS)
def test_smoothquant_is_what_modelopt_makes_of_the_whole_model(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    result = calibrated(tmp_path, spec, CalibrationPlan("int8_sq"))
    assert (result.quantization_format, result.group_size) == ("int8_sq", None)
    model = quantized_whole(tmp_path, spec, "int8_sq")
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            found = result.smoothquant_matrix(layer, matrix)
            module = block_of(model, layer).get_submodule(path)
            assert_near(found.pre_quant_scale, quant_utils.get_prequant_scaling_factor(module))
            assert_near(found.weight, module.weight)
            assert_near(found.scales, quant_utils.get_weight_scaling_factor(module))
            activation = quant_utils.get_activation_scaling_factor(module)
            assert_near(found.activation_scale, activation)


@pytest.mark.parametrize("qformat", ["kv_cache", "int4_awq", "fp8"])
@pytest.mark.parametrize("name", ["multi-head", "grouped-query", "multi-query"])
def test_ranges_of_keys_and_values_are_modelopts(name: str, qformat: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    group_size = GROUP_SIZE if qformat == "int4_awq" else None
    result = calibrated(tmp_path, spec, CalibrationPlan(qformat, group_size))
    whole = None if qformat == "kv_cache" else qformat
    model = quantized_whole(tmp_path, spec, whole, "fp8")
    for layer in range(spec.num_layers):
        quantizers = dict(block_of(model, layer).named_modules())
        amax = {
            kind: next(q for n, q in quantizers.items() if n.endswith(f"{kind}_bmm_quantizer")).amax
            for kind in "kv"
        }
        assert_near(result.kv_amax(layer).key, amax["k"])
        assert_near(result.kv_amax(layer).value, amax["v"])


def test_smoothed_weights_and_scales_belong_to_the_checkpoint(tmp_path: Path) -> None:
    """Stored values match their definitions on the checkpoint's weights, without ModelOpt."""
    spec = SPECS["grouped-query"]
    result = calibrated(tmp_path, spec, CalibrationPlan("int4_awq", GROUP_SIZE))
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            found = result.awq_matrix(layer, matrix)
            original = tensors(spec)[f"transformer.blocks.{layer}.{path}.weight"].numpy()
            np.testing.assert_allclose(found.weight * found.pre_quant_scale, original, rtol=1e-5)
            groups = np.abs(found.weight).reshape(len(original), -1, GROUP_SIZE)
            np.testing.assert_allclose(found.scales, groups.max(-1) / 7, rtol=1e-6)


def test_groups_of_zeros_have_a_scale_that_divides(tmp_path: Path) -> None:
    found = modelopt._scales(torch.tensor([0.0, 7.0]), 7)
    np.testing.assert_array_equal(found, np.array([1, 1], np.float32))


# --- the streaming pass --------------------------------------------------------------------------


def whole_amax(folder: Path, spec: CheckpointSpec) -> ActivationAmax:
    """max|x| and max|y| of every linear layer, by hooks in the whole model, sample by sample."""
    model = whole_model(folder)
    seen: dict[tuple[int, str], list[list[Tensor]]] = {}
    for layer in range(spec.num_layers):
        for matrix, path in MATRICES.items():
            both = seen[layer, matrix] = [[], []]

            def hook(_module, inputs, output, both=both) -> None:
                both[0].append(inputs[0].abs().amax((0, 1)))
                both[1].append(output.abs().amax((0, 1)))

            block_of(model, layer).get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        for sample in samples_of(spec):
            logits_of(model, sample[None])
    largest = {k: [torch.stack(v).amax(0).numpy() for v in both] for k, both in seen.items()}
    return [{m: largest[layer, m] for m in MATRICES} for layer in range(spec.num_layers)]


@pytest.mark.parametrize("name", SPECS)
def test_activation_amax_is_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    folder = write_checkpoint(tmp_path / "hf", spec)
    steps: list[None] = []
    found = activation_amax(
        folder, samples_of(spec), Computation(), advance=lambda: steps.append(None)
    )
    assert len(steps) == len(found) == spec.num_layers
    for ours, expected in zip(found, whole_amax(folder, spec), strict=True):
        assert list(ours) == list(MATRICES)
        for matrix, (x, y) in expected.items():
            assert ours[matrix].x.dtype == ours[matrix].y.dtype == np.float32
            np.testing.assert_allclose(ours[matrix].x, x, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(ours[matrix].y, y, rtol=1e-4, atol=1e-6)


def test_ft_checkpoints_have_the_ranges_of_their_model(tmp_path: Path) -> None:
    spec = SPECS["grouped-query"]
    folder = write_checkpoint(tmp_path / "hf", spec)
    ft = ft_of(tmp_path).folder
    from_hf, from_ft = (
        activation_amax(place, samples_of(spec), Computation()) for place in (folder, ft)
    )
    for ours, theirs in zip(from_hf, from_ft, strict=True):
        for matrix in MATRICES:
            np.testing.assert_array_equal(ours[matrix].x, theirs[matrix].x)


@pytest.mark.parametrize(
    ("qformat", "weight_dtype", "blocks"),
    [("int4_awq", FLOAT16, 1), ("int4_awq", FLOAT32, 2), ("fp8", FLOAT32, 1)],
)
def test_one_block_is_calibrated_and_one_is_written(
    qformat: str,
    weight_dtype: np.dtype,
    blocks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts copies of weights in memory; the written block may be one of them, unrounded."""
    spec = CheckpointSpec(num_kv_heads=2, num_layers=6)
    alive: dict[int, int] = {}
    most = 0
    read = ModelTensors.tensor

    def tracked(model: ModelTensors, name: str) -> Tensor:
        nonlocal most
        tensor = read(model, name)
        # A parameter is another tensor on the same memory, which an array keeps alive with it.
        memory = tensor.numpy()
        alive[id(memory)] = tensor.nbytes
        weakref.finalize(memory, alive.pop, id(memory))
        most = max(most, sum(alive.values()))
        return torch.from_numpy(memory)

    monkeypatch.setattr(ModelTensors, "tensor", tracked)
    plan = CalibrationPlan(qformat, GROUP_SIZE if qformat == "int4_awq" else None)
    calibrated(tmp_path, spec, plan, weight_dtype)
    prefix = "transformer.blocks.0."
    block = sum(t.nbytes for name, t in tensors(spec).items() if name.startswith(prefix))
    assert block <= most <= blocks * block


def test_the_pass_must_see_every_block(tmp_path: Path) -> None:
    source = open_model(write_checkpoint(tmp_path / "hf", CheckpointSpec()))
    with pytest.raises(ValueError, match="block 0 was not run"):
        stream_blocks(source, samples_of(CheckpointSpec()), Computation(), lambda *_: None)


@given(st.integers(1, 200), st.integers(1, 64))
def test_batches_are_equal_and_as_large_as_they_may_be(number: int, at_most: int) -> None:
    size = equal_batch_size(number, at_most)
    assert 1 <= size <= at_most and number % size == 0
    assert not any(number % larger == 0 for larger in range(size + 1, at_most + 1))


# --- rejections ----------------------------------------------------------------------------------


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    source = open_model(write_checkpoint(tmp_path / "hf", CheckpointSpec()))
    samples = torch.tensor([[1, 97]])
    with pytest.raises(MptTrtError, match="token 97 is beyond the model's vocabulary of 97"):
        calibrate(
            source, samples, CalibrationPlan("fp8"), Computation(), FLOAT32, tmp_path / "x.npz"
        )
    assert not (tmp_path / "x.npz").exists()


def test_samples_beyond_the_learned_positions_are_refused(tmp_path: Path) -> None:
    spec = CheckpointSpec(alibi=False, max_seq_len=8)
    source = open_model(write_checkpoint(tmp_path / "hf", spec))
    with pytest.raises(MptTrtError, match="21 tokens, but the model has learned positions for 8"):
        calibrate(
            source, samples_of(spec), CalibrationPlan("fp8"), Computation(), FLOAT32, tmp_path / "x"
        )


@pytest.mark.parametrize(
    "plan", [CalibrationPlan("kv_cache"), CalibrationPlan("fp8"), CalibrationPlan("int4_awq", 16)]
)
def test_activations_that_overflow_are_refused(
    plan: CalibrationPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CheckpointSpec()
    grown = {
        name: tensor * 3e5 if "Wqkv" in name else tensor for name, tensor in tensors(spec).items()
    }
    monkeypatch.setattr("support.checkpoints.tensors", lambda _: grown)
    source = open_model(write_checkpoint(tmp_path / "hf", spec))
    in_half = Computation(dtype=torch.float16)
    with pytest.raises(MptTrtError, match="calibrate in bfloat16 or float32"):
        calibrate(source, samples_of(spec), plan, in_half, FLOAT32, tmp_path / "x.npz")
    assert list(tmp_path.glob("*x.npz*")) == []


def test_weights_that_float16_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(CheckpointSpec(), num_layers=1)
    grown = {n: t * 1e7 if "up_proj" in n else t for n, t in tensors(spec).items()}
    monkeypatch.setattr("support.checkpoints.tensors", lambda _: grown)
    source = open_model(write_checkpoint(tmp_path / "hf", spec))
    with pytest.raises(MptTrtError, match=r"mlp:fc holds .* float16 cannot hold; .*float32"):
        calibrate(
            source,
            samples_of(spec),
            CalibrationPlan("int4_awq", GROUP_SIZE),
            Computation(),
            FLOAT16,
            tmp_path / "x.npz",
        )
    assert list(tmp_path.glob("*x.npz*")) == []


def test_half_precision_is_near_float32(tmp_path: Path) -> None:
    """The arithmetic of a GPU, here on the CPU."""
    spec = SPECS["grouped-query"]
    exact = calibrated(tmp_path / "32", spec, CalibrationPlan("fp8"))
    half = calibrated(
        tmp_path / "16",
        spec,
        CalibrationPlan("fp8"),
        np.dtype(np.float16),
        Computation(dtype=torch.bfloat16, batch_size=4),
    )
    for matrix in MATRICES:
        ours, theirs = half.fp8_scales(1, matrix), exact.fp8_scales(1, matrix)
        assert ours.weight == pytest.approx(theirs.weight, rel=2**-8)
        assert ours.activation == pytest.approx(theirs.activation, rel=0.1)
