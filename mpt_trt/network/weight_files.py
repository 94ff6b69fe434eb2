"""Writes the files of a network's weights, or links them from the FT checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.network.decoder import Network
from mpt_trt.network.linear import NETWORK_WORKERS
from mpt_trt.system.files import ContentHash, hard_link, start_writing, write_in_pieces
from mpt_trt.system.progress_lines import Advance, no_progress


def write_weights(
    network: Network, checkpoint: FtCheckpoint, folder: Path, advance: Advance = no_progress
) -> dict[str, str]:
    """Adds the network's weights to `folder`; returns the content hash of each file by name.

    Files that another rank has linked are kept. advance: counts the bytes of each file.
    """
    folder.mkdir(exist_ok=True)
    linked = {name: content for name, content in network.files.items() if isinstance(content, Path)}
    computed = {
        name: content for name, content in network.files.items() if not isinstance(content, Path)
    }
    for name, source in linked.items():
        if not (folder / name).exists():
            hard_link(source, folder / name)
        advance(source.stat().st_size)
    with ThreadPoolExecutor(min(NETWORK_WORKERS, os.cpu_count() or 1)) as pool:
        written = {
            name: pool.submit(_write, folder / name, pieces, advance)
            for name, pieces in computed.items()
        }
    return checkpoint.hashes(sorted(linked)) | {name: job.result() for name, job in written.items()}


def _write(path: Path, pieces: Callable[[], Iterator[NDArray]], advance: Advance) -> str:
    digest = ContentHash()
    with path.open("wb") as stream:
        for piece in pieces():
            content = piece.reshape(-1).view(np.uint8)
            write_in_pieces(stream, content)
            digest.update(content)
            advance(content.nbytes)
        start_writing(stream)
    return str(digest)
