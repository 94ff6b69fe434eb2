"""Reading and writing files, and what a script's outcome depends on."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
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
from mpt_trt.system.code_version import _named_content, source_files, source_hash
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.paths import REPOSITORY, tool_path

SHARED_MEMORY = Path("/dev/shm")


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder: the text of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


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
        self.forget()

    def forget(self) -> None:
        """Makes the next hash one of another process, which reads the files anew."""
        source_hash.cache_clear()
        _named_content.cache_clear()

    def write(self, folder: Path) -> None:
        for name, source in MODULES.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    def hash_now(self, script: Path) -> str:
        self.forget()
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
        assert str(REPOSITORY / "mpt_trt" / "ft" / "writer.py") in loaded
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
