"""`config.json` of an engine directory: what it is, from what, built by what, for which GPUs.

A directory holds, for every rank, `rank{r}.onnx` (the network), `rank{r}.engine` (the TensorRT
plan), and the networks' weights in `weights/`. Everything that loads an engine reads this file
first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mpt_trt
from mpt_trt.calibration.calibrated_quantization import NOT_QUANTIZED, CalibratedQuantization
from mpt_trt.engines.spec import BuilderInfo, BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank, VocabularySharding
from mpt_trt.network.decoder import build_network
from mpt_trt.network.graph import WEIGHTS_FOLDER
from mpt_trt.network.weight_files import write_weights
from mpt_trt.quantization.schemes import Quantization, as_mapping, make_weight_quantization
from mpt_trt.system.files import content_hash, hard_link, read_json, replace_directory, write_json

FORMAT = 2
MANIFEST = "config.json"
# What all ranks of an engine have in common.
COMMON_KEYS = (
    "model_name",
    "config",
    "dtype",
    "quantization",
    "kv_cache",
    "tp_size",
    "limits",
    "vocabulary_sharding",
    "provenance",
    "calibration",
)


@dataclass(frozen=True)
class FileRecord:
    """Size and content hash of a file."""

    bytes: int
    hash: str


@dataclass(frozen=True)
class RankFiles:
    """One rank's network and plan by name, and every file of the rank by its path in the folder."""

    network: str
    engine: str
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Manifest:
    """The content of `config.json`.

    dtype: type of activations and of what is not quantized. provenance: where the checkpoint came
    from, copied from its own manifest. calibration: hash of the calibration result, or None.
    """

    model_name: str
    config: MptConfig
    dtype: str
    quantization: Quantization
    calibration: str | None
    tp_size: int
    limits: BuildLimits
    vocabulary_sharding: VocabularySharding
    provenance: dict
    builder: BuilderInfo
    ranks: tuple[RankFiles, ...]


def network_name(rank: int) -> str:
    """File name of a rank's network."""
    return f"rank{rank}.onnx"


def engine_name(rank: int) -> str:
    """File name of a rank's plan."""
    return f"rank{rank}.engine"


def network_description_name(rank: int) -> str:
    """File name of the description of a rank's network."""
    return f"rank{rank}.network.json"


def plan_description_name(rank: int) -> str:
    """File name of the description of a rank's plan."""
    return f"rank{rank}.engine.json"


def write_rank_network(
    checkpoint: FtCheckpoint,
    rank: Rank,
    limits: BuildLimits,
    folder: Path,
    vocabulary: VocabularySharding,
    calibrated: CalibratedQuantization = NOT_QUANTIZED,
) -> None:
    """Adds one rank's network to `folder`: the graph, its weights, and a description beside it.

    Raises MptTrtError when the model has learned positions and the limits exceed them.
    """
    config = checkpoint.config
    if config.position_embedding == "learned" and limits.cache_len > config.max_seq_len:
        raise MptTrtError(
            f"max_input_len + max_output_len = {limits.cache_len}, but the model has learned "
            f"positions for {config.max_seq_len} tokens; lower the limits"
        )
    network = build_network(checkpoint, rank, limits.cache_len, vocabulary, calibrated)
    quantization, calibration = calibrated.quantization, calibrated.calibration
    contents = write_weights(network, checkpoint, folder / WEIGHTS_FOLDER)
    graph_path = folder / network_name(rank.index)
    graph_path.write_bytes(network.model.SerializeToString())
    hashes = {f"{WEIGHTS_FOLDER}/{name}": content for name, content in sorted(contents.items())}
    description = {
        "model_name": checkpoint.model_name,
        "config": asdict(config),
        "dtype": checkpoint.storage_type,
        "quantization": as_mapping(quantization.scheme),
        "kv_cache": quantization.kv_cache,
        "tp_size": checkpoint.tp_size,
        "limits": asdict(limits),
        "vocabulary_sharding": asdict(vocabulary),
        "provenance": checkpoint.provenance,
        "calibration": None if calibration is None else content_hash(calibration.path),
        "network": graph_path.name,
        "files": _records(folder, {graph_path.name: content_hash(graph_path)} | hashes),
    }
    write_json(folder / network_description_name(rank.index), description)


def read_network_manifest(folder: Path) -> Manifest:
    """That of a folder with the network of the only rank, and no plan."""
    described = read_json(folder / network_description_name(0))
    plan = {"engine": engine_name(0), "files": {}}
    builder = {"package": "none", "version": "0", "compute_capabilities": ()}
    return _parse(described | {"builder": builder, "ranks": [asdict(_rank_files(described, plan))]})


def read_network_tp_size(folder: Path) -> int:
    """The number of ranks that networks were made for; the first one must be in the folder."""
    return read_json(folder / network_description_name(0))["tp_size"]


def read_network_limits(folder: Path, rank: int) -> BuildLimits:
    """The limits that a rank's network was made for."""
    return BuildLimits(**read_json(folder / network_description_name(rank))["limits"])


def read_network_quantization(folder: Path, rank: int) -> Quantization:
    """How a rank's network is quantized."""
    return _quantization(read_json(folder / network_description_name(rank)))


def _quantization(content: dict) -> Quantization:
    return Quantization(make_weight_quantization(**content["quantization"]), content["kv_cache"])


def read_network_hash(folder: Path, rank: int) -> str:
    """The content hash of a rank's network."""
    return _network_hash(read_json(folder / network_description_name(rank)))


def _network_hash(description: dict) -> str:
    return description["files"][description["network"]]["hash"]


def _records(folder: Path, hashes: dict[str, str]) -> dict[str, dict]:
    """A FileRecord, as JSON, of each path in the folder."""
    return {
        name: asdict(FileRecord((folder / name).stat().st_size, content))
        for name, content in hashes.items()
    }


def write_plan_description(
    engine: Path, content: str, network_hash: str, builder: BuilderInfo, origin: dict
) -> None:
    """Writes `rank{r}.engine.json` beside a plan.

    content: the plan's content hash. origin: JSON that says what it was made from.
    """
    description = {
        "engine": engine.name,
        "files": _records(engine.parent, {engine.name: content}),
        "network_hash": network_hash,
        "builder": asdict(builder),
        "origin": origin,
    }
    write_json(engine.with_name(f"{engine.name}.json"), description)


def is_plan_of(origin: dict, folder: Path, rank: int) -> bool:
    """Whether the folder has the whole plan of a rank, made from what `origin` says."""
    try:
        description = read_json(folder / plan_description_name(rank))
        files = description["files"].items()
        return description["origin"] == origin and all(
            content_hash(folder / name) == record["hash"] for name, record in files
        )
    except (MptTrtError, OSError, KeyError):
        return False


def collect(rank_folders: list[tuple[Path, Path]], target: Path) -> None:
    """Makes an engine directory of hard links from (network folder, engine folder) of each rank.

    Raises MptTrtError when the ranks do not belong together.
    """
    with replace_directory(target) as folder:
        for rank, (networks, engines) in enumerate(rank_folders):
            _link_rank(rank, networks, engines, folder)
        write_manifest(folder, rank_folders)


def _link_rank(rank: int, networks: Path, engines: Path, folder: Path) -> None:
    hard_link(engines / engine_name(rank), folder / engine_name(rank))
    for name in read_json(networks / network_description_name(rank))["files"]:
        if not (folder / name).exists():
            hard_link(networks / name, folder / name)


def write_manifest(folder: Path, rank_folders: list[tuple[Path, Path]]) -> None:
    """Writes `folder/config.json` from the descriptions that lie beside networks and plans."""
    networks = [
        read_json(path / network_description_name(rank))
        for rank, (path, _) in enumerate(rank_folders)
    ]
    plans = [
        read_json(path / plan_description_name(rank)) for rank, (_, path) in enumerate(rank_folders)
    ]
    for rank, (network, plan) in enumerate(zip(networks, plans, strict=True)):
        _require_alike(rank, network | plan, networks[0] | plans[0])
        _require_same_shared_files(rank, network["files"], networks[0]["files"])
        _require_built_from(rank, network, plan)
    if networks[0]["tp_size"] != len(networks):
        raise MptTrtError(f"{len(networks)} ranks given, but {networks[0]['tp_size']} are needed")
    content = {
        "format": FORMAT,
        "mpt_trt_version": mpt_trt.__version__,
        **{key: networks[0][key] for key in COMMON_KEYS},
        "builder": plans[0]["builder"],
        "ranks": [asdict(_rank_files(n, p)) for n, p in zip(networks, plans, strict=True)],
    }
    write_json(folder / MANIFEST, content)


def _require_alike(rank: int, described: dict, first: dict) -> None:
    keys = (*COMMON_KEYS, "builder")
    if differing := [key for key in keys if described[key] != first[key]]:
        raise MptTrtError(
            f"rank {rank} and rank 0 differ in {', '.join(differing)}; build all ranks again"
        )


def _require_same_shared_files(rank: int, files: dict, first: dict) -> None:
    for name in files.keys() & first.keys():
        if files[name] != first[name]:
            raise MptTrtError(
                f"rank {rank} and rank 0 were made from different {name}; build all ranks again"
            )


def _require_built_from(rank: int, network: dict, plan: dict) -> None:
    if plan["network_hash"] != _network_hash(network):
        raise MptTrtError(
            f"{engine_name(rank)} was built from another network than the {network_name(rank)} "
            "given; build it again"
        )


def _rank_files(network: dict, plan: dict) -> RankFiles:
    return RankFiles(
        network=network["network"],
        engine=plan["engine"],
        files={
            name: FileRecord(**record)
            for name, record in (network["files"] | plan["files"]).items()
        },
    )


def read_manifest(engine_dir: Path) -> Manifest:
    """Reads `config.json` and checks that every file it names is there, in its full size.

    Raises MptTrtError, naming the file, when the folder is no engine directory or is incomplete.
    """
    path = engine_dir / MANIFEST
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise MptTrtError(
            f"{path}: format = {content.get('format')!r}: this version reads engine directories "
            f"of format {FORMAT}; build the engine again"
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError) as error:
        raise MptTrtError(f"{path}: damaged ({error!r}); build the engine again") from None
    if len(manifest.ranks) != manifest.tp_size:
        raise MptTrtError(
            f"{path}: damaged ({len(manifest.ranks)} ranks, but tp_size = {manifest.tp_size}); "
            "build the engine again"
        )
    _check_files(engine_dir, manifest)
    return manifest


def check_content(engine_dir: Path, files: RankFiles, name: str) -> None:
    """Raises MptTrtError when a file of a rank is not the one that was built with the others."""
    if content_hash(engine_dir / name) != files.files[name].hash:
        raise MptTrtError(
            f"{engine_dir / name}: not the file that {MANIFEST} describes; it is of another build. "
            "Build the engine again"
        )


def _parse(content: dict) -> Manifest:
    builder = content["builder"] | {
        "compute_capabilities": tuple(content["builder"]["compute_capabilities"])
    }
    return Manifest(
        model_name=content["model_name"],
        dtype=content["dtype"],
        quantization=_quantization(content),
        calibration=content["calibration"],
        tp_size=content["tp_size"],
        provenance=content["provenance"],
        config=MptConfig(**content["config"]),
        limits=BuildLimits(**content["limits"]),
        vocabulary_sharding=VocabularySharding(**content["vocabulary_sharding"]),
        builder=BuilderInfo(**builder),
        ranks=tuple(_rank_files(rank, rank) for rank in content["ranks"]),
    )


def _check_files(engine_dir: Path, manifest: Manifest) -> None:
    for name, record in (item for rank in manifest.ranks for item in rank.files.items()):
        path = engine_dir / name
        if not path.is_file():
            raise MptTrtError(
                f"{path}: missing, though {MANIFEST} names it; build the engine again"
            )
        if (size := path.stat().st_size) != record.bytes:
            raise MptTrtError(
                f"{path}: has {size} bytes, but {MANIFEST} says {record.bytes}; "
                "build the engine again"
            )
