"""Readers of files that others may have written, on mutations of good files and on past failures.

Each input is accepted, or ends in MptTrtError and no other exception. `make fuzz` tests more:
MPT_TRT_FUZZ is the number of inputs for each reader.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mpt_trt.calibration.npz_file import NpzFile
from mpt_trt.checkpoint.files import weight_files
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.pickled import PickleShard
from mpt_trt.checkpoint.tensors import SafetensorsShard
from mpt_trt.engines.manifest import read_manifest, read_network_description
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.network.external_files import read_network
from support.built import Built

EXAMPLES = int(os.environ.get("MPT_TRT_FUZZ", "100"))
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0.5,
    10**18,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "/etc/passwd",
    "\ud800",
    "a\0b",
    [],
    [[]],
    {},
    {"a": {}},
]


@dataclass(frozen=True)
class Reader:
    """read: of a folder. file: in it, the one that is changed."""

    read: Callable[[Path], object]
    folder: Path
    file: str


def read_npz(folder: Path) -> None:
    file = NpzFile(folder / "x.npz")
    for key in file.keys:
        file.shape(key)
        list(file.rows(key, 2))
        file.floats(key)


def read_shard(shard: SafetensorsShard | PickleShard) -> None:
    for name in shard.names():
        shard.require_values(name)
        shard.shape(name)
        shard.tensor(name)


@pytest.fixture(scope="module")
def good(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    """Readers by name, each with a good folder that may be changed."""
    top = tmp_path_factory.mktemp("fuzz")
    for name in ("hf", "ft", "engine"):
        shutil.copytree(getattr(built, name), top / name)
    other = top / "other"
    other.mkdir()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez_compressed(other / "x.npz", m=values, n=values.astype(np.float16))
    (other / "x.safetensors").write_bytes(save({"m": values, "n": values}))
    torch.save({"m": torch.ones(2, 3), "n": torch.ones(2).bfloat16()}, other / "x.bin")
    shards = {"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(shards))
    described = json.loads((top / "engine" / "config.json").read_text())
    network = {**described, **described.pop("ranks")[0]}
    (other / "rank0.network.json").write_text(json.dumps(network))
    return {
        "config.json": Reader(read_hf_config, top / "hf", "config.json"),
        "config.ini": Reader(read_ft_checkpoint, top / "ft", "config.ini"),
        "manifest.json": Reader(read_ft_checkpoint, top / "ft", "manifest.json"),
        "engine": Reader(read_manifest, top / "engine", "config.json"),
        "network": Reader(
            lambda folder: read_network_description(folder, 0), other, "rank0.network.json"
        ),
        "index": Reader(weight_files, other, "model.safetensors.index.json"),
        "onnx": Reader(lambda f: read_network(f / "rank0.onnx"), top / "engine", "rank0.onnx"),
        "npz": Reader(read_npz, other, "x.npz"),
        "safetensors": Reader(
            lambda f: read_shard(SafetensorsShard(f / "x.safetensors")), other, "x.safetensors"
        ),
        "bin": Reader(lambda f: read_shard(PickleShard(f / "x.bin")), other, "x.bin"),
    }


def require_sentence(reader: Reader, content: bytes) -> None:
    path = reader.folder / reader.file
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        reader.read(reader.folder)
    except MptTrtError as error:
        assert len(str(error)) < 3000
    finally:
        path.write_bytes(before)


FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ALL = ("config.json", "config.ini", "manifest.json", "engine", "network", "index", "onnx")
ALL += ("npz", "safetensors", "bin")
JSON = ("config.json", "manifest.json", "engine", "network", "index")


@pytest.mark.parametrize("name", ALL)
@FUZZ
@given(
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), max_size=3
    )
)
@example(edits=[(0.0, 1 << 40, b"[" * 100_000)])
@example(edits=[(0.0, 1 << 40, b"")])
def test_bytes_replaced(good: dict[str, Reader], name: str, edits: list) -> None:
    """Each edit: place, as a share of the file, bytes that go, bytes that come."""
    content = (good[name].folder / good[name].file).read_bytes()
    for share, gone, new in edits:
        place = int(share * len(content))
        content = content[:place] + new + content[place + gone :]
    require_sentence(good[name], content)


@pytest.mark.parametrize("name", JSON)
@FUZZ
@given(steps=st.lists(st.integers(0, 30), max_size=6), value=st.sampled_from(STRANGE))
def test_values_replaced(
    good: dict[str, Reader], name: str, steps: list[int], value: object
) -> None:
    """Some value, that one reaches by `steps` from the top, becomes a strange one."""
    content = json.loads((good[name].folder / good[name].file).read_text())
    parent, key, node = {"top": content}, "top", content
    for step in steps:
        if not isinstance(node, dict | list) or not node:
            break
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[step % len(keys)]
        node = parent[key]
    parent[key] = value
    require_sentence(good[name], json.dumps(content).encode())
