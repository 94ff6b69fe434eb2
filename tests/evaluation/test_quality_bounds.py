"""Regression bounds: the quality of the demo model's engines, by the whole workflow.

A variant of config.yaml gets a row in BOUNDS. They leave room for another processor's rounding, not
for a mistake: two to four times what was measured, and never less than its standard error.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import MptForCausalLM

from mpt_trt.commands import measure_quality
from mpt_trt.evaluation.heldout import read_heldout
from mpt_trt.evaluation.quality_result import QualityResult, read_quality
from support.engines import call_tool
from support.forks.servers import forked_python
from support.workflow import COPIED, LINKED, REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"
WINDOWS, LENGTH = 4, 256
REFERENCE = "quality/mpt-demo/reference.safetensors"
MEASURED_BY_THE_WORKFLOW = "quality/mpt-demo/int8_kv/1-gpu.json"


@dataclass(frozen=True)
class Bounds:
    """excess: most nats per token above or below the reference. size: most of fp16's weights."""

    excess: float
    kl: float
    top1: float
    size: float


BOUNDS = {
    "fp32": Bounds(excess=1e-5, kl=1e-9, top1=1.0, size=2.01),
    "fp16": Bounds(excess=2e-4, kl=2e-6, top1=0.995, size=1.0),
    "bf16": Bounds(excess=2e-3, kl=2e-4, top1=0.98, size=1.01),
    "int8_weight_only": Bounds(excess=0.006, kl=2e-3, top1=0.97, size=0.6),
    "int4_weight_only": Bounds(excess=0.4, kl=0.4, top1=0.7, size=0.4),
    "int4_awq": Bounds(excess=0.4, kl=0.4, top1=0.7, size=0.4),
    "int4_gptq": Bounds(excess=0.25, kl=0.2, top1=0.8, size=0.4),
    "sq": Bounds(excess=0.02, kl=0.01, top1=0.93, size=0.6),
    "fp8": Bounds(excess=0.06, kl=0.06, top1=0.88, size=0.6),
    "fp8_kv": Bounds(excess=0.06, kl=0.06, top1=0.88, size=0.6),
    "int8_kv": Bounds(excess=0.004, kl=1e-3, top1=0.97, size=1.01),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the shipped configuration, a few windows, and all engines."""
    folder = tmp_path_factory.mktemp("quality")
    for name in (*LINKED, *COPIED):
        (folder / name).symlink_to(REPOSITORY / name)
    config = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    config["quality"] |= {"num_windows": WINDOWS, "window_length": LENGTH, "whole_text": False}
    config["calibration"] |= {"num_samples": 4, "sequence_length": 128}
    for variant in config["variants"].values():
        variant["max_batch_size"] = WINDOWS
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    targets = [f"trt_engines/mpt-demo/{variant}/1-gpu" for variant in BOUNDS]
    targets += [REFERENCE, MEASURED_BY_THE_WORKFLOW]
    finished = subprocess.run(
        # Threads of one engine would wait for each other, and for those of the other tests.
        [forked_python(), "-m", "snakemake", "--cores", "1", *targets],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, QualityResult]:
    """Measures as the workflow does, except for the speeds, whose rounds take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_quality, "SPEED_PROMPT", 1)
        patch.setattr(measure_quality, "SPEED_NEW_TOKENS", 1)
        patch.setattr(measure_quality, "SPEED_ROUNDS", 1)
        return {variant: measured(folder, variant) for variant in BOUNDS}


def measured(folder: Path, variant: str) -> QualityResult:
    output = folder / f"measured/{variant}.json"
    call_tool(
        "steps/measure_quality.py",
        f"--engine_dir={folder}/trt_engines/mpt-demo/{variant}/1-gpu",
        f"--model_dir={DEMO}",
        f"--reference={folder / REFERENCE}",
        "--total_threads=1",
        f"--output={output}",
    )
    return read_quality(output)


@pytest.mark.parametrize("variant", BOUNDS)
def test_variant_is_within_its_bounds(results: dict[str, QualityResult], variant: str) -> None:
    found, bounds = results[variant], BOUNDS[variant]
    figures = found.figures
    assert figures.tokens == WINDOWS * LENGTH
    assert abs(figures.excess.mean) <= bounds.excess
    assert 0 <= figures.kl.mean <= bounds.kl
    assert figures.top1.mean >= bounds.top1
    assert found.size.networks <= bounds.size * results["fp16"].size.networks


def test_the_workflow_measures_the_same(folder: Path, results: dict[str, QualityResult]) -> None:
    assert read_quality(folder / MEASURED_BY_THE_WORKFLOW).figures == results["int8_kv"].figures


def test_fp32_has_the_loss_of_transformers(folder: Path, results: dict[str, QualityResult]) -> None:
    """The loss that transformers computes itself, with its own model, on the same windows."""
    tokens = torch.from_numpy(read_heldout(folder / REFERENCE).tokens)
    model = MptForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    figures = results["fp32"].figures
    expected = sum(losses) / len(losses)
    assert figures.nats_per_token.mean == pytest.approx(expected, abs=1e-4)
    assert figures.reference_nats_per_token.mean == pytest.approx(expected, abs=1e-4)
