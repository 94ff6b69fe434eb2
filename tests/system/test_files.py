"""Files that are complete or absent, and what a script's outcome depends on."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import xxhash

from mpt_trt.errors import MptTrtError
from mpt_trt.system import files
from mpt_trt.system.code_version import source_files, source_hash
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.paths import REPOSITORY, tool_path

SHARED_MEMORY = Path("/dev/shm")
REMEDIES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
}


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder: the text of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def dead_process() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def live_process() -> Iterator[int]:
    """The id of a process other than this one."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
    ) as process:
        yield process.pid
        process.communicate(b"\n")


class TestReplaceDirectory:
    def test_new(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "down" / "target"
        with files.replace_directory(target) as folder:
            (folder / "file").write_text("new")
            assert not target.exists()
            assert folder.parent == target.parent
        assert tree(target.parent) == {"target": None, "target/file": "new"}

    def test_old_content_goes_as_a_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "stale").write_text("old")
        with files.replace_directory(target) as folder:
            (folder / "file").write_text("new")
            assert tree(target) == {"sub": None, "sub/stale": "old"}
        assert tree(tmp_path) == {"target": None, "target/file": "new"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("existed", [True, False])
    def test_failure_changes_nothing(self, tmp_path: Path, error: type, existed: bool) -> None:
        target = tmp_path / "target"
        if existed:
            target.mkdir()
            (target / "file").write_text("old")
        before = tree(tmp_path)
        with pytest.raises(error), files.replace_directory(target) as folder:
            (folder / "file").write_text("new")
            raise error
        assert tree(tmp_path) == before

    def test_full_disk(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "file").write_text("old")
        before = tree(tmp_path)
        message = f"^cannot write {target}: the disk is full; free space"
        with pytest.raises(MptTrtError, match=message), files.replace_directory(target) as folder:
            (folder / "file").symlink_to("/dev/full")
            (folder / "file").write_text("new")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("kind", ["file", "link to a folder", "dangling link"])
    def test_something_else_in_its_place(self, tmp_path: Path, kind: str) -> None:
        target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
        elsewhere.mkdir()
        (elsewhere / "kept").write_text("kept")
        if kind == "file":
            target.write_text("old")
        else:
            target.symlink_to(elsewhere if kind == "link to a folder" else tmp_path / "nothing")
        with files.replace_directory(target) as folder:
            (folder / "file").write_text("new")
        assert not target.is_symlink()
        assert tree(tmp_path) == {
            "elsewhere": None,
            "elsewhere/kept": "kept",
            "target": None,
            "target/file": "new",
        }

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        target = tmp_path / "file" / "target"
        with (
            pytest.raises(MptTrtError, match=f"cannot write {target}: a part of this path is a f"),
            files.replace_directory(target),
        ):
            pass

    @pytest.mark.parametrize("name", ["target", "tar[g]et*"])
    def test_leftovers(
        self, tmp_path: Path, name: str, dead_process: int, live_process: int
    ) -> None:
        """Those of dead processes go; those of live ones and of other machines stay."""
        prefix = f".{name}.partial-{socket.gethostname()}-"
        gone = [f"{prefix}{dead_process}", f"{prefix}{dead_process}-old", f"{prefix}{os.getpid()}"]
        kept = [f"{prefix}{live_process}", f".{name}.partial-another-host-{dead_process}", "other"]
        for leftover in gone + kept:
            (tmp_path / leftover / "sub").mkdir(parents=True)
        with files.replace_directory(tmp_path / name):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {name, *kept}


class TestReplaceFile:
    def test_new_and_again(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "target"
        for text in ("first", "second"):
            with files.replace_file(target) as partial:
                partial.write_text(text)
                assert partial.parent == target.parent
                assert not target.exists() or target.read_text() == "first"
            assert tree(target.parent) == {"target": text}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_failure_changes_nothing(self, tmp_path: Path, error: type) -> None:
        target = tmp_path / "target"
        target.write_text("old")
        with pytest.raises(error), files.replace_file(target) as partial:
            partial.write_text("new")
            raise error
        assert tree(tmp_path) == {"target": "old"}

    def test_full_disk(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("old")
        message = f"^cannot write {target}: the disk is full; free space"
        with pytest.raises(MptTrtError, match=message), files.replace_file(target) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("new")
        assert tree(tmp_path) == {"target": "old"}

    @pytest.mark.parametrize("number", REMEDIES)
    def test_every_remedy(self, tmp_path: Path, number: int) -> None:
        message = f"cannot write {tmp_path / 'target'}: {REMEDIES[number]}"
        with pytest.raises(MptTrtError, match=message), files.replace_file(tmp_path / "target"):
            raise OSError(number, os.strerror(number))

    def test_other_errors_are_not_disguised(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Input/output"), files.replace_file(tmp_path / "target"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert tree(tmp_path) == {}

    def test_leftovers(self, tmp_path: Path, dead_process: int) -> None:
        (tmp_path / f".target.partial-{socket.gethostname()}-{dead_process}").write_text("half")
        with files.replace_file(tmp_path / "target") as partial:
            partial.write_text("new")
        assert tree(tmp_path) == {"target": "new"}


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
        files.write_json(tmp_path / "x.json", content)
        assert json.loads((tmp_path / "x.json").read_text()) == content
        assert files.read_json(tmp_path / "x.json") == content

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [(b'{"a": 1', "not valid JSON"), (b"7", "found int"), (b"\xff", "cannot be read")],
    )
    def test_broken(self, tmp_path: Path, content: bytes, complaint: str) -> None:
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(MptTrtError, match=f"^{path}: .*{complaint}"):
            files.read_json(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(MptTrtError, match=r"x\.json: no such file"):
            files.read_json(tmp_path / "x.json")


class TestHardLink:
    def test_same_file(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "deep" / "target"
        source.write_text("content")
        files.hard_link(source, target)
        assert target.samefile(source)

    def test_of_a_link_is_of_the_file_behind_it(self, tmp_path: Path) -> None:
        source, link, target = tmp_path / "source", tmp_path / "link", tmp_path / "target"
        source.write_text("content")
        link.symlink_to(source)
        files.hard_link(link, target)
        assert target.samefile(source)
        assert not target.is_symlink()

    @pytest.mark.skipif(
        not SHARED_MEMORY.is_dir()
        or SHARED_MEMORY.stat().st_dev == Path(gettempdir()).stat().st_dev,
        reason="no second file system at /dev/shm",
    )
    def test_across_file_systems(self, tmp_path: Path) -> None:
        source = SHARED_MEMORY / f"test_files-{os.getpid()}"
        target = tmp_path / "target"
        source.write_text("content")
        try:
            files.hard_link(source, target)
        finally:
            source.unlink()
        assert target.read_text() == "content"

    @pytest.mark.parametrize(
        "number",
        [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP],
        ids=errno.errorcode.get,
    )
    def test_copies_where_links_are_impossible(self, tmp_path, monkeypatch, number: int) -> None:
        def no_link(source: str, target: Path) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", no_link)
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_text("content")
        files.hard_link(source, target)
        assert target.read_text() == "content"
        assert not target.samefile(source)

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_text("new")
        target.write_text("old")
        with pytest.raises(FileExistsError):
            files.hard_link(source, target)
        assert target.read_text() == "old"


class TestContentHash:
    @pytest.mark.parametrize("size", [0, 1, 240, 241, (4 << 20) - 1, 4 << 20, (4 << 20) + 1])
    def test_xxhash(self, tmp_path: Path, size: int) -> None:
        content = bytes(range(251)) * (size // 251 + 1)
        path = tmp_path / "file"
        path.write_bytes(content[:size])
        expected = xxhash.xxh3_128_hexdigest(content[:size])
        assert files.content_hash(path) == f"xxh3:{expected}"

    def test_published_value(self, tmp_path: Path) -> None:
        # XXH3_128bits of no bytes with seed 0, from xxHash's own table of sanity checks.
        (tmp_path / "empty").touch()
        found = files.content_hash(tmp_path / "empty")
        assert found == "xxh3:99aa06d3014798d86001c324468d497f"

    def test_many(self, tmp_path: Path) -> None:
        paths = {str(n): tmp_path / f"file{n}" for n in range(20)}
        for name, path in paths.items():
            path.write_text(name)
        expected = {n: f"xxh3:{xxhash.xxh3_128_hexdigest(n.encode())}" for n in paths}
        assert files.content_hashes(paths) == expected


MODULES = {
    "tool.py": "import os\n\nfrom mpt_trt.plain import x\n",
    "other_tool.py": "from mpt_trt.unrelated import y\n",
    "mpt_trt/__init__.py": "",
    "mpt_trt/plain.py": "def f():\n    from mpt_trt import lazy\n    return lazy\n",
    "mpt_trt/lazy.py": "import json\nimport mpt_trt.package.inner as i\n",
    "mpt_trt/package/__init__.py": "import mpt_trt.from_init\n",
    "mpt_trt/package/kernels/product.onnx": "a model\n",
    "mpt_trt/package/inner.py": "from mpt_trt.plain import f\n",
    "mpt_trt/package/sibling.py": "",
    "mpt_trt/from_init.py": "",
    "mpt_trt/unrelated.py": "from mpt_trt.plain import x\n",
    "mpt_trt/commands/__init__.py": "",
    "mpt_trt/commands/tool.py": "from mpt_trt import behind_command\n",
    "mpt_trt/behind_command.py": "",
    "elsewhere.py": "",
}
BEHIND_TOOL = {
    "tool.py",
    "mpt_trt/__init__.py",
    "mpt_trt/plain.py",
    "mpt_trt/lazy.py",  # imported inside a function
    "mpt_trt/package/__init__.py",
    "mpt_trt/package/kernels/product.onnx",
    "mpt_trt/package/inner.py",
    "mpt_trt/from_init.py",
    "mpt_trt/commands/__init__.py",
    "mpt_trt/commands/tool.py",  # imported by its name, late
    "mpt_trt/behind_command.py",
}


class TestSourceHash:
    @pytest.fixture
    def scripts(self, tmp_path: Path) -> Path:
        self.write(tmp_path / "scripts")
        return tmp_path / "scripts"

    @pytest.fixture(autouse=True)
    def nothing_remembered(self) -> Iterator[None]:
        yield
        source_hash.cache_clear()

    def write(self, folder: Path) -> None:
        for name, source in MODULES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    def hash_now(self, script: Path) -> str:
        source_hash.cache_clear()
        return source_hash(script, script.parent / "mpt_trt")

    def test_files(self, scripts: Path) -> None:
        files = source_files(scripts / "tool.py", scripts / "mpt_trt")
        assert files[0] == scripts / "tool.py"
        assert {str(path.relative_to(scripts)) for path in files} == BEHIND_TOOL
        assert len(files) == len(set(files))

    @pytest.mark.parametrize("name", MODULES)
    def test_an_edit_counts_where_the_script_runs_through_it(self, scripts, name: str) -> None:
        before = self.hash_now(scripts / "tool.py")
        with (scripts / name).open("a") as stream:
            stream.write("# edited\n")
        assert (self.hash_now(scripts / "tool.py") != before) == (name in BEHIND_TOOL)

    def test_a_new_import_counts(self, scripts: Path) -> None:
        with (scripts / "mpt_trt/from_init.py").open("a") as stream:
            stream.write("if False:\n    import mpt_trt.unrelated\n")
        before = self.hash_now(scripts / "tool.py")
        with (scripts / "mpt_trt/unrelated.py").open("a") as stream:
            stream.write("# edited\n")
        assert self.hash_now(scripts / "tool.py") != before

    def test_a_release_alone_does_not_count(self, scripts: Path) -> None:
        hashes = set()
        for version in ("1.0.0", "1.0.1"):
            (scripts / "mpt_trt/__init__.py").write_text(f'__version__ = "{version}"\n')
            hashes.add(self.hash_now(scripts / "tool.py"))
        assert len(hashes) == 1

    def test_scripts_differ(self, scripts: Path) -> None:
        assert self.hash_now(scripts / "tool.py") != self.hash_now(scripts / "other_tool.py")

    def test_place_and_time_do_not_count(self, scripts: Path, tmp_path: Path) -> None:
        self.write(tmp_path / "elsewhere")
        for path in (tmp_path / "elsewhere").rglob("*.py"):
            os.utime(path, (0, 0))
        expected = self.hash_now(scripts / "tool.py")
        assert self.hash_now(tmp_path / "elsewhere" / "tool.py") == expected

    def test_what_a_tool_really_loads(self, tmp_path: Path) -> None:
        """Each module that a run of the converter has loaded at its end is in the list."""
        checkpoint = write_checkpoint(tmp_path / "checkpoint", CheckpointSpec(num_layers=1))
        script = tool_path("convert_hf_mpt_to_ft.py")
        run = (
            "import runpy, sys; "
            f"sys.path.insert(0, {str(REPOSITORY)!r}); "
            f"sys.argv = ['convert', '-i', {str(checkpoint)!r}, '-o', {str(tmp_path)!r}]; "
            f"runpy.run_path({str(script)!r}, run_name='__main__'); "
            "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('mpt_trt')), "
            "sep='\\n')"
        )
        output = subprocess.check_output([sys.executable, "-c", run], text=True)
        loaded = {line for line in output.splitlines() if line.endswith(".py")}
        assert str(REPOSITORY / "mpt_trt" / "ft" / "checkpoint.py") in loaded
        assert loaded <= set(map(str, source_files(script)))

    def test_the_library_has_no_imports_that_are_not_followed(self) -> None:
        folders = ("mpt_trt", "workflow_scripts")
        for path in (path for name in folders for path in (REPOSITORY / name).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level), path


def test_reserved_file_holds_what_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        files.reserve(stream, 3)
        assert (tmp_path / "file").stat().st_size in (0, 3)  # 0 where nothing can be reserved
        stream.write(b"abc")
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_reserving_more_than_a_file_may_have_is_an_error(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("wb") as stream, pytest.raises(OSError) as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            files.reserve(stream, 1 << 21)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("start", [0, 1, 5000])
def test_mapped_pages_stay_what_they_are(start: int, tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 255, 20_000, np.uint8)
    content.tofile(tmp_path / "file")
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")[start:]
    files.map_pages(mapped)
    assert np.array_equal(mapped, content[start:])
