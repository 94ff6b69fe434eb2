"""Plans of a small model, without Snakemake."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import CheckpointSpec

SPEC = CheckpointSpec(hidden_size=48, num_heads=6, num_layers=1, vocab_size=131)
LIMITS = {"max_batch_size": 4, "max_input_len": 24, "max_output_len": 16}
TOY = Target("toy", "fp16", tp=1)
SITE = {"gpus": "none"}


def make_plan(folder: Path, repository: Path = Path("/nowhere"), **content: dict) -> Plan:
    """Models: toy, a folder; seven and other, on the hub. Variants: fp16, and those given."""
    models = {
        "toy": {"source": "model"},
        "seven": {"source": "mosaicml/mpt-7b", "revision": "v1"},
        "other": {"source": "somebody/something"},
    }
    content["models"] = models | content.get("models", {})
    content["variants"] = {"fp16": LIMITS} | content.get("variants", {})
    return Plan(parse_settings({"site": SITE} | content), repository, folder)
