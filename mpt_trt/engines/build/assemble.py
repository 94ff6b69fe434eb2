"""Assembles an engine directory from the networks and plans of all ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import mpt_trt
from mpt_trt.engines.file_records import FileRecord
from mpt_trt.engines.manifest import ENGINE, FORMAT, MANIFEST, RankFiles
from mpt_trt.engines.rank_descriptions import (
    COMMON_KEYS,
    NetworkDescription,
    PlanDescription,
    engine_name,
    network_name,
    read_network_description,
    read_plan_description,
    require_whole_network,
    require_whole_plan,
)
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import hard_link, write_json
from mpt_trt.system.replace import replace_directory


def assemble_engine(
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
        require_whole_plan(plans, rank, is_trusted)
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
    if plan.network_hash != network.network_hash:
        raise MptTrtError(
            f"{engine_name(rank)} was built from another network than the {network_name(rank)} "
            "given; build it again"
        )


def _rank_files(network: NetworkDescription, plan: PlanDescription) -> RankFiles:
    return RankFiles(network.network, plan.engine, network.files | plan.files)
