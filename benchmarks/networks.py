"""Makes networks without plans, for benchmarks of ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

from common import REPOSITORY, make_random_checkpoint, measure, script

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.manifest import Manifest, read_network_manifest
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding


def random_ft_checkpoint(folder: Path, like: str, dtype: str) -> FtCheckpoint:
    """Makes the FT checkpoint of a random model for one rank, once."""
    ft = folder / "ft" / "1-gpu"
    if not ft.exists():
        model_dir = folder / "checkpoint"
        make_random_checkpoint(model_dir, like, dtype)
        options = ("-i", model_dir, "-o", ft.parent, "-t", dtype, "-p", "8")
        measure(script("convert_hf_mpt_to_ft.py", *options))
    return read_ft_checkpoint(ft)


def network_without_plan(
    checkpoint: FtCheckpoint, folder: Path, limits: BuildLimits, calibrated: CalibratedQuantization
) -> Manifest:
    """Makes the network of a single rank in `folder`, and returns its manifest."""
    folder.mkdir(parents=True)
    write_networks(NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated), folder)
    return read_network_manifest(folder)
