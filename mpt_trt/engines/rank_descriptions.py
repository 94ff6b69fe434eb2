"""Reads and writes the descriptions of a rank's network and plan, which are made in separate jobs.

`rank{r}.network.json` is next to `rank{r}.onnx` and `weights/`, `rank{r}.engine.json` next to
`rank{r}.engine`. An engine's `config.json` is made from those of all ranks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.engines.file_records import (
    FileRecord,
    hashes_of,
    record_files,
    require_files,
)
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
from mpt_trt.system.files import read_json, write_json
from mpt_trt.system.inner_names import require_inner_name
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import FolderKind, read_mark
from mpt_trt.system.staging import recover
from mpt_trt.system.typed_json import from_json
from mpt_trt.system.verified_files import remember_written

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


NETWORKS = FolderKind(
    "a folder of networks", lambda folder: _described_files(folder, "rank*.network.json")
)


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

    @property
    def network_hash(self) -> str:
        """Content hash of the network, without its weights."""
        return self.files[self.network].hash


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
        "files": record_files(folder, hashes),
    }
    write_json(folder / network_description_name(rank), description)


def write_plan_description(
    engine: Path, content: str, network_hash: str, builder: BuilderInfo
) -> None:
    """Writes `rank{r}.engine.json` next to a plan. content: the plan's content hash."""
    description = {
        "engine": engine.name,
        "files": record_files(engine.parent, {engine.name: content}),
        "network_hash": network_hash,
        "builder": asdict(builder),
    }
    write_json(engine.with_name(f"{engine.name}.json"), description)


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
    return read_network_description(folder, rank).network_hash


def require_whole_network(folder: Path, rank: int, is_trusted: bool = False) -> None:
    """Raises MptTrtError when a file of a rank's network is missing or differs.

    is_trusted: only sizes are compared, not hashes.
    """
    files = read_network_description(folder, rank).files
    description, remedy = folder / network_description_name(rank), _make_networks_again(folder)
    require_files(files, description, remedy, is_trusted)


def require_whole_plan(folder: Path, rank: int, is_trusted: bool) -> None:
    """Raises MptTrtError when a rank's plan is missing or differs.

    is_trusted: only sizes are compared, not hashes.
    """
    plan, description = folder / engine_name(rank), folder / plan_description_name(rank)
    if not plan.is_file():
        raise MptTrtError(f"{plan}: no such file; build it again")
    files = read_plan_description(folder, rank).files
    require_files(files, description, _build_plan_again(folder, rank), is_trusted)


def remember_networks(folder: Path, tp_size: int) -> None:
    """Remembers that the networks of all ranks, just written, match their descriptions."""
    for rank in range(tp_size):
        remember_written(folder, hashes_of(read_network_description(folder, rank).files))


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


def _make_networks_again(folder: Path) -> str:
    return f"delete {folder} and make the networks again"


def _build_plan_again(folder: Path, rank: int) -> str:
    return f"delete {folder / engine_name(rank)} and build it again"
