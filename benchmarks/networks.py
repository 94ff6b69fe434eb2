"""Makes networks without plans, for benchmarks of ONNX Runtime."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from common import REPOSITORY, make_random_checkpoint, measure, script

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.build.rank_network import NetworkInputs, write_networks
from mpt_trt.engines.manifest import Manifest, RankFiles, read_network_manifest
from mpt_trt.engines.rank_descriptions import engine_name, read_network_description
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.ft.checkpoint import FtCheckpoint, read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding


def random_ft_checkpoint(folder: Path, like: str, dtype: str) -> FtCheckpoint:
    """Makes the FT checkpoint of a random model for one rank, once."""
    return random_checkpoint_of_ranks(folder, like, dtype, 1)


def random_checkpoint_of_ranks(folder: Path, like: str, dtype: str, tp_size: int) -> FtCheckpoint:
    """Makes the FT checkpoint of a random model, once; the model is the same for all numbers."""
    model_dir = folder / f"{like}-{dtype}"
    ft = folder / f"ft-{like}-{dtype}" / f"{tp_size}-gpu"
    if not ft.exists():
        if not model_dir.exists():
            make_random_checkpoint(model_dir, like, dtype)
        options = ("-i", model_dir, "-o", ft.parent, "-t", dtype, "-p", "8", "-tp", str(tp_size))
        measure(script("convert_hf_mpt_to_ft.py", *options))
    return read_ft_checkpoint(ft)


def manifest_without_plans(folder: Path, tp_size: int) -> Manifest:
    """Reads the manifest of a folder with the networks of all ranks and no plans."""
    described = [read_network_description(folder, rank) for rank in range(tp_size)]
    files = (
        RankFiles(each.network, engine_name(rank), each.files)
        for rank, each in enumerate(described)
    )
    return replace(read_network_manifest(folder), ranks=tuple(files))


def network_without_plan(
    checkpoint: FtCheckpoint, folder: Path, limits: BuildLimits, calibrated: CalibratedQuantization
) -> Manifest:
    """Makes the network of a single rank in `folder`, and returns its manifest."""
    folder.mkdir(parents=True)
    write_networks(NetworkInputs(checkpoint, limits, VocabularySharding(), calibrated), folder)
    return read_network_manifest(folder)
