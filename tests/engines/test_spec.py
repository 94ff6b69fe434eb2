"""Specs of engines: valid ones, and the same spec from every source."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.rank_descriptions import read_network_spec
from mpt_trt.engines.spec import BuilderChoice, BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import CheckpointSpec
from support.engines import ONLY_RANK, make_ft_checkpoint, make_rank_network

LIMITS = BuildLimits(3, 16, 8, gather_all_token_logits=True)


def test_number_of_ranks_must_divide_the_model() -> None:
    config = known_config("mpt-7b")
    with pytest.raises(MptTrtError, match=r"tensor-parallel size 3 .* valid sizes are 1, 2, 4, 8"):
        EngineSpec(config, "float16", 3, LIMITS, VocabularySharding())


def test_variant_and_network_have_the_same_spec(tmp_path: Path) -> None:
    quantization = Quantization(WeightOnly(4, 16))
    checkpoint = make_ft_checkpoint(tmp_path, CheckpointSpec(hidden_size=32), "float16")
    content = {
        "models": {},
        "variants": {
            "small": {
                "dtype": "float16",
                "quantization": {"method": "int4_weight_only", "group_size": 16},
                "max_batch_size": 3,
                "max_input_len": 16,
                "max_output_len": 8,
                "gather_all_token_logits": True,
                "shard_head": False,
                "backend": "tensorrt_rtx",
                "compute_capabilities": ["8.6", "8.9"],
            }
        },
    }
    variant = parse_settings(content).variant("small")
    spec = variant.spec(checkpoint.config, 1)
    assert spec == EngineSpec(
        checkpoint.config, "float16", 1, LIMITS, VocabularySharding(head=False), quantization
    )
    assert variant.builder == BuilderChoice("tensorrt_rtx", ("8.6", "8.9"))
    inputs = NetworkInputs(
        checkpoint, LIMITS, spec.vocabulary, CalibratedQuantization(quantization)
    )
    assert inputs.spec == spec
    make_rank_network(inputs, ONLY_RANK, tmp_path / "network")
    assert read_network_spec(tmp_path / "network") == spec


@pytest.mark.parametrize("text", ["{}", '{"quantization": {"method": "int4"}}'])
def test_damaged_description_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rank0.network.json"
    path.write_text(text)
    with pytest.raises(
        MptTrtError, match=r"damaged .*; delete .* and make the networks again"
    ) as caught:
        read_network_spec(tmp_path)
    assert str(caught.value).startswith(str(path))
