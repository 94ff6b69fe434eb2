"""The divergence of single matrices against the whole model, and the formats that follow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpt_trt.calibration import sensitivity
from mpt_trt.calibration.block_stream import Computation
from mpt_trt.calibration.gptq import rounded_to
from mpt_trt.calibration.model_source import ModelSource, open_model
from mpt_trt.calibration.sensitivity import measured_formats
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.logits import mean_divergence
from mpt_trt.model.tensors import BlockMatrix
from mpt_trt.quantization.gptq import Statistics
from mpt_trt.quantization.schemes import IntegerFormat, mixed_candidates
from references.modelopt_reference import whole_model
from support.checkpoints import CheckpointSpec, write_checkpoint

# 48 features for each of 8 ranks would be 6: groups of 16 fit one and three ranks only.
SPEC = CheckpointSpec(hidden_size=48, num_heads=3, seed=5)
SAMPLES = torch.randint(SPEC.vocab_size, (6, 19), generator=torch.Generator().manual_seed(6))
# Two batches, of which the first samples are measured.
COMPUTATION = Computation(batch_size=3)
MEASURED = [0, 3]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return open_model(write_checkpoint(tmp_path_factory.mktemp("sensitivity") / "hf", SPEC))


@pytest.mark.parametrize("matrix", [BlockMatrix.QKV, BlockMatrix.DOWN])
def test_divergence_is_that_of_the_whole_model(matrix: BlockMatrix, source: ModelSource) -> None:
    form = IntegerFormat(4, 16)
    measurement = sensitivity._Measurement(source, COMPUTATION, [form])
    found = measurement.run(SAMPLES, lambda: None)[0, matrix, form]
    model = whole_model(source.folder)
    module = model.transformer.blocks[0].get_submodule(matrix.hf_name)
    expected = logits(model)
    statistics = Statistics.empty(module.in_features, torch.device("cpu"))

    def observe(_, inputs: tuple[Tensor]) -> None:
        statistics.add(*[inputs[0].flatten(0, -2)] * 2)

    handle = module.register_forward_pre_hook(observe)
    with torch.no_grad():
        model(SAMPLES)
        handle.remove()
        module.weight.copy_(rounded_to(form, module.weight.float(), statistics)[0])
    assert found == pytest.approx(mean_divergence(expected, logits(model)), rel=1e-3)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(SAMPLES[MEASURED]).logits.flatten(0, 1).numpy()


def test_formats_within_a_budget(source: ModelSource) -> None:
    """The least budget has the coarsest groups, the largest int8, and others are deterministic."""
    assert names(source, 5.0) == {"int4-g16"}
    assert names(source, 9) == {"int8"}
    assert names(source, 6.5) == {"int4-g16", "int8"}
    first, second = (measured_formats(source, SAMPLES, COMPUTATION, 6.5) for _ in "ab")
    assert first == second
    with pytest.raises(MptTrtError, match=r"bits = 4\.9: this model's .* take 5 bits .* 5 or more"):
        measured_formats(source, SAMPLES, COMPUTATION, 4.9)


def names(source: ModelSource, bits: float) -> set[str]:
    chosen = measured_formats(source, SAMPLES, COMPUTATION, bits)
    return {form.name for row in chosen for form in row.values()}


@pytest.mark.parametrize(
    ("hidden", "heads", "expansion", "expected"),
    [
        (256, 4, 4, ["int4-g64", "int4-g32", "int4-g16", "int8"]),
        (1024, 8, 4, ["int4-g128", "int4-g64", "int4-g32", "int4-g16", "int8"]),
        # Groups of 16 cross borders between 2 ranks, but not those of one.
        (48, 6, 3, ["int4-g16", "int8"]),
        # 120 input features.
        (48, 6, 2.5, ["int8"]),
    ],
)
def test_candidates(
    hidden: int, heads: int, expansion: float, expected: list[str], tmp_path: Path
) -> None:
    spec = CheckpointSpec(
        hidden_size=hidden, num_heads=heads, num_layers=1, expansion_ratio=expansion
    )
    config = open_model(write_checkpoint(tmp_path / "hf", spec)).config
    assert [each.name for each in mixed_candidates(config)] == expected
