"""The tensors of a model: one table of a block's matrices, against Hugging Face's own shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.checkpoint.hf_config import parse_hf_config
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import (
    BlockMatrix,
    Split,
    block_matrices,
    preceding_norm,
    weights,
)
from support.checkpoints import CheckpointSpec, config_dict, tensors


def config_of(spec: CheckpointSpec) -> MptConfig:
    return parse_hf_config(config_dict(spec), Path("config.json"))


SPECS = [CheckpointSpec(), CheckpointSpec(num_kv_heads=1, expansion_ratio=2.5, no_bias=False)]


@pytest.mark.parametrize("spec", SPECS)
def test_every_tensor_has_its_name_and_shape(spec: CheckpointSpec) -> None:
    named = {weight.hf_name: weight.shape for weight in weights(config_of(spec)) if weight.hf_name}
    stored = {
        name.removeprefix("transformer."): tuple(tensor.shape)
        for name, tensor in tensors(spec).items()
    }
    assert named == stored


@pytest.mark.parametrize("spec", SPECS)
def test_matrices_are_those_of_the_table(spec: CheckpointSpec) -> None:
    config = config_of(spec)
    for layer in range(config.num_layers):
        matrices = block_matrices(config, layer)
        assert list(matrices) == list(BlockMatrix)
        for matrix, weight in matrices.items():
            assert weight.place == (layer, matrix)
            assert weight.name == f"layers.{layer}.{matrix}.weight"
            assert weight.split is matrix.split_by is not Split.WHOLE
    linear = [weight for weight in weights(config) if weight.is_linear]
    assert len(linear) == len(BlockMatrix) * config.num_layers


def test_norms_precede_the_matrices_that_multiply_them() -> None:
    matrices = block_matrices(config_of(CheckpointSpec()), 1)
    assert {matrix: preceding_norm(weight) for matrix, weight in matrices.items()} == {
        BlockMatrix.QKV: "layers.1.input_layernorm",
        BlockMatrix.OUTPUT: None,
        BlockMatrix.UP: "layers.1.post_attention_layernorm",
        BlockMatrix.DOWN: None,
    }


def test_other_tensors_have_no_place_in_a_block() -> None:
    embedding = weights(config_of(CheckpointSpec()))[0]
    assert not embedding.is_linear
    with pytest.raises(ValueError, match="wte: not a matrix of a block"):
        _ = embedding.place
