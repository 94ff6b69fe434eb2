"""Specs of engines that are only planned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from hypothesis import strategies as st

from mpt_trt.checkpoint.hf_config import parse_hf_config
from mpt_trt.checkpoint.known_models import SHAPES, known_config
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding
from support.checkpoints import CheckpointSpec, config_dict

LIMITS = BuildLimits(8, 512, 64)
WHOLE = VocabularySharding(embedding=False, head=False)
VOCABULARIES = [VocabularySharding(e, h) for e in (False, True) for h in (False, True)]

SPECS = st.builds(
    EngineSpec,
    st.sampled_from(sorted(SHAPES)).map(known_config),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.sampled_from([1, 2, 4, 8]),
    st.builds(
        BuildLimits,
        st.integers(1, 64),
        st.integers(1, 2048),
        st.integers(1, 2048),
        st.booleans(),
    ),
    st.sampled_from(VOCABULARIES),
)


def config_of(spec: CheckpointSpec) -> MptConfig:
    return parse_hf_config(config_dict(spec), Path("config.json"))


def plan_for(name: str, dtype: str = "float16", tp_size: int = 1) -> EngineSpec:
    return EngineSpec(known_config(name), dtype, tp_size, LIMITS, VocabularySharding())


def require_monotonic(quantities: Iterable[Callable[[EngineSpec], int]], spec: EngineSpec) -> None:
    """Fails when more rows, positions, layers or bytes per element take less."""
    wider = replace(spec.limits, max_batch_size=spec.limits.max_batch_size + 1)
    longer = replace(spec.limits, max_output_len=spec.limits.max_output_len + 1)
    deeper = replace(spec.config, num_layers=spec.config.num_layers + 1)
    for quantity in quantities:
        least = quantity(spec)
        assert isinstance(least, int) and least > 0
        assert quantity(replace(spec, limits=wider)) >= least
        assert quantity(replace(spec, limits=longer)) >= least
        assert quantity(replace(spec, config=deeper)) >= least
        assert quantity(replace(spec, dtype="float32")) >= least or spec.dtype == "bfloat16"
