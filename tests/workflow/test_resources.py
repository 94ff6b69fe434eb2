"""Resources of jobs against files and measurements, and in Snakemake."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.known_models import known_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.engines import memory
from mpt_trt.engines.memory import GB
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding, is_legal
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.schemes import Awq, Quantization, WeightOnly
from mpt_trt.workflow import resources
from support.checkpoints import write_checkpoint
from support.engines import FEATURES
from support.paths import REPOSITORY
from support.specs import LIMITS, SPECS, WHOLE, config_of, plan_for, require_monotonic
from support.workflow import SMALL, SPEC, Workflow

# --- against files and measurements --------------------------------------------------------------


@pytest.mark.parametrize("name", ["multi-head", "everything", "rmsnorm, biases"])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_ft_checkpoint_takes_what_is_computed(name: str, tp_size: int, tmp_path: Path) -> None:
    spec = FEATURES[name]
    if not is_legal(config_of(spec), tp_size):
        spec = replace(spec, num_kv_heads=2)
    folder = write_checkpoint(tmp_path / "hf", spec)
    config = read_hf_config(folder)
    source = HfCheckpoint(folder, weights(config))
    settings = ConversionSettings("bfloat16", tp_size, 0, "model", {})
    write_ft_checkpoint(source, config, settings, tmp_path / "ft")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "ft").glob("*.bin"))
    needed = EngineSpec(config, "bfloat16", tp_size, LIMITS, WHOLE)
    assert resources.ft_checkpoint_disk(needed) == on_disk


RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*engine-build*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_measured_builds_stay_within_what_is_computed(path: Path) -> None:
    measured = json.loads(path.read_text())
    spec = plan_for(measured["shape"], measured["dtype"], measured.get("tp", 1))
    stored_layers = measured.get("layers") or spec.config.num_layers
    spec = _with_layers(spec, measured.get("linked_layers") or stored_layers)
    schemes = {"none": None, "int4_awq": Awq(None), "int4_weight_only": WeightOnly(4)}
    scheme = schemes[measured.get("quantization", "none")]
    spec = replace(spec, quantization=Quantization(scheme, "auto"))
    # A rank's part of a tied head is stored again in the plan, and has no file of its own.
    files = replace(spec, vocabulary=WHOLE)
    assert memory.rank_weights(files) == measured["weight_bytes"]
    peak = measured["peak_private_mib"] * memory.MIB
    assert peak <= resources.build_memory(spec) <= 1.35 * peak
    if "steps" in measured:
        networks = measured["steps"]["network"]["peak_private_mib"] * memory.MIB
        assert networks <= resources.network_memory(spec)
    # The benchmark's folder holds the FT checkpoint, the networks of all ranks, and one plan.
    disk = measured["ratio_disk_to_weights"] * measured["weight_bytes"]
    beside_weights = resources.PLAN_BASE + spec.config.num_layers * resources.PLAN_PER_LAYER
    plans_not_made = (spec.tp_size - 1) * (memory.rank_weights(spec) + beside_weights)
    computed = resources.engine_disk(spec) - plans_not_made
    # Layers that are links to others have no files of their own.
    computed += resources.ft_checkpoint_disk(_with_layers(spec, stored_layers))
    assert disk <= computed <= 1.01 * disk


def _with_layers(spec: EngineSpec, num_layers: int) -> EngineSpec:
    return replace(spec, config=replace(spec.config, num_layers=num_layers))


def test_there_is_a_measured_build() -> None:
    assert RESULTS


# --- in general ----------------------------------------------------------------------------------

QUANTITIES = (
    resources.ft_checkpoint_disk,
    resources.engine_disk,
    resources.build_memory,
    resources.smoke_test_memory,
)


@given(SPECS)
def test_more_of_anything_never_needs_less(spec: EngineSpec) -> None:
    require_monotonic(QUANTITIES, spec)


@given(SPECS.filter(lambda spec: spec.tp_size > 2))
def test_a_rank_of_more_takes_less_to_build(spec: EngineSpec) -> None:
    fewer = replace(spec, tp_size=spec.tp_size // 2)
    assert resources.build_memory(spec) <= resources.build_memory(fewer)


def test_conversion_does_not_depend_on_the_model() -> None:
    one, two = (resources.conversion_memory(workers) for workers in (1, 2))
    assert 0 < two - one < one < GB


def test_planning_takes_no_heavy_import() -> None:
    """Snakemake computes this whenever it plans, and PyTorch takes seconds to import."""
    code = (
        "import sys, mpt_trt.workflow.resources, mpt_trt.checkpoint.known_models; "
        "sys.exit(bool({'torch', 'onnx', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


# --- in the workflow -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """The toy model, and two of the hub that are not on disk. Nothing is made in it."""
    made = Workflow.create(tmp_path_factory.mktemp("workflow") / "project")
    path = made.folder / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["models"] |= {
        "thirty": {"source": "mosaicml/mpt-30b"},
        "unknown": {"source": "somebody/something"},
    }
    path.write_text(yaml.safe_dump(content))
    (made.folder / "text.txt").write_text("only its name is looked at")
    return made


def planned_memory(workflow: Workflow, target: str) -> dict[str, int]:
    """mem_mb by rule."""
    result = workflow.run("--dry-run", target)
    assert result.returncode == 0, result.stdout + result.stderr
    found: dict[str, int] = {}
    rule = ""
    for line in (result.stdout + result.stderr).splitlines():
        if match := re.match(r"(?:local)?rule (\w+):", line):
            rule = match[1]
        elif match := re.search(r"resources:.*\bmem_mb=(\d+)", line):
            found[rule] = int(match[1])
    return found


def expected_memory(
    config: MptConfig, dtype: str, tp_size: int, *, fetched: bool = True
) -> dict[str, int]:
    spec = EngineSpec(config, dtype, tp_size, BuildLimits(**SMALL), VocabularySharding())
    sizes = {
        "convert_checkpoint": resources.conversion_memory(2),
        "make_networks": resources.network_memory(spec),
        "build_rank": resources.build_memory(spec),
        "assemble_engine": resources.linking_memory(),
        "smoke_test": resources.smoke_test_memory(spec),
    }
    if not fetched:
        sizes["fetch_checkpoint"] = resources.linking_memory()
    return {rule: math.ceil(size / 1e6) for rule, size in sizes.items()}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_jobs_ask_for_the_memory_of_the_stored_config(workflow: Workflow, tp_size: int) -> None:
    found = planned_memory(workflow, f"smoke_tests/toy/fp32/{tp_size}-gpu.json")
    assert found == expected_memory(config_of(SPEC), "float32", tp_size)


def test_measurements_ask_for_the_memory_of_engine_head_and_windows(workflow: Workflow) -> None:
    config = config_of(SPEC)
    spec = EngineSpec(config, "float32", 2, BuildLimits(**SMALL), VocabularySharding())
    found = planned_memory(workflow, "quality/toy/fp32/2-gpu.json")
    # Of the windows that workflow_support configures.
    assert found["compute_reference"] == math.ceil(resources.reference_memory(config, 3, 16) / 1e6)
    assert found["measure_quality"] == math.ceil(resources.quality_memory(spec, 3, 16) / 1e6)


@pytest.mark.parametrize("name", ["mpt-7b", "mpt-30b"])
def test_measurements_of_large_models(name: str) -> None:
    """Computed by hand: hidden states, the head, and a cache of all rows, plus a smoke test."""
    config, limits = known_config(name), BuildLimits(8, 512, 64)
    spec = EngineSpec(config, "float32", 1, limits, VocabularySharding())
    hidden = 16 * 512 * config.hidden_size * 4
    assert resources.reference_memory(config, 16, 512) > 3 * hidden
    more = resources.quality_memory(spec, 16, 512) - 1.1 * memory.rank_weights(spec)
    head = config.vocab_size * config.hidden_size * 4
    cache = 8 * 576 * 2 * config.num_layers * config.hidden_size * 4
    assert hidden + head + cache < more < hidden + head + cache + 2 * (1 << 30)
    # The logits are never all in memory, so more windows cost only their hidden states.
    doubled = resources.quality_memory(spec, 32, 512) - resources.quality_memory(spec, 16, 512)
    assert doubled == hidden


def test_jobs_ask_for_the_memory_of_the_known_shape_before_it_is_fetched(
    workflow: Workflow,
) -> None:
    found = planned_memory(workflow, "smoke_tests/thirty/fp16/4-gpu.json")
    assert found == expected_memory(known_config("mpt-30b"), "float16", 4, fetched=False)


def test_unknown_models_count_as_mpt_7b_until_they_are_fetched(workflow: Workflow) -> None:
    found = planned_memory(workflow, "smoke_tests/unknown/fp16/2-gpu.json")
    assert found == expected_memory(known_config("mpt-7b"), "float16", 2, fetched=False)
    # It may have heads for five ranks, which MPT-7B does not.
    found = planned_memory(workflow, "smoke_tests/unknown/fp16/5-gpu.json")
    assert found == expected_memory(known_config("mpt-7b"), "float16", 1, fetched=False)


def test_fetched_models_have_a_config_of_their_own(workflow: Workflow) -> None:
    fetched = workflow.folder / "checkpoints" / "unknown"
    write_checkpoint(fetched, SPEC)
    found = planned_memory(workflow, "trt_engines/unknown/fp32/2-gpu")
    expected = expected_memory(config_of(SPEC), "float32", 2)
    assert found == {rule: size for rule, size in expected.items() if rule != "smoke_test"}
    result = workflow.run("--dry-run", "trt_engines/unknown/fp32/4-gpu")
    assert result.returncode != 0
    assert "valid sizes are 1, 2, 3, 6" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "target",
    ["ft_ckpts/toy/fp32/4-gpu", "trt_engines/toy/fp16/5-gpu", "smoke_tests/toy/fp16/12-gpu.json"],
)
def test_illegal_number_of_ranks_is_refused_before_any_work(
    workflow: Workflow, target: str
) -> None:
    before = sorted(path.name for path in workflow.folder.iterdir())
    result = workflow.run(target)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert re.search(
        r"tensor-parallel size \d+ does not divide .* valid sizes are 1, 2, 3, 6", output
    )
    assert not re.search(r"^(local)?rule ", output, re.MULTILINE)
    assert sorted(path.name for path in workflow.folder.iterdir() if path.name[0] != ".") == [
        name for name in before if name[0] != "."
    ]
