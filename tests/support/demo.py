"""An engine of the model that ships, with its tokenizer, for ONNX Runtime on a CPU."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from support.engines import call_tool
from support.paths import REPOSITORY
from support.simulated.install import build_simulated

MODEL = REPOSITORY / "resources" / "mpt-demo"
LIMITS = BuildLimits(max_batch_size=4, max_input_len=32, max_output_len=64)


def make_demo_engine(folder: Path, limits: BuildLimits = LIMITS, tp_size: int = 1) -> Path:
    """The engine directory `folder/engine` in float32. No TensorRT loads its plan."""
    options = ("-i", MODEL, "-o", folder / "ft", "-t", "float32", "-tp", tp_size)
    call_tool("convert_hf_mpt_to_ft.py", *options)
    checkpoint = read_ft_checkpoint(folder / "ft" / f"{tp_size}-gpu")
    return build_for_cpu(checkpoint, folder / "engine", limits)


def build_for_cpu(checkpoint: FtCheckpoint, target: Path, limits: BuildLimits) -> Path:
    """An engine directory whose plan no TensorRT loads, so that it is made in no time."""
    return build_simulated(NetworkInputs(checkpoint, limits, VocabularySharding()), target)
