"""Reads `config.json` of an engine directory, which describes the engine.

For every rank, a directory contains `rank{r}.onnx` (the network) and `rank{r}.engine` (the TensorRT
plan); `weights/` contains the networks' weights. `config.json` is read before an engine is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mpt_trt.checkpoint.other_folders import describe_folder, hint
from mpt_trt.engines.file_records import FileRecord, hashes_of, require_file
from mpt_trt.engines.rank_descriptions import Common, engine_name, read_network_description
from mpt_trt.engines.spec import TENSORRT_RTX, BuilderInfo, EngineSpec
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.inner_names import require_inner_name
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import FolderKind, read_mark
from mpt_trt.system.staging import recover
from mpt_trt.system.typed_json import from_json
from mpt_trt.system.verified_files import remember_written, require_recorded

FORMAT = 3
MANIFEST = "config.json"
BUILDERS = ("tensorrt", TENSORRT_RTX, "none")


def _engine_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / MANIFEST)
    ranks = content.get("ranks")
    if not isinstance(content.get("format"), int) or not isinstance(ranks, list):
        return None
    listed = [rank["files"] for rank in ranks if isinstance(rank, dict) and "files" in rank]
    return {MANIFEST, *(name for files in listed if isinstance(files, dict) for name in files)}


ENGINE = FolderKind("an engine directory", _engine_files)


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
        raise MptTrtError(f"{path}: no such file{hint(engine_dir) or '; give an engine directory'}")
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


def _check_files(engine_dir: Path, manifest: Manifest) -> None:
    for name, record in (item for rank in manifest.ranks for item in rank.files.items()):
        require_file(name, record.bytes, engine_dir / MANIFEST, _build_again(engine_dir))


def _build_again(engine_dir: Path) -> str:
    return f"delete {engine_dir} and build the engine again"


def check_content(engine_dir: Path, files: RankFiles, *names: str) -> None:
    """Raises MptTrtError when the content of a rank's file differs from the recorded hash."""
    hashes = {name: files.files[name].hash for name in names}
    require_recorded(engine_dir, hashes, engine_dir / MANIFEST, _build_again(engine_dir))


def remember_engine(engine_dir: Path) -> None:
    """Remembers that an engine directory, just written, matches its manifest."""
    for rank in read_manifest(engine_dir).ranks:
        remember_written(engine_dir, hashes_of(rank.files))


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
