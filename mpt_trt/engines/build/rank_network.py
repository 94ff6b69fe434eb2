"""Makes the networks of an engine's ranks from an FT checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.rank_descriptions import (
    NETWORKS,
    network_name,
    remember_networks,
    write_network_description,
)
from mpt_trt.engines.spec import BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.sharding import Rank, VocabularySharding, all_ranks
from mpt_trt.network.decoder import build_network
from mpt_trt.network.graph import WEIGHTS_FOLDER
from mpt_trt.network.weight_files import write_weights
from mpt_trt.system.files import content_hash, hard_link
from mpt_trt.system.progress_lines import Advance, no_progress
from mpt_trt.system.replace import replace_directory


@dataclass(frozen=True)
class NetworkInputs:
    """Inputs of an engine's networks.

    Raises MptTrtError when the limits exceed the model's positions.
    """

    checkpoint: FtCheckpoint
    limits: BuildLimits
    vocabulary: VocabularySharding
    calibrated: CalibratedQuantization = NOT_QUANTIZED

    def __post_init__(self) -> None:
        config, cache_len = self.checkpoint.config, self.limits.cache_len
        if config.max_positions is not None and cache_len > config.max_positions:
            kind = "learned positions" if config.position_embedding == "learned" else "positions"
            raise MptTrtError(
                f"max_input_len + max_output_len = {cache_len}, but the model has {kind} for "
                f"{config.max_positions} tokens; lower the limits"
            )

    @property
    def paths(self) -> list[Path]:
        """Files and folders that the networks are made from."""
        calibration = self.calibrated.calibration
        return [self.checkpoint.folder, *([calibration.path] if calibration else [])]

    @property
    def spec(self) -> EngineSpec:
        """Spec of the engine."""
        return EngineSpec(
            self.checkpoint.config,
            self.checkpoint.storage_type,
            self.checkpoint.tp_size,
            self.limits,
            self.vocabulary,
            self.calibrated.quantization,
        )


def make_networks(
    inputs: NetworkInputs, target: Path, force: bool = False, advance: Advance = no_progress
) -> None:
    """Makes the folder `target` with the networks of all ranks and their descriptions.

    force: see `require_replaceable`. advance: counts the bytes of all ranks' weights.
    """
    with replace_directory(target, NETWORKS, inputs.paths, force) as folder:
        write_networks(inputs, folder, advance)
    remember_networks(target, inputs.checkpoint.tp_size)


def write_networks(inputs: NetworkInputs, folder: Path, advance: Advance = no_progress) -> None:
    """Adds the networks of all ranks to `folder`."""
    for rank in all_ranks(inputs.checkpoint.tp_size):
        write_rank_network(inputs, rank, folder, advance)


def write_rank_network(
    inputs: NetworkInputs, rank: Rank, folder: Path, advance: Advance = no_progress
) -> None:
    """Adds one rank's network to `folder`: graph, weights, tokenizer, and a description."""
    checkpoint, calibration = inputs.checkpoint, inputs.calibrated.calibration
    network = build_network(
        checkpoint, rank, inputs.limits.cache_len, inputs.vocabulary, inputs.calibrated
    )
    weights = write_weights(network, checkpoint, folder / WEIGHTS_FOLDER, advance)
    graph = folder / network_name(rank.index)
    graph.write_bytes(network.model.SerializeToString())
    tokenizer = checkpoint.tokenizer_files
    for name in tokenizer:
        if not (folder / name).exists():
            hard_link(checkpoint.folder / name, folder / name)
    weight_hashes = {f"{WEIGHTS_FOLDER}/{name}": known for name, known in sorted(weights.items())}
    write_network_description(
        folder,
        rank.index,
        checkpoint.model_name,
        inputs.spec,
        provenance=checkpoint.provenance,
        end_ids=checkpoint.end_ids,
        ignored_end_ids=checkpoint.ignored_end_ids,
        calibration=None if calibration is None else content_hash(calibration.path),
        hashes={graph.name: content_hash(graph)} | weight_hashes | checkpoint.hashes(tokenizer),
    )
