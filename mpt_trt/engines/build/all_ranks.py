"""The plans of all ranks of an engine, in one folder.

Each is built in a folder of its own first. What is finished there outlasts a failure or an
interruption, and the next run takes it over if it is of the same origin.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from mpt_trt.engines import manifest
from mpt_trt.engines.build.build import build_rank, plan_origin
from mpt_trt.engines.build.parallel import build_side_by_side
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.system.files import hard_link, replace_directory


def unfinished_folder(target: Path) -> Path:
    """Where the plans of the folder `target` lie, by rank, until all of them are finished."""
    return target.with_name(f".{target.name}.unfinished")


def build_all_plans(networks: Path, builder: BuilderChoice, at_once: int, target: Path) -> None:
    """Makes the folder `target` with the plans of all ranks, building `at_once` at a time.

    Raises MptTrtError when a rank cannot be built.
    """
    ranks = range(manifest.read_network_spec(networks).tp_size)
    folders = {rank: unfinished_folder(target) / f"rank{rank}" for rank in ranks}
    waiting = {
        rank: folder
        for rank, folder in folders.items()
        if not manifest.is_plan_of(plan_origin(networks, rank, builder), folder, rank)
    }
    if kept := folders.keys() - waiting.keys():
        logging.info("Finished by an earlier run: the plans of ranks %s", sorted(kept))
    if at_once == 1 or len(waiting) == 1:
        for rank, folder in waiting.items():
            build_rank(networks, rank, builder, folder)
    else:
        build_side_by_side(networks, builder, waiting, at_once)
    _put_together(list(folders.values()), target)
    shutil.rmtree(unfinished_folder(target))


def _put_together(folders: list[Path], target: Path) -> None:
    with replace_directory(target) as together:
        for path in (path for folder in folders for path in folder.iterdir()):
            hard_link(path, together / path.name)
