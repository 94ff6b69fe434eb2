"""Outputs that are complete or absent, and never replace what our tools did not write."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system import disk_errors, disk_sync, replace, staging, staging_names
from mpt_trt.system.replace import FolderKind, read_mark, replace_directory, replace_file
from support.paths import REPOSITORY

REMEDIES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENAMETOOLONG: "the name is too long",
}
MARK = "mark.json"


def own_files(folder: Path) -> list[str] | None:
    files = read_mark(folder / MARK).get("files")
    return [MARK, *files] if isinstance(files, list) else None


KIND = FolderKind("a test result", own_files)


def write_result(folder: Path, text: str, *names: str) -> None:
    """Makes a folder of KIND whose files hold `text`."""
    names = names or ("file",)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / MARK).write_text(json.dumps({"files": names}))


def tree(folder: Path) -> dict[str, str | None]:
    """Everything below a folder: the text of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if path.name != MARK
    }


def leftover(target: Path, process: int, host: str = "") -> Path:
    name = f".{target.name}.partial-{host or socket.gethostname()}-{process}"
    return target.with_name(f"{name}-{secrets.token_hex(4)}")


WAYS = ("exchange", "two steps")
"""Ways of putting folders in place: two steps if the file system cannot exchange them."""


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two steps":
        monkeypatch.setattr(replace, "exchange", lambda first, second: False)
    return request.param


@pytest.fixture
def dead_process() -> int:
    """Id of a process that has ended."""
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
        with replace_directory(target, KIND) as folder:
            (folder / "file").write_text("new")
            assert not target.exists()
            assert folder.parent.parent == target.parent
        assert tree(target.parent) == {"target": None, "target/file": "new"}

    def test_old_content_goes_as_a_whole(self, tmp_path: Path, way: str) -> None:
        target = tmp_path / "target"
        write_result(target, "old", "sub/stale")
        with replace_directory(target, KIND) as folder:
            (folder / "file").write_text("new")
            assert tree(target) == {"sub": None, "sub/stale": "old"}
        assert tree(tmp_path) == {"target": None, "target/file": "new"}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("existed", [True, False])
    def test_failure_changes_nothing(self, tmp_path: Path, error: type, existed: bool) -> None:
        target = tmp_path / "target"
        if existed:
            write_result(target, "old")
        before = tree(tmp_path)
        with pytest.raises(error), replace_directory(target, KIND) as folder:
            (folder / "file").write_text("new")
            raise error
        assert tree(tmp_path) == before

    def test_full_disk(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        write_result(target, "old")
        before = tree(tmp_path)
        message = f"^cannot write {target}: the disk is full; free space"
        with pytest.raises(MptTrtError, match=message), replace_directory(target, KIND) as folder:
            (folder / "file").symlink_to("/dev/full")
            (folder / "file").write_text("new")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("force", [True, False])
    @pytest.mark.parametrize("kind", ["file", "link to a folder", "link to ours", "dangling link"])
    def test_files_and_links_are_kept(self, tmp_path: Path, kind: str, force: bool) -> None:
        target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
        write_result(elsewhere, "kept")
        if kind != "link to ours":
            (elsewhere / MARK).unlink()
        if kind == "file":
            target.write_text("kept")
        else:
            target.symlink_to(tmp_path / "nothing" if kind == "dangling link" else elsewhere)
        before = tree(tmp_path)
        message = "a file, which" if kind == "file" else "a symbolic link, which"
        with (
            pytest.raises(MptTrtError, match=f"^{target}: {message}"),
            replace_directory(target, KIND, force=force),
        ):
            raise AssertionError("refused too late")
        assert tree(tmp_path) == before
        assert target.is_symlink() == (kind != "file")

    @pytest.mark.parametrize("marked", [True, False])
    @pytest.mark.parametrize("stray", ["thesis.txt", "sub/thesis.txt", ".hidden", "link"])
    def test_files_of_others_are_kept(
        self, tmp_path: Path, way: str, marked: bool, stray: str
    ) -> None:
        target = tmp_path / "target"
        write_result(target, "old")
        if not marked:
            (target / MARK).unlink()
        (target / stray).parent.mkdir(exist_ok=True)
        if stray == "link":
            (target / stray).symlink_to(tmp_path)
        else:
            (target / stray).write_text("years of work")
        before = tree(target)
        message = re.escape(stray) if marked else "it is not empty and not a test result"
        with (
            pytest.raises(MptTrtError, match=f"^{target}: not replaced, because {message}"),
            replace_directory(target, KIND),
        ):
            raise AssertionError("refused too late")
        assert tree(target) == before
        with replace_directory(target, KIND, force=True) as folder:
            write_result(folder, "new")
        assert tree(tmp_path) == {"target": None, "target/file": "new"}

    def test_files_that_come_meanwhile_are_kept(self, tmp_path: Path, way: str) -> None:
        target = tmp_path / "target"
        write_result(target, "old")
        with (
            pytest.raises(MptTrtError, match=r"because thesis\.txt in it is not a file of this"),
            replace_directory(target, KIND) as folder,
        ):
            write_result(folder, "new")
            (target / "thesis.txt").write_text("years of work")
        expected = {"target": None, "target/file": "old", "target/thesis.txt": "years of work"}
        assert tree(tmp_path) == expected

    def test_files_that_come_at_the_last_moment_are_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target, exchange = tmp_path / "target", replace.exchange
        write_result(target, "old")

        def late(first: Path, second: Path) -> bool:
            if (first / "file").read_text() == "new":
                (target / "thesis.txt").write_text("years of work")
            return exchange(first, second)

        monkeypatch.setattr(replace, "exchange", late)
        with (
            pytest.raises(MptTrtError, match=r"because thesis\.txt in it is not a file of this"),
            replace_directory(target, KIND) as folder,
        ):
            write_result(folder, "new")
        expected = {"target": None, "target/file": "old", "target/thesis.txt": "years of work"}
        assert tree(tmp_path) == expected

    @pytest.mark.parametrize("name", [".snakemake_timestamp", "sub/.nfs0000000000001", "empty/"])
    def test_traces_of_systems_are_nobodys(self, tmp_path: Path, name: str) -> None:
        target = tmp_path / "target"
        write_result(target, "old")
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).mkdir() if name.endswith("/") else (target / name).touch()
        with replace_directory(target, KIND) as folder:
            write_result(folder, "new")
        assert tree(tmp_path) == {"target": None, "target/file": "new"}

    @pytest.mark.parametrize("force", [True, False])
    @pytest.mark.parametrize("source", ["target", "target/sub", "target/sub/file", ".", "link"])
    def test_inputs_and_folders_around_or_inside_them_are_kept(
        self, tmp_path: Path, source: str, force: bool
    ) -> None:
        target = tmp_path / "target"
        write_result(target, "old", "sub/file")
        (tmp_path / "link").symlink_to(target / "sub")
        before = tree(tmp_path)
        with (
            pytest.raises(MptTrtError, match=rf"^{target}: not replaced, because .*the input"),
            replace_directory(target, KIND, [tmp_path / source], force),
        ):
            raise AssertionError("refused too late")
        assert tree(tmp_path) == before

    def test_a_new_folder_inside_the_input(self, tmp_path: Path) -> None:
        """`-i . -o ft` loses nothing."""
        write_result(tmp_path / "input", "kept")
        with replace_directory(tmp_path / "input/new", KIND, [tmp_path / "input"]) as folder:
            write_result(folder, "new")
        assert tree(tmp_path / "input") == {"file": "kept", "new": None, "new/file": "new"}

    @pytest.mark.parametrize("name", [".", "/", "..", "sub/.."])
    def test_names_that_cannot_be_replaced(self, tmp_path, monkeypatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        with (
            pytest.raises(MptTrtError, match="cannot be replaced as a whole; name a folder"),
            replace_directory(Path(name), KIND),
        ):
            raise AssertionError("refused too late")

    @pytest.mark.parametrize("length", [200, 255, 256, 5000])
    @pytest.mark.parametrize("letter", ["x", "ü"])
    def test_long_names(self, tmp_path: Path, length: int, letter: str) -> None:
        count, rest = divmod(length, len(letter.encode()))
        target = tmp_path / (letter * count + "y" * rest)
        if length > 255:
            with pytest.raises(MptTrtError, match="name is too long"), replace_file(target):
                raise AssertionError("refused too late")
            with (
                pytest.raises(MptTrtError, match="name is too long"),
                replace_directory(target, KIND),
            ):
                raise AssertionError("refused too late")
            return
        for text in ("old", "new"):
            with replace_directory(target, KIND) as folder:
                write_result(folder, text)
        assert tree(tmp_path) == {target.name: None, f"{target.name}/file": "new"}

    def test_many_at_once(self, tmp_path: Path, way: str) -> None:
        """Each succeeds, one of them last, and readers find a whole result all the time."""
        target, errors = tmp_path / "target", []
        write_result(target, "0", "a", "b")

        def write(text: str) -> None:
            try:
                for _ in range(20):
                    with replace_directory(target, KIND) as folder:
                        write_result(folder, text, "a", "b")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(str(n),)) for n in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            staging.recover(target)
            if way == "exchange":
                assert target.is_dir()
        assert not errors
        content = tree(tmp_path)
        assert content.keys() == {"target", "target/a", "target/b"}
        assert content["target/a"] == content["target/b"]

    def test_errors_of_inputs_are_not_those_of_the_output(self, tmp_path: Path) -> None:
        error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "input"))
        for place in (replace_directory(tmp_path / "out", KIND), replace_file(tmp_path / "out")):
            with pytest.raises(MptTrtError, match=f"^{tmp_path}/input: Permission denied$"), place:
                raise error

    def test_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        target = tmp_path / "file" / "target"
        with (
            pytest.raises(MptTrtError, match=f"cannot write {target}: a part of this path is a f"),
            replace_directory(target, KIND),
        ):
            pass

    def test_parent_that_is_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to("gone")
        target = tmp_path / "link" / "target"
        for place in (replace_directory(target, KIND), replace_file(target)):
            with pytest.raises(MptTrtError, match=f"cannot write {target}: .* a link to n"), place:
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["link"]

    @pytest.mark.parametrize("name", ["target", "tar[g]et*"])
    def test_leftovers(
        self, tmp_path: Path, name: str, dead_process: int, live_process: int
    ) -> None:
        """Leftovers of dead processes are removed; those of live ones and other machines stay."""
        target = tmp_path / name
        gone = [leftover(target, dead_process), leftover(target, os.getpid())]
        kept = [
            leftover(target, live_process),
            leftover(target, dead_process, "another-host"),
            tmp_path / "other",
            tmp_path / f".{name}.partial-{socket.gethostname()}-{dead_process}",
        ]
        for path in gone + kept:
            (path / "new" / "sub").mkdir(parents=True)
        with replace_directory(target, KIND):
            pass
        assert set(tmp_path.iterdir()) == {target, *kept}

    def test_work_in_progress_is_no_leftover(self, tmp_path: Path) -> None:
        """A lock distinguishes processes, because one in a container may have the same id."""
        with replace_directory(tmp_path / "target", KIND) as first:
            write_result(first, "first")
            with replace_directory(tmp_path / "target", KIND) as second:
                write_result(second, "second")
            assert first.exists()
        assert tree(tmp_path) == {"target": None, "target/file": "first"}


# Everything that a replacement executes, and that may be interrupted.
TRACED = (replace, staging, staging_names, disk_sync, disk_errors, shutil)


class Interruptions:
    """Runs a replacement that ends at one of the lines that it executes."""

    def __init__(self, target: Path):
        self.target = target

    def write(self, text: str) -> None:
        with replace_directory(self.target, KIND) as folder:
            write_result(folder, text, "a", "sub/b")

    def stop_at(self, line: int, stop: Callable[[], None]) -> None:
        """Replaces the target's content by `new`, and calls `stop` at the given line."""
        traced = {module.__file__ for module in TRACED}
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_filename not in traced:
                return None
            count += event == "line"
            if count == line:
                sys.settrace(None)
                stop()
            return trace

        sys.settrace(trace)
        try:
            self.write("new")
        finally:
            sys.settrace(None)

    def require_recoverable(self) -> None:
        staging.recover(self.target)
        for reader in ("old", "new"):
            if tree(self.target) == {"a": reader, "sub": None, "sub/b": reader}:
                break
        else:
            raise AssertionError(tree(self.target.parent))
        self.write("old")
        assert {path.name for path in self.target.parent.iterdir()} == {self.target.name}


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STOPS = {"interrupt": interrupt, "kill": kill}
PROGRAM = "import sys; from system.test_replace import stop_at_every_line as s; s(*sys.argv[1:])"


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_every_line(tmp_path: Path, way: str, stop: str) -> None:
    """The hundreds of forks come from a small process, which is several times as fast."""
    paths = os.pathsep.join(str(REPOSITORY / name) for name in (".", "tests"))
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "target"), way, stop],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def stop_at_every_line(target: str, way: str, stop: str) -> None:
    """Replaces a folder again and again, each time stopped some lines later."""
    if way == "two steps":
        replace.exchange = lambda first, second: False
    run = Interruptions(Path(target))
    run.write("old")
    for line in range(1, 5000, 7):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run.stop_at(line, STOPS[stop])
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(pid, 0)[1]
        run.require_recoverable()
        if status == 0:
            break
    assert line > 50


def test_files_that_several_move_together_never_mix(tmp_path: Path) -> None:
    target, names = tmp_path / "target", [f"file{number}" for number in range(30)]
    target.mkdir()
    errors: list[BaseException] = []

    def write(text: str, start: threading.Barrier) -> None:
        try:
            with staging.staging_directory(target / "result") as folder:
                for name in names:
                    (folder / name).write_text(text)
                start.wait(10)
                staging.move_together(folder, names, target)
        except BaseException as error:
            errors.append(error)

    for _ in range(20):
        start = threading.Barrier(3)
        threads = [threading.Thread(target=write, args=(text, start)) for text in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert len({(target / name).read_text() for name in names}) == 1
        assert sorted(path.name for path in target.iterdir()) == sorted(names)


class TestReplaceFile:
    def test_new_and_again(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "target"
        for text in ("first", "second"):
            with replace_file(target) as partial:
                partial.write_text(text)
                assert partial.parent.parent == target.parent
                assert not target.exists() or target.read_text() == "first"
            assert tree(target.parent) == {"target": text}

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_failure_changes_nothing(self, tmp_path: Path, error: type) -> None:
        target = tmp_path / "target"
        target.write_text("old")
        with pytest.raises(error), replace_file(target) as partial:
            partial.write_text("new")
            raise error
        assert tree(tmp_path) == {"target": "old"}

    def test_full_disk(self, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.write_text("old")
        message = f"^cannot write {target}: the disk is full; free space"
        with pytest.raises(MptTrtError, match=message), replace_file(target) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("new")
        assert tree(tmp_path) == {"target": "old"}

    @pytest.mark.parametrize("number", REMEDIES)
    def test_every_remedy(self, tmp_path: Path, number: int) -> None:
        message = f"cannot write {tmp_path / 'target'}: {REMEDIES[number]}"
        with pytest.raises(MptTrtError, match=message), replace_file(tmp_path / "target"):
            raise OSError(number, os.strerror(number))

    def test_other_errors_are_not_disguised(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="Input/output"), replace_file(tmp_path / "target"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert tree(tmp_path) == {}

    def test_leftovers(self, tmp_path: Path, dead_process: int) -> None:
        path = leftover(tmp_path / "target", dead_process)
        path.mkdir()
        (path / "new").write_text("half")
        with replace_file(tmp_path / "target") as partial:
            partial.write_text("new")
        assert tree(tmp_path) == {"target": "new"}

    @pytest.mark.parametrize("name", ["folder", ".", "..", "/"])
    def test_folders_are_kept(self, tmp_path, monkeypatch, name: str) -> None:
        monkeypatch.chdir(tmp_path)
        Path("folder").mkdir()
        with pytest.raises(MptTrtError, match=": a folder; name a file"), replace_file(Path(name)):
            raise AssertionError("refused too late")

    @pytest.mark.parametrize("source", ["input", "input/file", "link"])
    def test_inputs_are_kept(self, tmp_path: Path, source: str) -> None:
        file = tmp_path / "input" / "file"
        file.parent.mkdir()
        file.write_text("kept")
        (tmp_path / "link").symlink_to(file)
        for target in (file, tmp_path / "link"):
            with (
                pytest.raises(MptTrtError, match=f"^{target}: not replaced, because it is read"),
                replace_file(target, [tmp_path / source]),
            ):
                raise AssertionError("refused too late")
        assert file.read_text() == "kept"

    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_stays(self, tmp_path: Path, exists: bool) -> None:
        file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
        file.parent.mkdir()
        if exists:
            file.write_text("old")
        link.symlink_to("elsewhere/file")
        with replace_file(link) as partial:
            partial.write_text("new")
        assert link.is_symlink()
        assert tree(tmp_path) == {"elsewhere": None, "elsewhere/file": "new", "link": "new"}

    @pytest.mark.parametrize("is_link", [False, True])
    def test_a_read_only_file_is_kept(self, tmp_path: Path, is_link: bool) -> None:
        target = tmp_path / "target"
        if is_link:
            target.symlink_to("file")
        target.write_text("kept")
        target.chmod(0o444)
        refused = pytest.raises(MptTrtError, match=r"target: not replaced, because it is read-")
        with refused, replace_file(target) as partial:
            partial.write_text("new")
        assert target.read_text() == "kept"
        target.chmod(0o644)
        with replace_file(target) as partial:
            partial.write_text("new")
        assert target.read_text() == "new"

    def test_a_device_stays(self, tmp_path: Path) -> None:
        with replace_file(Path("/dev/null")) as partial:
            partial.write_text("new")
        assert Path("/dev/null").is_char_device()
        with (
            pytest.raises(MptTrtError, match="cannot write /dev/full: the disk is full"),
            replace_file(Path("/dev/full")) as partial,
        ):
            partial.write_text("new")

    def test_a_pipe_is_written_to(self, tmp_path: Path) -> None:
        pipe, read = tmp_path / "pipe", []
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
        reader.start()
        with replace_file(pipe) as partial:
            partial.write_text("x" * 100_000)
        reader.join(10)
        assert read == ["x" * 100_000]
        assert pipe.is_fifo()

    @pytest.mark.parametrize("kind", ["file", "pipe"])
    def test_standard_output(self, tmp_path: Path, kind: str) -> None:
        """The standard output is written to in order, even if it is a file."""
        program = (
            "from pathlib import Path\n"
            "from mpt_trt.system.replace import replace_file\n"
            "print('before')\n"
            "with replace_file(Path('/dev/stdout')) as partial:\n"
            "    partial.write_text('content\\n')\n"
            "print('after')"
        )
        command = [sys.executable, "-c", program]
        if kind == "pipe":
            text = subprocess.check_output(command, text=True)
        else:
            with (tmp_path / "out").open("w") as stream:
                subprocess.run(command, stdout=stream, check=True)
            text = (tmp_path / "out").read_text()
        assert text == "before\ncontent\nafter\n"
