"""Fetching from a hub on this host, with the real client in separate processes."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mpt_trt.checkpoint.files import weight_files
from mpt_trt.checkpoint.snapshot import Snapshot, link_folder
from mpt_trt.checkpoint.source import checkpoint_folder, is_hub_id
from mpt_trt.errors import MptTrtError
from support.forks.servers import forked_python
from support.hub_server import HubServer, Refusal, Repository, running_hub
from support.paths import REPOSITORY, tool_path

A, B = "a" * 40, "b" * 40
SOURCE = "owner/tiny-mpt"
TEXT_FILES = {
    "config.json": b'{"model_type": "mpt"}',
    "generation_config.json": b'{"eos_token_id": 0}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "x"}',
    "special_tokens_map.json": b"{}",
}
UNWANTED = {
    "modeling_mpt.py": b"raise SystemExit('executed')",
    "README.md": b"# card",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"keras",
    "model.onnx": b"onnx",
    "model.gguf": b"gguf",
    "training_args.bin": b"not weights",
    "onnx/model.safetensors": b"of another folder",
    "original/config.json": b"{}",
}


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


SAFETENSORS = {"model.safetensors": b"S" * 3000}
SAFETENSORS_SHARDS = {
    "model.safetensors.index.json": index_of(
        "model-1-of-2.safetensors", "model-2-of-2.safetensors"
    ),
    "model-1-of-2.safetensors": b"1" * 2000,
    "model-2-of-2.safetensors": b"2" * 1000,
}
BIN = {"pytorch_model.bin": b"B" * 3000}
BIN_SHARDS = {
    "pytorch_model.bin.index.json": index_of("pytorch_model-1.bin", "pytorch_model-2.bin"),
    "pytorch_model-1.bin": b"1" * 2000,
    "pytorch_model-2.bin": b"2" * 1000,
}


def repository(*parts: dict[str, bytes], **options) -> Repository:
    files = {path: content for part in parts for path, content in part.items()}
    return Repository({"main": A}, {A: files}, **options)


@dataclass
class Workplace:
    """A hub, an empty cache, and an empty folder to work in."""

    server: HubServer
    folder: Path

    @property
    def repository(self) -> Repository:
        return self.server.repositories[SOURCE]

    @property
    def cache(self) -> Path:
        return self.folder / "home/hub"

    @property
    def revision_file(self) -> Path:
        return self.folder / "revision.json"

    @property
    def output_dir(self) -> Path:
        return self.folder / "checkpoints/tiny"

    def serve(self, *parts: dict[str, bytes], **options) -> None:
        self.server.repositories[SOURCE] = repository(*parts, **options)
        self.server.add_contents()

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen:
        """Starts `python ARGUMENTS` with this hub and this cache.

        Forks have the client's dependencies, and import the client itself.
        """
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))
        }
        own = {
            "HF_ENDPOINT": self.server.endpoint,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
            "PYTHONPATH": str(REPOSITORY),
            "COLUMNS": "1000",
        }
        return subprocess.Popen(
            [forked_python(), *map(str, arguments)],
            cwd=self.folder,
            env=inherited | own | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells start background jobs, such as this test run, with Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **environment)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def resolve(self, source: str = SOURCE, revision: str = "main", **environment: str):
        arguments = ["--source", source, "--revision", revision, "--output", self.revision_file]
        return self.run(tool_path("fetch_checkpoint.py"), "resolve", *arguments, **environment)

    def fetch_arguments(self, *options: str) -> list[str | Path]:
        files = ["--revision_file", self.revision_file, "--output_dir", self.output_dir]
        return [tool_path("fetch_checkpoint.py"), "fetch", *files, *options]

    def fetch(self, *options: str, **environment: str):
        return self.run(*self.fetch_arguments(*options), **environment)

    def record(self, commit: str = A, source: str = SOURCE, revision: str = "main") -> None:
        """Writes the file of `resolve`, for tests of `fetch`."""
        record = {"source": source, "revision": revision, "commit": commit}
        self.revision_file.write_text(json.dumps(record))

    def fetched(self) -> dict[str, bytes]:
        paths = [path for path in self.output_dir.iterdir() if path.name != "source.json"]
        return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    with running_hub({SOURCE: repository(TEXT_FILES, UNWANTED, SAFETENSORS)}) as server:
        yield Workplace(server, tmp_path)


def succeeded(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr
    return result.stderr


def the_error(result: subprocess.CompletedProcess) -> str:
    """The text of the one line of error; anything like a traceback fails."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.rstrip().endswith(errors[0])
    return errors[0]


def assert_nothing_made(place: Workplace) -> None:
    assert not place.output_dir.exists()
    assert_no_leftovers(place)


def assert_no_leftovers(place: Workplace) -> None:
    assert not list(place.folder.rglob("*.incomplete"))
    assert not list(place.folder.rglob("*.partial*"))


# Fetched files


def test_a_recorded_commit_outlives_the_branch(place: Workplace):
    place.repository.commits[B] = {**TEXT_FILES, "model.safetensors": b"moved on"}
    place.server.add_contents()
    succeeded(place.resolve())
    record = {"source": SOURCE, "revision": "main", "commit": A}
    assert json.loads(place.revision_file.read_text()) == record

    place.repository.refs["main"] = B
    succeeded(place.resolve())
    assert json.loads(place.revision_file.read_text()) == record
    succeeded(place.fetch())
    assert place.fetched()["model.safetensors"] == SAFETENSORS["model.safetensors"]

    place.revision_file.unlink()
    succeeded(place.resolve())
    assert json.loads(place.revision_file.read_text()) == {**record, "commit": B}
    succeeded(place.fetch())
    assert place.fetched()["model.safetensors"] == b"moved on"


def test_another_revision_replaces_the_record(place: Workplace):
    place.repository.commits[B] = dict(TEXT_FILES)
    place.repository.refs["v2"] = B
    succeeded(place.resolve())
    succeeded(place.resolve(revision="v2"))
    record = json.loads(place.revision_file.read_text())
    assert record == {"source": SOURCE, "revision": "v2", "commit": B}


@pytest.mark.parametrize(
    ("offered", "wanted"),
    [
        pytest.param([SAFETENSORS], SAFETENSORS, id="safetensors"),
        pytest.param([SAFETENSORS_SHARDS], SAFETENSORS_SHARDS, id="shards"),
        pytest.param([BIN], BIN, id="bin"),
        pytest.param([BIN_SHARDS], BIN_SHARDS, id="bin shards"),
        pytest.param([SAFETENSORS_SHARDS, BIN_SHARDS], SAFETENSORS_SHARDS, id="both formats"),
        pytest.param([SAFETENSORS, BIN_SHARDS], SAFETENSORS, id="one file and bin shards"),
    ],
)
def test_only_what_is_needed_is_downloaded(
    place: Workplace, offered: list[dict[str, bytes]], wanted: dict[str, bytes]
):
    place.serve(TEXT_FILES, UNWANTED, *offered)
    place.record()
    succeeded(place.fetch())
    assert place.server.requested_files() == {*TEXT_FILES, *wanted}
    assert place.fetched() == {**TEXT_FILES, **wanted}
    weights = {name for name in wanted if not name.endswith(".index.json")}
    assert {path.name for path in weight_files(place.output_dir)} == weights

    record = json.loads((place.output_dir / "source.json").read_text())
    sizes = {name: len(content) for name, content in {**TEXT_FILES, **wanted}.items()}
    assert record == {
        "kind": "hub",
        "source": SOURCE,
        "revision": "main",
        "commit": A,
        "files": sizes,
    }
    for name in sizes:
        assert (place.output_dir / name).is_symlink()
        assert (place.output_dir / name).resolve().is_relative_to(place.cache)


def test_a_repository_without_tokenizer(place: Workplace):
    place.serve({"config.json": b"{}"}, SAFETENSORS)
    place.record()
    succeeded(place.fetch())
    assert place.fetched() == {"config.json": b"{}", **SAFETENSORS}
    assert "no tokenizer.json on the hub" in the_error(place.fetch("--content", "tokenizer"))


def test_the_tokenizer_alone(place: Workplace):
    place.record()
    succeeded(place.fetch("--content", "tokenizer"))
    tokenizer = {name: TEXT_FILES[name] for name in TEXT_FILES if "token" in name}
    assert place.fetched() == tokenizer
    assert place.server.requested_files() == set(tokenizer)


def test_a_cached_tokenizer_needs_no_request(place: Workplace):
    code = f"from mpt_trt.checkpoint.source import *; print(tokenizer_folder('{SOURCE}', '{A}'))"
    first = place.run("-c", code)
    succeeded(first)
    place.server.requests.clear()
    assert place.run("-c", code).stdout == first.stdout
    assert place.server.requests == []
    assert (Path(first.stdout.strip()) / "tokenizer.json").read_bytes() == TEXT_FILES[
        "tokenizer.json"
    ]


def test_a_hub_id_where_a_folder_is_expected(place: Workplace):
    code = (
        f"from mpt_trt.checkpoint.source import *; print(*checkpoint_folder('{SOURCE}'), sep='|')"
    )
    result = place.run("-c", code)
    succeeded(result)
    folder, provenance = result.stdout.strip().split("|")
    assert (Path(folder) / "model.safetensors").read_bytes() == SAFETENSORS["model.safetensors"]
    assert provenance == str({"kind": "hub", "source": SOURCE, "revision": "main", "commit": A})


def test_importing_does_not_load_the_client(place: Workplace):
    code = (
        "import sys, mpt_trt.checkpoint.source; "
        "print(*{'huggingface_hub', 'httpx', 'torch'} & {*sys.modules})"
    )
    assert place.run("-c", code).stdout.strip() == ""


# Without network


def test_the_cache_serves_while_the_hub_is_gone(place: Workplace):
    succeeded(place.resolve())
    succeeded(place.fetch())
    place.server.stop()
    place.revision_file.unlink()
    assert f"commit {A} of the cache is used" in succeeded(place.resolve())
    place.output_dir.rename(place.folder / "first")
    assert "using the cache" in succeeded(place.fetch())
    assert place.fetched() == {**TEXT_FILES, **SAFETENSORS}


def test_offline_mode_sends_nothing(place: Workplace):
    place.serve(TEXT_FILES, SAFETENSORS_SHARDS)
    succeeded(place.resolve())
    succeeded(place.fetch())
    place.revision_file.unlink()
    place.server.requests.clear()
    succeeded(place.resolve(HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE is set" in succeeded(place.fetch(HF_HUB_OFFLINE="1"))
    assert place.fetched() == {**TEXT_FILES, **SAFETENSORS_SHARDS}
    assert place.server.requests == []


def test_a_hub_that_is_down_is_like_no_network(place: Workplace):
    succeeded(place.resolve())
    place.revision_file.unlink()
    place.repository.refuse_all = Refusal(503, "")
    assert "HTTP status 503" in succeeded(place.resolve())
    assert json.loads(place.revision_file.read_text())["commit"] == A


def test_a_hub_that_does_not_answer(place: Workplace):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code = (
            "from mpt_trt.checkpoint import hub; hub.ANSWER_SECONDS = 0.2; "
            f"hub.fetch_checkpoint('{SOURCE}', 'main')"
        )
        result = place.run("-c", code, HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert f"MptTrtError: {SOURCE} (revision main): the hub cannot be reached (" in result.stderr


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network_and_nothing_cached(place: Workplace, offline: str):
    place.server.stop()
    reason = "HF_HUB_OFFLINE is set" if offline == "1" else "Connection refused"
    error = the_error(place.resolve(HF_HUB_OFFLINE=offline))
    assert not place.revision_file.exists()
    place.record()
    for text in (error, the_error(place.fetch(HF_HUB_OFFLINE=offline))):
        assert f"{SOURCE} (revision main): the hub cannot be reached" in text
        assert reason in text
        assert "connect to the network" in text
        assert "HF_HOME" in text
        assert "local folder" in text
    assert_nothing_made(place)


def test_a_cache_that_lacks_a_shard(place: Workplace):
    place.serve(TEXT_FILES, SAFETENSORS_SHARDS)
    place.record()
    succeeded(place.fetch())
    next(place.cache.glob("*/snapshots/*/model-2-of-2.safetensors")).resolve().unlink()
    place.output_dir.rename(place.folder / "first")
    place.server.stop()
    error = the_error(place.fetch())
    assert "no model-2-of-2.safetensors in the hub cache" in error
    assert "Connection refused" in error
    assert "connect to the network" in error
    assert_nothing_made(place)


# Refusals


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("owner/absent", "main", ["no such model", "local folder", "hf auth login"]),
        (SOURCE, "v9", ["no such revision", f"/{SOURCE}"]),
        ("some--one/mpt", "main", ["nor a valid hub id"]),
        ("no-such-folder", "main", ["not a hub id"]),
    ],
)
def test_models_and_revisions_that_do_not_exist(
    place: Workplace, source: str, revision: str, expected: list[str]
):
    error = the_error(place.resolve(source, revision))
    assert all(text in error for text in [source, *expected]), error
    assert revision == "main" or revision in error
    assert not place.revision_file.exists()


def test_a_commit_that_does_not_exist(place: Workplace):
    succeeded(place.resolve(revision=B))
    error = the_error(place.fetch())
    assert f"{SOURCE} (revision {B}): no such revision" in error
    assert_nothing_made(place)


# The hub describes gated models to anyone and refuses their files.
@pytest.mark.parametrize(
    ("refused", "refusal", "expected"),
    [
        ("refuse_files", Refusal(401, "GatedRepo"), ["gated", "terms at ENDPOINT", "HF_TOKEN"]),
        ("refuse_files", Refusal(403, "GatedRepo"), ["gated", "terms at ENDPOINT", "HF_TOKEN"]),
        ("refuse_all", Refusal(403, "GatedRepo"), ["gated", "terms at ENDPOINT", "HF_TOKEN"]),
        ("refuse_all", Refusal(401, "RepoNotFound"), ["no such model", "private", "HF_TOKEN"]),
        ("refuse_all", Refusal(404, ""), ["no such model"]),
        ("refuse_files", Refusal(401, ""), ["HTTP status 401", "HF_TOKEN"]),
        ("refuse_files", Refusal(403, "Other"), ["HTTP status 403", "message of Other"]),
    ],
)
def test_refused_access(place: Workplace, refused: str, refusal: Refusal, expected: list[str]):
    place.serve(TEXT_FILES, SAFETENSORS, **{refused: refusal})
    place.record()
    error = the_error(place.fetch())
    assert f"{SOURCE} (revision main): " in error
    for text in expected:
        assert text.replace("ENDPOINT", f"{place.server.endpoint}/{SOURCE}") in error
    assert_nothing_made(place)


def test_a_server_that_is_no_hub(place: Workplace):
    place.repository.page = b"<html>Please log in</html>"
    error = the_error(place.resolve())
    assert SOURCE in error
    assert "HF_ENDPOINT" in error
    assert not place.revision_file.exists()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([SAFETENSORS], "no config.json on the hub"),
        ([TEXT_FILES, UNWANTED], "no weights (model.safetensors, "),
        (
            [TEXT_FILES, {"model.safetensors.index.json": index_of("model-7.safetensors")}],
            "no model-7.safetensors on the hub",
        ),
        (
            [TEXT_FILES, UNWANTED, {"pytorch_model.bin.index.json": index_of("modeling_mpt.py")}],
            "'modeling_mpt.py', which is not a .bin file",
        ),
        (
            [TEXT_FILES, {"model.safetensors.index.json": index_of("../x.safetensors")}],
            "'../x.safetensors', which is not a .safetensors file",
        ),
        (
            [TEXT_FILES, {"model.safetensors.index.json": b"{}"}],
            "model.safetensors.index.json: field weight_map is missing",
        ),
    ],
)
def test_repositories_that_are_no_checkpoints(
    place: Workplace, files: list[dict[str, bytes]], expected: str
):
    place.serve(*files)
    place.record()
    assert expected in the_error(place.fetch())
    assert "modeling_mpt.py" not in place.server.requested_files()
    assert_nothing_made(place)


@pytest.mark.parametrize(
    "content", ['{"source": "owner/x"}', '{"source": "o/x", "revision": "main", "commit": "abc"}']
)
def test_a_record_that_is_none(place: Workplace, content: str):
    place.revision_file.write_text(content)
    assert str(place.revision_file) in the_error(place.fetch())
    assert_nothing_made(place)


# Downloads that go wrong


@pytest.mark.parametrize("fault", ["lost", "short"])
def test_a_download_that_is_cut_off(place: Workplace, fault: str):
    place.serve(TEXT_FILES, SAFETENSORS_SHARDS, faults={"model-2-of-2.safetensors": fault})
    place.record()
    error = the_error(place.fetch())
    assert f"{SOURCE} (revision main): model-2-of-2.safetensors could not be downloaded" in error
    assert "run the same command again" in error
    assert_nothing_made(place)
    assert not list(place.cache.glob("*/snapshots/*/model-2-of-2.safetensors"))

    place.repository.faults.clear()
    place.server.requests.clear()
    succeeded(place.fetch())
    assert place.server.requested_files() == {"model-2-of-2.safetensors"}
    assert place.fetched() == {**TEXT_FILES, **SAFETENSORS_SHARDS}


def test_a_download_that_is_resumed(place: Workplace):
    # Of an answer that breaks off, the client keeps whole chunks of 10 MiB.
    weights = {"model.safetensors": random.Random(0).randbytes(24 << 20)}
    place.serve(TEXT_FILES, weights, faults={"model.safetensors": "cut_off"})
    place.record()
    succeeded(place.fetch())
    assert place.server.ranges == [f"bytes={10 << 20}-"]
    assert place.fetched() == {**TEXT_FILES, **weights}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download(place: Workplace, sent: signal.Signals):
    place.serve(TEXT_FILES, SAFETENSORS, faults={"model.safetensors": "stalled"})
    place.record()
    process = place.start(*place.fetch_arguments())
    assert place.server.stalled.wait(30)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert_nothing_made(place)

    place.repository.faults.clear()
    succeeded(place.fetch())
    assert place.fetched() == {**TEXT_FILES, **SAFETENSORS}


def test_a_failure_leaves_the_earlier_folder(place: Workplace):
    place.repository.commits[B] = {**TEXT_FILES, "model.safetensors": b"N" * 3000}
    place.repository.refs["next"] = B
    place.server.add_contents()
    place.record()
    succeeded(place.fetch())
    place.repository.faults["model.safetensors"] = "short"
    place.record(B, revision="next")
    the_error(place.fetch())
    assert place.fetched() == {**TEXT_FILES, **SAFETENSORS}
    assert json.loads((place.output_dir / "source.json").read_text())["commit"] == A
    assert_no_leftovers(place)


def test_a_cache_without_room(place: Workplace):
    """A limit on the size of files stands for a full disk: writing fails in the same place."""
    place.serve(TEXT_FILES, {"model.safetensors": bytes(1 << 20)})
    place.record()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        process = place.start(*place.fetch_arguments())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    stdout, stderr = process.communicate(timeout=60)
    error = the_error(subprocess.CompletedProcess([], process.returncode, stdout, stderr))
    assert f"{SOURCE} (revision main): cannot be stored in the hub cache {place.cache}" in error
    assert "(File too large)" in error
    assert "HF_HOME" in error
    assert_nothing_made(place)


# Folders


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("mosaicml/mpt-7b", True),
        ("replit/replit-code-v1_5-3b", True),
        ("mpt-7b", False),
        ("./mosaicml/mpt-7b", False),
        ("../mpt-7b", False),
        ("../../mpt-7b", False),
        ("/models/mpt-7b", False),
        ("~/mpt-7b", False),
        ("a/b/c", False),
        ("checkpoints/", False),
        ("owner/", False),
        ("owner/.", False),
        ("owner/..", False),
        ("", False),
        ("exists/folder", False),
        ("exists/file", False),
        ("exists/typo", False),
        ("~owner/name", False),
        (".owner/name", False),
    ],
)
def test_what_counts_as_a_hub_id(
    source: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "exists/folder").mkdir(parents=True)
    (tmp_path / "exists/file").touch()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(source) is expected


@pytest.mark.parametrize(
    "source",
    ["./absent", "../absent/x", "/absent", "~/absent", "absent", "f", "here/absent", "f/absent"],
)
def test_missing_folders(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("f").touch()
    Path("here").mkdir()
    kind = "not a folder" if source == "f" else "no such folder"
    with pytest.raises(MptTrtError, match=f"^{kind}: {source}; .* hub id"):
        checkpoint_folder(source)


@pytest.mark.parametrize("end", ["", "/", "/tree/main", "?x=1"])
def test_addresses_are_not_hub_ids(end: str):
    source = f"https://huggingface.co/owner/name{end}"
    with pytest.raises(MptTrtError) as error:
        checkpoint_folder(source)
    assert str(error.value) == f"{source}: an address, not a hub id; give owner/name"


def test_plain_folders_are_recorded_with_their_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models/x").mkdir(parents=True)
    recorded = {"kind": "folder", "source": str(tmp_path / "models/x")}
    assert checkpoint_folder("models/x") == (Path("models/x"), recorded)
    assert checkpoint_folder("~/models/x") == (tmp_path / "models/x", recorded)
    (tmp_path / "models/x/source.json").write_text('{"url": "of another tool"}')
    assert checkpoint_folder("models/x")[1] == recorded


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    folder = tmp_path / "cache/snapshots" / A
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "not_ours.py"):
        (folder / name).write_text(name)
    return Snapshot(SOURCE, "main", A, folder, ("config.json", "model.safetensors"))


def test_linked_folders_know_their_provenance(snapshot: Snapshot, tmp_path: Path):
    link_folder(snapshot, tmp_path / "linked")
    folder, provenance = checkpoint_folder(str(tmp_path / "linked"))
    assert provenance == {
        "kind": "hub",
        "source": SOURCE,
        "revision": "main",
        "commit": A,
    }
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "source.json"}

    (snapshot.folder / "model.safetensors").unlink()
    with pytest.raises(MptTrtError, match=r"linked/model\.safetensors: .* fetch .* again"):
        checkpoint_folder(str(tmp_path / "linked"))


def test_file_systems_without_symbolic_links(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    link_folder(snapshot, tmp_path / "linked")
    assert (tmp_path / "linked/config.json").read_text() == "config.json"
    assert not (tmp_path / "linked/config.json").is_symlink()


def test_folders_of_something_else_are_kept(snapshot: Snapshot, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    link_folder(snapshot, tmp_path / "mine")  # empty: nothing is lost
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").touch()
    for target in (tmp_path / "other", tmp_path / "other/thesis.txt"):
        with pytest.raises(MptTrtError, match="choose another output folder"):
            link_folder(snapshot, target)
    assert (tmp_path / "other/thesis.txt").is_file()
