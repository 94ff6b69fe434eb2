"""Reads and writes `config.json` of an engine directory, which describes the engine.

For every rank, a directory contains `rank{r}.onnx` (the network) and `rank{r}.engine` (the TensorRT
plan); `weights/` contains the networks' weights. `config.json` is read before an engine is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mpt_trt
from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.checkpoint.other_folders import describe_folder, hint
from mpt_trt.engines.spec import BuilderInfo, BuildLimits, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import (
    GROUP_SIZES,
    METHODS,
    HeadType,
    KvCacheType,
    Quantization,
    WeightQuantization,
    as_mapping,
    make_weight_quantization,
)
from mpt_trt.system.files import CONTENT_HASH, hard_link, read_json, write_json
from mpt_trt.system.inner_names import inner_path, require_inner_name
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import FolderKind, read_mark, recover, replace_directory
from mpt_trt.system.typed_json import from_json
from mpt_trt.system.verified_files import remember_written, require_recorded

FORMAT = 3
MANIFEST = "config.json"
BUILDERS = ("tensorrt", "tensorrt_rtx", "none")
# Keys that are the same for all ranks of an engine.
COMMON_KEYS = (
    "model_name",
    "config",
    "dtype",
    "quantization",
    "kv_cache",
    "head",
    "tp_size",
    "limits",
    "vocabulary",
    "provenance",
    "end_ids",
    "ignored_end_ids",
    "calibration",
)


def _described_files(folder: Path, pattern: str) -> set[str] | None:
    """Lists the descriptions in a folder and the files that they name."""
    descriptions = {path.name: read_mark(path).get("files") for path in folder.glob(pattern)}
    listed = [files for files in descriptions.values() if isinstance(files, dict)]
    return {*descriptions, *(name for files in listed for name in files)} if listed else None


def _engine_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / MANIFEST)
    ranks = content.get("ranks")
    if not isinstance(content.get("format"), int) or not isinstance(ranks, list):
        return None
    listed = [rank["files"] for rank in ranks if isinstance(rank, dict) and "files" in rank]
    return {MANIFEST, *(name for files in listed if isinstance(files, dict) for name in files)}


NETWORKS = FolderKind(
    "a folder of networks", lambda folder: _described_files(folder, "rank*.network.json")
)
ENGINE = FolderKind("an engine directory", _engine_files)


@dataclass(frozen=True)
class FileRecord:
    """Size and content hash of a file."""

    bytes: int
    hash: str

    def __post_init__(self) -> None:
        if self.bytes < 0:
            raise ValueError(f"bytes = {self.bytes}: at least 0 is expected")
        if not CONTENT_HASH.fullmatch(self.hash):
            raise ValueError(f"hash = {shown(self.hash)}: xxh3: and 32 hexadecimal digits expected")


@dataclass(frozen=True)
class RankFiles:
    """Names of a rank's network and plan, and all files of the rank by path in the folder."""

    network: str
    engine: str
    files: dict[str, FileRecord]

    def __post_init__(self) -> None:
        for name in (self.network, self.engine, *self.files):
            require_inner_name(name)

    @property
    def network_files(self) -> list[str]:
        """The network and its weights."""
        return [name for name in self.files if name != self.engine]


@dataclass(frozen=True)
class Common:
    """Fields that descriptions of networks and of engines share; see COMMON_KEYS."""

    model_name: str
    config: MptConfig
    dtype: str
    quantization: dict[str, Any]
    kv_cache: KvCacheType
    tp_size: int
    limits: BuildLimits
    vocabulary: VocabularySharding
    provenance: dict[str, Any]
    calibration: str | None
    # Older descriptions have only the architecture's end token.
    end_ids: tuple[int, ...] | None = field(default=None, kw_only=True)
    head: HeadType = field(default="auto", kw_only=True)
    ignored_end_ids: dict[str, tuple[int, ...]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        if any(token not in range(self.config.vocab_size) for token in self.end_ids or ()):
            raise ValueError(f"end_ids = {shown(self.end_ids)}: ids of the vocabulary are expected")
        if self.dtype not in STORAGE_TYPES:
            raise ValueError(f"dtype = {shown(self.dtype)}: unknown")

    @property
    def all_end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        single = self.config.eos_token_id
        return (() if single is None else (single,)) if self.end_ids is None else self.end_ids

    def spec(self) -> EngineSpec:
        """Spec of the engine; raises ValueError when the sizes are inconsistent."""
        return EngineSpec(
            config=self.config,
            dtype=self.dtype,
            tp_size=self.tp_size,
            limits=self.limits,
            vocabulary=self.vocabulary,
            quantization=Quantization(_scheme(self.quantization), self.kv_cache, self.head),
        )


@dataclass(frozen=True)
class NetworkDescription(Common):
    """The content of `rank{r}.network.json`."""

    network: str
    files: dict[str, FileRecord]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.network, *self.files):
            require_inner_name(name)
        if self.network not in self.files:
            raise ValueError(f"files.{self.network} is missing")


@dataclass(frozen=True)
class PlanDescription:
    """The content of `rank{r}.engine.json`."""

    engine: str
    files: dict[str, FileRecord]
    network_hash: str
    builder: BuilderInfo

    def __post_init__(self) -> None:
        for name in (self.engine, *self.files):
            require_inner_name(name)
        if self.engine not in self.files:
            raise ValueError(f"files.{self.engine} is missing")


@dataclass(frozen=True)
class EngineDescription(Common):
    """The content of `config.json`."""

    builder: BuilderInfo
    ranks: tuple[RankFiles, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.builder.package not in BUILDERS:
            raise ValueError(f"builder.package = {shown(self.builder.package)}: unknown")
        if len(self.ranks) != self.tp_size:
            raise ValueError(f"{len(self.ranks)} ranks, but tp_size = {self.tp_size}")

    def manifest(self) -> Manifest:
        """Makes the manifest; raises ValueError when the sizes are inconsistent."""
        return Manifest(
            self.model_name,
            self.spec(),
            self.provenance,
            self.all_end_ids,
            self.calibration,
            self.builder,
            self.ranks,
            self.ignored_end_ids,
        )


@dataclass(frozen=True)
class Manifest:
    """The content of `config.json`.

    provenance: origin of the checkpoint, from its own manifest. end_ids: tokens that end a text.
    calibration: content hash of the calibration result; None for an engine without one.
    ignored_end_ids: other end tokens, by the file of the checkpoint that names them.
    """

    model_name: str
    spec: EngineSpec
    provenance: dict
    end_ids: tuple[int, ...]
    calibration: str | None
    builder: BuilderInfo
    ranks: tuple[RankFiles, ...]
    ignored_end_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)


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
    end_ids: tuple[int, ...],
    ignored_end_ids: dict[str, tuple[int, ...]],
    calibration: str | None,
    hashes: dict[str, str],
) -> None:
    """Writes `rank{r}.network.json` next to a rank's network.

    provenance, end_ids, ignored_end_ids, calibration: see `Manifest`. hashes: content hash of each
    of the network's files, by path in the folder.
    """
    description = {
        "model_name": model_name,
        **_spec_content(spec),
        "provenance": provenance,
        "end_ids": list(end_ids),
        "ignored_end_ids": ignored_end_ids,
        "calibration": calibration,
        "network": network_name(rank),
        "files": _records(folder, hashes),
    }
    write_json(folder / network_description_name(rank), description)


def read_network_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder with the network of a single rank and no plan."""
    network = read_network_description(folder, 0)
    files = RankFiles(network.network, engine_name(0), network.files)
    return Manifest(
        network.model_name,
        network.spec(),
        network.provenance,
        network.all_end_ids,
        network.calibration,
        BuilderInfo("none", "0", ()),
        (files,),
        network.ignored_end_ids,
    )


def read_network_description(folder: Path, rank: int) -> NetworkDescription:
    """Reads and checks `rank{r}.network.json`; raises MptTrtError when it is missing or damaged."""
    path = folder / network_description_name(rank)
    if folder.is_dir() and not path.is_file():
        raise MptTrtError(f"{path}: no such file; {_make_networks_again(folder)}")
    content = read_json(path)
    try:
        description = from_json(NetworkDescription, content)
        description.spec()
    except ValueError as error:
        raise MptTrtError(f"{path}: damaged ({error}); {_make_networks_again(folder)}") from None
    return description


def read_plan_description(folder: Path, rank: int) -> PlanDescription:
    """Reads and checks `rank{r}.engine.json`; raises MptTrtError when it is missing or damaged."""
    path = folder / plan_description_name(rank)
    if not path.is_file():
        raise MptTrtError(f"{path}: no such file; {_build_plan_again(folder, rank)}")
    content = read_json(path)
    try:
        return from_json(PlanDescription, content)
    except ValueError as error:
        raise MptTrtError(f"{path}: damaged ({error}); {_build_plan_again(folder, rank)}") from None


def read_network_spec(folder: Path, rank: int = 0) -> EngineSpec:
    """Reads the spec of a rank's network.

    Raises MptTrtError when the network's description is missing or damaged.
    """
    recover(folder)
    return read_network_description(folder, rank).spec()


def read_network_hash(folder: Path, rank: int) -> str:
    """Content hash of a rank's network."""
    return _network_hash(read_network_description(folder, rank))


def _network_hash(description: NetworkDescription) -> str:
    return description.files[description.network].hash


def require_whole_network(folder: Path, rank: int, is_trusted: bool = False) -> None:
    """Raises MptTrtError when a file of a rank's network is missing or differs.

    is_trusted: only sizes are compared, not hashes.
    """
    files = read_network_description(folder, rank).files
    description, remedy = folder / network_description_name(rank), _make_networks_again(folder)
    _require_files(files, description, remedy, is_trusted)


def _require_whole_plan(folder: Path, rank: int, is_trusted: bool) -> None:
    plan, description = folder / engine_name(rank), folder / plan_description_name(rank)
    if not plan.is_file():
        raise MptTrtError(f"{plan}: no such file; build it again")
    files = read_plan_description(folder, rank).files
    _require_files(files, description, _build_plan_again(folder, rank), is_trusted)


def _require_files(
    files: dict[str, FileRecord], description: Path, remedy: str, is_trusted: bool
) -> None:
    for name, record in files.items():
        _require_file(name, record.bytes, description, remedy)
    if not is_trusted:
        require_recorded(description.parent, _hashes(files), description, remedy)


def _make_networks_again(folder: Path) -> str:
    return f"delete {folder} and make the networks again"


def _build_plan_again(folder: Path, rank: int) -> str:
    return f"delete {folder / engine_name(rank)} and build it again"


def _build_again(engine_dir: Path) -> str:
    return f"delete {engine_dir} and build the engine again"


def remember_networks(folder: Path, tp_size: int) -> None:
    """Remembers that the networks of all ranks, just written, match their descriptions."""
    for rank in range(tp_size):
        remember_written(folder, _hashes(read_network_description(folder, rank).files))


def remember_engine(engine_dir: Path) -> None:
    """Remembers that an engine directory, just written, matches its manifest."""
    for rank in read_manifest(engine_dir).ranks:
        remember_written(engine_dir, _hashes(rank.files))


def _hashes(files: Mapping[str, FileRecord]) -> dict[str, str]:
    return {name: record.hash for name, record in files.items()}


def _records(folder: Path, hashes: dict[str, str]) -> dict[str, dict]:
    """Makes a FileRecord, as JSON, for each path in the folder."""
    return {
        name: asdict(FileRecord((folder / name).stat().st_size, content))
        for name, content in hashes.items()
    }


def write_plan_description(
    engine: Path, content: str, network_hash: str, builder: BuilderInfo
) -> None:
    """Writes `rank{r}.engine.json` next to a plan. content: the plan's content hash."""
    description = {
        "engine": engine.name,
        "files": _records(engine.parent, {engine.name: content}),
        "network_hash": network_hash,
        "builder": asdict(builder),
    }
    write_json(engine.with_name(f"{engine.name}.json"), description)


def collect(
    rank_folders: list[tuple[Path, Path]],
    target: Path,
    is_trusted: bool = False,
    force: bool = False,
) -> None:
    """Makes an engine directory of hard links from (network folder, plan folder) of each rank.

    is_trusted: files are not compared with the recorded hashes. force: see `require_replaceable`.

    Raises MptTrtError when a file is missing or damaged, or the ranks do not belong together.
    """
    for rank, (networks, plans) in enumerate(rank_folders):
        _require_whole_plan(plans, rank, is_trusted)
        require_whole_network(networks, rank, is_trusted)
    inputs = {folder for folders in rank_folders for folder in folders}
    with replace_directory(target, ENGINE, inputs, force) as folder:
        for rank, (networks, plans) in enumerate(rank_folders):
            _link_rank(rank, networks, plans, folder)
        write_manifest(folder, rank_folders)


def _link_rank(rank: int, networks: Path, plans: Path, folder: Path) -> None:
    hard_link(plans / engine_name(rank), folder / engine_name(rank))
    for name in read_network_description(networks, rank).files:
        if not (folder / name).exists():
            hard_link(networks / name, folder / name)


def write_manifest(folder: Path, rank_folders: list[tuple[Path, Path]]) -> None:
    """Writes `folder/config.json` from the descriptions of networks and plans."""
    networks = [read_network_description(path, rank) for rank, (path, _) in enumerate(rank_folders)]
    plans = [read_plan_description(path, rank) for rank, (_, path) in enumerate(rank_folders)]
    for rank, (network, plan) in enumerate(zip(networks, plans, strict=True)):
        _require_alike(rank, (network, plan), (networks[0], plans[0]))
        _require_same_shared_files(rank, network.files, networks[0].files)
        _require_built_from(rank, network, plan)
    if networks[0].tp_size != len(networks):
        raise MptTrtError(f"{len(networks)} ranks given, but {networks[0].tp_size} are needed")
    common = asdict(networks[0])
    content = {
        "format": FORMAT,
        "mpt_trt_version": mpt_trt.__version__,
        **{key: common[key] for key in COMMON_KEYS},
        "builder": asdict(plans[0].builder),
        "ranks": [asdict(_rank_files(n, p)) for n, p in zip(networks, plans, strict=True)],
    }
    write_json(folder / MANIFEST, content)


def _require_alike(
    rank: int,
    described: tuple[NetworkDescription, PlanDescription],
    first: tuple[NetworkDescription, PlanDescription],
) -> None:
    differing = [key for key in COMMON_KEYS if getattr(described[0], key) != getattr(first[0], key)]
    differing += ["builder"] * (described[1].builder != first[1].builder)
    if differing:
        raise MptTrtError(
            f"rank {rank} and rank 0 differ in {', '.join(differing)}; build all ranks again"
        )


def _require_same_shared_files(
    rank: int, files: dict[str, FileRecord], first: dict[str, FileRecord]
) -> None:
    for name in files.keys() & first.keys():
        if files[name] != first[name]:
            raise MptTrtError(
                f"rank {rank} and rank 0 were made from different {name}; build all ranks again"
            )


def _require_built_from(rank: int, network: NetworkDescription, plan: PlanDescription) -> None:
    if plan.network_hash != _network_hash(network):
        raise MptTrtError(
            f"{engine_name(rank)} was built from another network than the {network_name(rank)} "
            "given; build it again"
        )


def _rank_files(network: NetworkDescription, plan: PlanDescription) -> RankFiles:
    return RankFiles(network.network, plan.engine, network.files | plan.files)


def read_manifest(engine_dir: Path) -> Manifest:
    """Reads `config.json` and checks that every file it names exists and has its full size.

    Raises MptTrtError, naming the file, when the folder is not an engine directory or is
    incomplete.
    """
    recover(engine_dir)
    if not engine_dir.is_dir():
        problem = "not a folder" if engine_dir.exists() else "no such folder"
        raise MptTrtError(f"{problem}: {engine_dir}; give an engine directory")
    path = engine_dir / MANIFEST
    if not path.exists():
        raise MptTrtError(f"{path}: no such file{hint(engine_dir)}")
    content = read_json(path)
    if "ranks" not in content and (kind := describe_folder(engine_dir)):
        raise MptTrtError(f"{engine_dir}: not an engine directory, but {kind}")
    if content.get("format") != FORMAT:
        raise MptTrtError(
            f"{path}: format = {shown(content.get('format'))}: this version reads engine "
            f"directories of format {FORMAT}; {_build_again(engine_dir)}"
        )
    try:
        manifest = from_json(EngineDescription, content).manifest()
        for rank in manifest.ranks:
            _require_named(rank)
    except ValueError as error:
        raise MptTrtError(f"{path}: damaged ({error}); {_build_again(engine_dir)}") from None
    _check_files(engine_dir, manifest)
    return manifest


def _require_named(rank: RankFiles) -> None:
    for name in (rank.network, rank.engine):
        if name not in rank.files:
            raise ValueError(f"files.{name} is missing")


def check_content(engine_dir: Path, files: RankFiles, *names: str) -> None:
    """Raises MptTrtError when the content of a rank's file differs from the recorded hash."""
    hashes = {name: files.files[name].hash for name in names}
    require_recorded(engine_dir, hashes, engine_dir / MANIFEST, _build_again(engine_dir))


def _scheme(content: dict[str, Any]) -> WeightQuantization | None:
    """Makes the scheme; raises ValueError when `quantization` cannot come from `as_mapping`."""
    method = content.get("method")
    if method == "none":
        return None
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"quantization.method = {shown(method)}: unknown")
    options = {key: value for key, value in content.items() if key != "method"}
    made = make_weight_quantization(method, **options)
    scheme = from_json(type(made), asdict(made), "quantization") if made else None
    size = getattr(scheme, "group_size", None)
    if size is not None and size not in GROUP_SIZES:
        raise ValueError(f"quantization.group_size = {size}: one of {GROUP_SIZES} is expected")
    return scheme


def _spec_content(spec: EngineSpec) -> dict:
    return {
        "config": asdict(spec.config),
        "dtype": spec.dtype,
        "quantization": as_mapping(spec.scheme),
        "kv_cache": spec.quantization.kv_cache,
        "head": spec.quantization.head,
        "tp_size": spec.tp_size,
        "limits": asdict(spec.limits),
        "vocabulary": asdict(spec.vocabulary),
    }


def _check_files(engine_dir: Path, manifest: Manifest) -> None:
    for name, record in (item for rank in manifest.ranks for item in rank.files.items()):
        _require_file(name, record.bytes, engine_dir / MANIFEST, _build_again(engine_dir))


def _require_file(name: str, size: int, description: Path, remedy: str) -> None:
    """Raises MptTrtError when a file does not have the size that its description records."""
    path = inner_path(description.parent, name, description)
    if not path.is_file():
        raise MptTrtError(f"{path}: missing, though {description.name} names it; {remedy}")
    if (actual := path.stat().st_size) != size:
        raise MptTrtError(
            f"{path}: has {actual} bytes, but {description.name} records {size}; {remedy}"
        )
