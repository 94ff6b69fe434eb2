"""Reads and writes `config.json` of an engine directory, which describes the engine.

A directory holds, for every rank, `rank{r}.onnx` (the network), `rank{r}.engine` (the TensorRT
plan), and the networks' weights in `weights/`. Everything that loads an engine reads this file
first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mpt_trt
from mpt_trt.engines.spec import BuilderInfo, BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, as_mapping, make_weight_quantization
from mpt_trt.system.files import content_hash, hard_link, read_json, replace_directory, write_json

FORMAT = 3
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
    "vocabulary",
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

    provenance: where the checkpoint came from, as its own manifest records it. calibration: content
    hash of the calibration result, None for an engine that needed none.
    """

    model_name: str
    spec: EngineSpec
    provenance: dict
    calibration: str | None
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


def write_network_description(
    folder: Path,
    rank: int,
    model_name: str,
    spec: EngineSpec,
    provenance: dict,
    calibration: str | None,
    hashes: dict[str, str],
) -> None:
    """Writes `rank{r}.network.json` beside a rank's network.

    provenance, calibration: see `Manifest`. hashes: content hash of each of the network's files, by
    path in the folder.
    """
    description = {
        "model_name": model_name,
        **_spec_content(spec),
        "provenance": provenance,
        "calibration": calibration,
        "network": network_name(rank),
        "files": _records(folder, hashes),
    }
    write_json(folder / network_description_name(rank), description)


def read_network_manifest(folder: Path) -> Manifest:
    """That of a folder with the network of the only rank, and no plan."""
    described = _read_network_description(folder, 0)
    plan = {"engine": engine_name(0), "files": {}}
    builder = {"package": "none", "version": "0", "compute_capabilities": ()}
    return _parse(described | {"builder": builder, "ranks": [asdict(_rank_files(described, plan))]})


def read_network_spec(folder: Path, rank: int = 0) -> EngineSpec:
    """The spec that a rank's network was made for.

    Raises MptTrtError when the network's description is missing or damaged.
    """
    content = _read_network_description(folder, rank)
    try:
        return _parse_spec(content)
    except (KeyError, TypeError) as error:
        raise MptTrtError(
            f"{folder / network_description_name(rank)}: damaged ({error!r}); "
            f"{_make_networks_again(folder)}"
        ) from None


def read_network_hash(folder: Path, rank: int) -> str:
    """The content hash of a rank's network."""
    return _network_hash(_read_network_description(folder, rank))


def require_whole_network(folder: Path, rank: int) -> None:
    """Raises MptTrtError when a file of a rank's network is missing or has another size."""
    description, remedy = _read_network_description(folder, rank), _make_networks_again(folder)
    for name, record in description["files"].items():
        _require_file(folder / name, record["bytes"], network_description_name(rank), remedy)


def _read_network_description(folder: Path, rank: int) -> dict:
    path = folder / network_description_name(rank)
    if folder.is_dir() and not path.is_file():
        raise MptTrtError(f"{path}: no such file; {_make_networks_again(folder)}")
    return read_json(path)


def _make_networks_again(folder: Path) -> str:
    return f"delete {folder} and make the networks again"


def _network_hash(description: dict) -> str:
    return description["files"][description["network"]]["hash"]


def _records(folder: Path, hashes: dict[str, str]) -> dict[str, dict]:
    """A FileRecord, as JSON, of each path in the folder."""
    return {
        name: asdict(FileRecord((folder / name).stat().st_size, content))
        for name, content in hashes.items()
    }


def write_plan_description(
    engine: Path, content: str, network_hash: str, builder: BuilderInfo
) -> None:
    """Writes `rank{r}.engine.json` beside a plan. content: the plan's content hash."""
    description = {
        "engine": engine.name,
        "files": _records(engine.parent, {engine.name: content}),
        "network_hash": network_hash,
        "builder": asdict(builder),
    }
    write_json(engine.with_name(f"{engine.name}.json"), description)


def collect(rank_folders: list[tuple[Path, Path]], target: Path) -> None:
    """Makes an engine directory of hard links from (network folder, plan folder) of each rank.

    Raises MptTrtError when a file is missing or damaged, or the ranks do not belong together.
    """
    for rank, (networks, plans) in enumerate(rank_folders):
        _require_whole_plan(plans, rank)
        require_whole_network(networks, rank)
    with replace_directory(target) as folder:
        for rank, (networks, plans) in enumerate(rank_folders):
            _link_rank(rank, networks, plans, folder)
        write_manifest(folder, rank_folders)


def _require_whole_plan(folder: Path, rank: int) -> None:
    plan, path = folder / engine_name(rank), folder / plan_description_name(rank)
    if not plan.is_file():
        raise MptTrtError(f"{plan}: no such file; build it again")
    remedy = f"delete {plan} and build it again"
    if not path.is_file():
        raise MptTrtError(f"{path}: no such file; {remedy}")
    for name, record in read_json(path)["files"].items():
        _require_file(folder / name, record["bytes"], path.name, remedy)


def _link_rank(rank: int, networks: Path, plans: Path, folder: Path) -> None:
    hard_link(plans / engine_name(rank), folder / engine_name(rank))
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
            f"of format {FORMAT}; {_build_again(engine_dir)}"
        )
    try:
        manifest = _parse(content)
    except (KeyError, TypeError) as error:
        raise MptTrtError(f"{path}: damaged ({error!r}); {_build_again(engine_dir)}") from None
    tp_size = manifest.spec.tp_size
    if len(manifest.ranks) != tp_size:
        raise MptTrtError(
            f"{path}: damaged ({len(manifest.ranks)} ranks, but tp_size = {tp_size}); "
            f"{_build_again(engine_dir)}"
        )
    _check_files(engine_dir, manifest)
    return manifest


def check_content(engine_dir: Path, files: RankFiles, name: str) -> None:
    """Raises MptTrtError when a file of a rank is not the one that was built with the others."""
    if content_hash(engine_dir / name) != files.files[name].hash:
        raise MptTrtError(
            f"{engine_dir / name}: not the file that {MANIFEST} describes, but of another build; "
            f"{_build_again(engine_dir)}"
        )


def _parse(content: dict) -> Manifest:
    builder = content["builder"] | {
        "compute_capabilities": tuple(content["builder"]["compute_capabilities"])
    }
    return Manifest(
        model_name=content["model_name"],
        spec=_parse_spec(content),
        provenance=content["provenance"],
        calibration=content["calibration"],
        builder=BuilderInfo(**builder),
        ranks=tuple(_rank_files(rank, rank) for rank in content["ranks"]),
    )


def _spec_content(spec: EngineSpec) -> dict:
    return {
        "config": asdict(spec.config),
        "dtype": spec.dtype,
        "quantization": as_mapping(spec.scheme),
        "kv_cache": spec.quantization.kv_cache,
        "tp_size": spec.tp_size,
        "limits": asdict(spec.limits),
        "vocabulary": asdict(spec.vocabulary),
    }


def _parse_spec(content: dict) -> EngineSpec:
    scheme = make_weight_quantization(**content["quantization"])
    return EngineSpec(
        config=MptConfig(**content["config"]),
        dtype=content["dtype"],
        tp_size=content["tp_size"],
        limits=BuildLimits(**content["limits"]),
        vocabulary=VocabularySharding(**content["vocabulary"]),
        quantization=Quantization(scheme, content["kv_cache"]),
    )


def _check_files(engine_dir: Path, manifest: Manifest) -> None:
    for name, record in (item for rank in manifest.ranks for item in rank.files.items()):
        _require_file(engine_dir / name, record.bytes, MANIFEST, _build_again(engine_dir))


def _build_again(engine_dir: Path) -> str:
    return f"delete {engine_dir} and build the engine again"


def _require_file(path: Path, size: int, description: str, remedy: str) -> None:
    """Raises MptTrtError when a file does not have the size that its description records."""
    if not path.is_file():
        raise MptTrtError(f"{path}: missing, though {description} names it; {remedy}")
    if (actual := path.stat().st_size) != size:
        raise MptTrtError(f"{path}: has {actual} bytes, but {description} says {size}; {remedy}")
