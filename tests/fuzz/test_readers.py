"""Readers of files that others may have written, on mutations of good files and on past failures.

Each input is accepted, or ends in MptTrtError: in no other exception. `make fuzz` tries more:
MPT_TRT_FUZZ is the number of inputs for each reader and kind of mutation. `corpus` has a folder per
format with contents that a reader once failed on, or is likely to.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from mpt_trt.calibration.npz_file import NpzFile
from mpt_trt.calibration.result import read_calibration
from mpt_trt.checkpoint.chat import read_conversations
from mpt_trt.checkpoint.files import weight_files
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.pickled import PickleFile
from mpt_trt.checkpoint.snapshot import recorded_provenance
from mpt_trt.checkpoint.special_tokens import read_special_tokens
from mpt_trt.checkpoint.tensors import SafetensorsFile
from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.cli.prompts import read_ids, read_texts
from mpt_trt.engines.manifest import ENGINE, read_manifest
from mpt_trt.engines.rank_descriptions import read_network_description, read_plan_description
from mpt_trt.engines.trtllm.recorded_generation import read_trtllm_generation
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.heldout import HeldOut, read_heldout, write_heldout
from mpt_trt.evaluation.prompt_file import Prompt, read_prompt, write_prompt
from mpt_trt.evaluation.smoke_result import read_smoke_result, write_smoke_result
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.ft.folder import FT_CHECKPOINT
from mpt_trt.network.external_files import read_network
from mpt_trt.system.replace import require_replaceable
from support.built import Built
from support.engines import call_tool
from support.results import PASSED

EXAMPLES = int(os.environ.get("MPT_TRT_FUZZ", "50"))
CORPUS = Path(__file__).parent / "corpus"
STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    10**18,
    float("nan"),
    float("inf"),
    "",
    "../x",
    "/etc/passwd",
    "\ud800",
    "a\0b",
    "x" * 5000,
    [],
    [[]],
    [{}],
    {},
    {"a": {}},
    {"../x": 1},
]


@dataclass(frozen=True)
class Reader:
    """read: of a folder. file: in it, the one that is changed. corpus: its format."""

    read: Callable[[Path], object]
    file: str
    folder: str
    corpus: str = "json"


def read_npz(folder: Path) -> None:
    file = NpzFile(folder / "x.npz")
    for key in file.keys:
        file.shape(key)
        list(file.rows(key, 2))
        file.floats(key)


def read_weight_file(file: SafetensorsFile | PickleFile) -> None:
    for name in file.names():
        file.require_values(name)
        file.shape(name)
        file.tensor(name)


def read_text_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("to be"))
    tokenizer.require_fitting(100)


READERS = {
    "config.json": Reader(read_hf_config, "config.json", "hf"),
    "special tokens": Reader(lambda f: read_special_tokens(f, f, 61), "config.json", "hf"),
    "tokenizer": Reader(read_text_tokenizer, "tokenizer.json", "hf"),
    "tokenizer_config": Reader(read_text_tokenizer, "tokenizer_config.json", "hf"),
    "config.ini": Reader(read_ft_checkpoint, "config.ini", "ft", "ini"),
    "manifest.json": Reader(read_ft_checkpoint, "manifest.json", "ft"),
    "FT mark": Reader(lambda f: require_replaceable(f, FT_CHECKPOINT), "manifest.json", "ft"),
    "engine": Reader(read_manifest, "config.json", "engine"),
    "engine mark": Reader(lambda f: require_replaceable(f, ENGINE), "config.json", "engine"),
    "network": Reader(lambda f: read_network_description(f, 0), "rank0.network.json", "other"),
    "plan": Reader(lambda f: read_plan_description(f, 0), "rank0.engine.json", "other"),
    "index": Reader(weight_files, "model.safetensors.index.json", "other"),
    "record": Reader(recorded_provenance, "source.json", "other"),
    "smoke test": Reader(
        lambda f: read_smoke_result(f / "smoke.json").passed, "smoke.json", "other"
    ),
    "prompt": Reader(lambda f: read_prompt(f / "prompt.json"), "prompt.json", "other"),
    "conversations": Reader(lambda f: read_conversations(f / "chat.json"), "chat.json", "other"),
    "onnx": Reader(lambda f: read_network(f / "rank0.onnx"), "rank0.onnx", "engine", "onnx"),
    "npz": Reader(read_npz, "x.npz", "other", "npz"),
    "calibration": Reader(
        lambda f: read_calibration(f / "mpt_tp1_rank0.npz", read_ft_checkpoint(f.parent / "ft")),
        "mpt_tp1_rank0.npz",
        "calibrated",
        "npz",
    ),
    "generation": Reader(lambda f: read_trtllm_generation(f / "g.npz"), "g.npz", "other", "npz"),
    "npy": Reader(lambda f: read_ids(f / "x.npy", {0}), "x.npy", "other", "npy"),
    "csv": Reader(lambda f: read_ids(f / "x.csv", {0}), "x.csv", "other", "csv"),
    "txt": Reader(lambda f: read_texts(f / "x.txt"), "x.txt", "other", "csv"),
    "safetensors": Reader(
        lambda f: read_weight_file(SafetensorsFile(f / "x.safetensors")),
        "x.safetensors",
        "other",
        "safetensors",
    ),
    "held-out": Reader(
        lambda f: read_heldout(f / "h.safetensors"), "h.safetensors", "other", "safetensors"
    ),
    "bin": Reader(lambda f: read_weight_file(PickleFile(f / "x.bin")), "x.bin", "other", "bin"),
}
JSON = [name for name, reader in READERS.items() if reader.corpus == "json"]
ARCHIVES = [name for name, reader in READERS.items() if reader.corpus in ("npz", "bin")]
# A transformers tokenizer takes some 20 ms to load.
SLOW = {"tokenizer": 8, "tokenizer_config": 8}


@pytest.fixture(scope="module")
def good(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good inputs of all readers, which may be changed."""
    top = tmp_path_factory.mktemp("fuzz")
    for name in ("hf", "ft", "engine"):
        shutil.copytree(getattr(built, name), top / name)
    other = top / "other"
    other.mkdir()
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.savez_compressed(other / "x.npz", m=values, n=values.astype(np.float16))
    np.save(other / "x.npy", np.array([[1, 2, 0], [3, 4, 5]]))
    (other / "x.csv").write_text("1,2\n3\n")
    (other / "x.txt").write_text("to be\nor not\n")
    (other / "x.safetensors").write_bytes(save({"m": values, "n": values}))
    torch.save({"m": torch.ones(2, 3), "n": torch.ones(2).bfloat16()}, other / "x.bin")
    heldout = HeldOut(np.ones((2, 4), np.int64), np.ones((2, 3, 8), np.float32), "a", "b", "c")
    write_heldout(heldout, other / "h.safetensors")
    write_smoke_result(PASSED, other / "smoke.json")
    write_prompt(Prompt("to", (1, 2)), other / "prompt.json", [])
    speeds = {"prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0}
    np.savez(
        other / "g.npz", tokens=np.arange(4), prompt_len=2, logits=np.ones((2, 3), np.float32),
        version="1.2", compute_capability="9.0", **speeds,
    )  # fmt: skip
    described = json.loads((top / "engine" / "config.json").read_text())
    rank = described.pop("ranks")[0]
    contents = {
        "model.safetensors.index.json": {"weight_map": {"a": "x.safetensors"}},
        "rank0.network.json": {**described, **rank},
        "rank0.engine.json": {
            "engine": "rank0.engine",
            "files": {"rank0.engine": rank["files"]["rank0.engine"]},
            "network_hash": "xxh3:" + "0" * 32,
            "builder": described["builder"],
        },
        "source.json": {
            "source": "a/b", "revision": "main", "commit": "0" * 40, "files": {"x.csv": 1},
        },
        "chat.json": {"messages": [{"role": "user", "content": "hi"}]},
    }  # fmt: skip
    for name, content in contents.items():
        (other / name).write_text(json.dumps(content))
    call_tool(
        "quantize.py", f"--model_dir={top / 'ft'}", "--qformat=kv_cache", "--device=cpu",
        f"--export_path={top / 'calibrated'}", "--calib_size=1", "--calib_max_seq_length=8",
        f"--calib_text={other / 'x.txt'}", f"--tokenizer_dir={top / 'hf'}",
    )  # fmt: skip
    return top


def require_sentence(top: Path, name: str, content: bytes) -> None:
    """Requires that a reader accepts its file with another content, or raises MptTrtError."""
    reader = READERS[name]
    path = top / reader.folder / reader.file
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        reader.read(path.parent)
    except MptTrtError as error:
        assert len(str(error)) < 3000
    finally:
        path.write_bytes(before)


def content_of(top: Path, name: str) -> bytes:
    return (top / READERS[name].folder / READERS[name].file).read_bytes()


def fuzz(examples: int = EXAMPLES) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# NumPy and PyTorch warn about some of the contents.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=3
)
"""Each: place, as a share of the content, bytes that go, bytes that come."""


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for share, gone, new in edits:
        place = int(share * len(content))
        content = content[:place] + new + content[place + gone :]
    return content


def place_in(content: Any, steps: Iterable[int]) -> tuple[Any, Any] | None:
    """Walks down JSON; returns the last container and the key in it, None if there is none."""
    place = None
    for step in steps:
        if not isinstance(content, dict | list) or not content:
            break
        keys = list(content) if isinstance(content, dict) else range(len(content))
        place = content, keys[step % len(keys)]
        content = content[place[1]]
    return place


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_accepted(good: Path, name: str) -> None:
    READERS[name].read(good / READERS[name].folder)


@pytest.mark.parametrize("name", READERS)
def test_past_failures(good: Path, name: str) -> None:
    for path in sorted((CORPUS / READERS[name].corpus).iterdir()):
        require_sentence(good, name, path.read_bytes())


@pytest.mark.parametrize("name", READERS)
def test_bytes_replaced(good: Path, name: str) -> None:
    content = content_of(good, name)

    @fuzz(max(2, EXAMPLES // SLOW.get(name, 1)))
    @given(edits=EDITS)
    def try_it(edits: list) -> None:
        require_sentence(good, name, edited(content, edits))

    try_it()


@pytest.mark.parametrize("name", JSON)
def test_values_replaced(good: Path, name: str) -> None:
    """Some value, that one reaches by `steps` from the top, becomes a strange one or goes."""
    text = content_of(good, name)

    @fuzz(max(2, EXAMPLES // SLOW.get(name, 1)))
    @given(
        steps=st.lists(st.integers(0, 30), max_size=6),
        value=st.sampled_from(STRANGE),
        is_removed=st.booleans(),
    )
    def try_it(steps: list[int], value: object, is_removed: bool) -> None:
        content = json.loads(text)
        parent, key = place_in(content, steps) or ({}, "top")
        parent[key] = value
        if is_removed and parent is not content and isinstance(parent, dict):
            del parent[key]
        require_sentence(good, name, json.dumps(content).encode())

    try_it()


@pytest.mark.parametrize("name", ARCHIVES)
def test_entries_of_archives_replaced(good: Path, name: str) -> None:
    """Check sums are right, so damage reaches what is behind them."""
    with zipfile.ZipFile(io.BytesIO(content_of(good, name))) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]

    @fuzz()
    @given(number=st.integers(0, 30), edits=EDITS, is_stored=st.booleans())
    def try_it(number: int, edits: list, is_stored: bool) -> None:
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for index, (entry, content) in enumerate(entries):
                new = edited(content, edits) if index == number % len(entries) else content
                # As they are in what PyTorch and NumPy write, or compressed.
                kind = zipfile.ZIP_STORED if is_stored else zipfile.ZIP_DEFLATED
                archive.writestr(entry.filename, new, kind)
        require_sentence(good, name, target.getvalue())

    try_it()


@pytest.mark.parametrize("name", ["safetensors", "held-out"])
def test_values_of_headers_replaced(good: Path, name: str) -> None:
    content = content_of(good, name)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])

    @fuzz()
    @given(
        steps=st.lists(st.integers(0, 5), min_size=1, max_size=3), value=st.sampled_from(STRANGE)
    )
    def try_it(steps: list[int], value: object) -> None:
        changed = json.loads(json.dumps(header))
        parent, key = place_in(changed, steps)
        parent[key] = value
        new = json.dumps(changed).encode()
        require_sentence(good, name, struct.pack("<Q", len(new)) + new + content[8 + length :])

    try_it()


@pytest.mark.parametrize("key", range(0, 40, 3))
def test_values_of_config_ini_replaced(good: Path, key: int) -> None:
    lines = content_of(good, "config.ini").decode().splitlines()
    places = [index for index, line in enumerate(lines) if "=" in line]
    place = places[key % len(places)]
    for value in (
        "",
        "-1",
        "0",
        "1e400",
        "nan",
        "9" * 30,
        "%(x)s",
        "\u0663",
        "None",
        "[]",
        "x" * 5000,
    ):
        changed = lines.copy()
        changed[place] = lines[place].partition("=")[0] + "= " + value
        require_sentence(good, "config.ini", "\n".join(changed).encode())
