"""Expected errors: correct engines of every shipped variant pass, wrong ones do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from mpt_trt.calibration.block_stream import Computation, activation_amax
from mpt_trt.calibration.calibrate import calibrate
from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.calibration.model_source import open_model
from mpt_trt.calibration.plan import CalibrationPlan
from mpt_trt.calibration.result import read_calibration
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.evaluation.comparison import measure_distance
from mpt_trt.evaluation.distance import Distance, violations
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.evaluation.simulated_rounding import ExpectedLogits, Rounding, expected_logits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.ft.int8 import Int8Conversion
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import GROUPED, SmoothQuant, calibration_format
from mpt_trt.workflow.settings import Variant, default_tolerance, parse_settings
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import feed, make_network, open_network
from support.paths import REPOSITORY

SPEC = CheckpointSpec(hidden_size=128, num_heads=4, num_layers=3, vocab_size=301, max_seq_len=128)
LIMITS = BuildLimits(max_batch_size=1, max_input_len=48, max_output_len=8)
VARIANTS = parse_settings(yaml.safe_load((REPOSITORY / "config.yaml").read_text())).variants
# ONNX Runtime on a CPU has no fp8 cache outside of an engine.
RUNNABLE = {name: each for name, each in VARIANTS.items() if each.kv_cache_dtype != "fp8"}
UP_PROJ = "layers.{}.mlp.dense_h_to_4h"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in `hf`, and what is made of it."""
    made = tmp_path_factory.mktemp("rounding")
    write_checkpoint(made / "hf", SPEC)
    return made


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, SPEC.vocab_size, (1, 40))


def samples() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SPEC.vocab_size, (4, 48), generator=generator)


def checkpoint_of(variant: Variant, folder: Path) -> FtCheckpoint:
    is_smoothed = isinstance(variant.quantization, SmoothQuant)
    target = folder / f"{variant.dtype}-{is_smoothed}"
    if not target.exists():
        hf, int8 = folder / "hf", None
        if is_smoothed:
            amax = activation_amax(hf, samples(), Computation())
            int8 = Int8Conversion(amax, 0.5, {})
        config = read_hf_config(hf)
        settings = ConversionSettings(variant.dtype, 1, 0, "random", {}, int8)
        write_ft_checkpoint(HfCheckpoint(hf, weights(config)), config, settings, target)
    return read_ft_checkpoint(target)


def network_of(variant: Variant, folder: Path) -> Path:
    target = folder / f"network-{variant.dtype}-{variant.quantized}"
    if target.exists():
        return target
    checkpoint, calibration = checkpoint_of(variant, folder), None
    needed = calibration_format(variant.quantization, variant.kv_cache_dtype)
    if needed is not None:
        path = folder / f"{needed}.npz"
        if not path.exists():
            plan = CalibrationPlan(needed, 32 if needed in GROUPED else None)
            dtype = np.dtype(np.float16)
            calibrate(open_model(folder / "hf"), samples(), plan, Computation(), dtype, path)
        calibration = read_calibration(path, checkpoint)
    calibrated = CalibratedQuantization(variant.quantized, calibration)
    return make_network(checkpoint, target, LIMITS, calibrated)


def expected(variant: Variant, folder: Path, tokens: NDArray[np.int64]) -> ExpectedLogits:
    rounding = Rounding(variant.dtype, variant.quantized)
    return expected_logits(folder / "hf", tokens[0].tolist(), rounding)


def distance_of(network: Path, tokens: NDArray[np.int64], logits: ExpectedLogits) -> Distance:
    found = feed(open_network(network), tokens, [tokens.shape[1]])[0]
    return measure_distance(found, logits)


@pytest.mark.parametrize("name", RUNNABLE)
def test_correct_engines_of_a_random_model_pass(name, folder, tokens):
    """Their error is the one that the simulation predicts."""
    variant = RUNNABLE[name]
    logits = expected(variant, folder, tokens)
    distance = distance_of(network_of(variant, folder), tokens, logits)
    assert violations(distance, variant.quantized, default_tolerance()) == []
    if variant.dtype != "float32":
        assert 0.6 < distance.error / distance.expected_error < 1.6
    is_quantized = variant.quantization is not None or variant.kv_cache_dtype != "auto"
    assert (distance.expected_error > 2 * distance.rounding_error) == is_quantized
    if not is_quantized:
        assert distance.expected_error == distance.rounding_error


def test_the_reference_is_the_one_without_rounding(folder, tokens):
    logits = expected(VARIANTS["int8_weight_only"], folder, tokens)
    alone = reference_logits(folder / "hf", tokens[0].tolist())
    torch.testing.assert_close(logits.reference, alone, rtol=0, atol=0)


def test_an_fp8_cache_adds_to_the_error(folder, tokens):
    errors = []
    for name in ("fp8", "fp8_kv"):
        logits = expected(VARIANTS[name], folder, tokens)
        errors.append(float((logits.quantized - logits.reference).square().mean()))
    assert 1.02 * errors[0] < errors[1] < 3 * errors[0]


# --- wrong engines -------------------------------------------------------------------------------


def scale_files(weights_folder: Path, layer: int) -> list[Path]:
    files = sorted(weights_folder.glob(f"*{UP_PROJ.format(layer)}*scale*"))
    assert files
    return files


def swap_layers(weights_folder: Path) -> None:
    """The scales of one matrix of two layers."""
    pairs = zip(scale_files(weights_folder, 0), scale_files(weights_folder, 1), strict=True)
    for one, other in pairs:
        contents = one.read_bytes(), other.read_bytes()
        for path, content in zip((other, one), contents, strict=True):
            replaced(path, content)


def reverse(weights_folder: Path) -> None:
    """The scales of one matrix in reverse order."""
    for path in scale_files(weights_folder, 0):
        replaced(path, np.fromfile(path, np.float16)[::-1].tobytes())


def replaced(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a link to the checkpoint's
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [swap_layers, reverse])
@pytest.mark.parametrize("name", ["int8_weight_only", "int4_weight_only", "sq"])
def test_swapped_scales_do_not_pass(
    name: str, damage: Callable[[Path], None], folder: Path, tokens, tmp_path: Path
):
    variant = VARIANTS[name]
    wrong = Path(shutil.copytree(network_of(variant, folder), tmp_path / "wrong"))
    damage(wrong / "weights")
    distance = distance_of(wrong, tokens, expected(variant, folder, tokens))
    found = violations(distance, variant.quantized, default_tolerance())
    assert [each.key for each in found][:1] == ["error_factor"]


@pytest.mark.parametrize("scale", [1.5, 0.6])
@pytest.mark.parametrize("name", ["int4_awq", "fp8", "int8_kv"])
def test_a_wrong_scale_does_not_pass(name: str, scale: float, folder: Path, tokens, tmp_path: Path):
    """A norm's weights that are `scale` times too large do what a wrong scale of a matrix does."""
    variant = VARIANTS[name]
    wrong = Path(shutil.copytree(network_of(variant, folder), tmp_path / "wrong"))
    norms = sorted((wrong / "weights").glob("*layers.1.*norm*weight*"))
    assert norms
    for path in norms:
        replaced(path, (np.fromfile(path, np.float16) * np.float16(scale)).tobytes())
    distance = distance_of(wrong, tokens, expected(variant, folder, tokens))
    assert violations(distance, variant.quantized, default_tolerance())
