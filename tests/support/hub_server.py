"""A small Hugging Face hub on 127.0.0.1: real HTTP, for the real client.

Endpoints and headers: https://huggingface.co/docs/hub/api and the `resolve` URLs of
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Like the hub's large files, weights
are answered with a redirect to another host name; their size and hash are in `X-Linked-*`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Literal

# cut_off: the first answer stops half-way, later ones do not. lost: it stops half-way, and then the
# hub is down. short: half of it, announced as if that were all. stalled: half of it, then nothing
# for as long as the server lives.
Fault = Literal["cut_off", "lost", "short", "stalled"]

LARGE_FILES = {".safetensors", ".bin", ".h5", ".msgpack"}


@dataclass(frozen=True)
class Refusal:
    """A refusal of the hub: an HTTP status and its code for the reason."""

    status: int
    code: str


@dataclass
class Repository:
    """refs: commit of every branch. commits: files of every commit, by path.

    page: page that a portal before the hub returns instead of the description.
    """

    refs: dict[str, str]
    commits: dict[str, dict[str, bytes]]
    refuse_all: Refusal | None = None
    refuse_files: Refusal | None = None
    page: bytes | None = None
    faults: dict[str, Fault] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.cut_off: set[str] = set()
        self.ranges: list[str] = []
        self.stalled = threading.Event()
        self.stopped = threading.Event()
        self.contents: dict[str, tuple[str, str, bytes]] = {}
        self.add_contents()

    def add_contents(self) -> None:
        """Serves files that were added to a repository."""
        for source, repository in self.repositories.items():
            for files in repository.commits.values():
                for path, content in files.items():
                    self.contents[hashlib.sha256(content).hexdigest()] = (source, path, content)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def requested_files(self) -> set[str]:
        """Paths in the repository of all requested files."""
        return {path.split("/", 6)[5] for path in self.requests if "/resolve/" in path}

    def stop(self) -> None:
        """Stops the server; connections are then refused."""
        self.stopped.set()
        self.shutdown()
        self.server_close()


@contextmanager
def running_hub(repositories: dict[str, Repository]) -> Iterator[HubServer]:
    server = HubServer(repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        if not server.stopped.is_set():
            server.stop()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        match path.split("/")[1:]:
            case ["api", "models", owner, name, "revision", revision]:
                self._describe(f"{owner}/{name}", revision)
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case ["large", digest]:
                self._send_content(*self.server.contents[digest])
            case _:
                self._refuse(Refusal(404, "EntryNotFound"))

    def _commit(self, source: str, revision: str) -> tuple[Repository, str] | None:
        repository = self.server.repositories.get(source)
        if repository is None:
            self._refuse(Refusal(404, "RepoNotFound"))
            return None
        if repository.refuse_all is not None:
            self._refuse(repository.refuse_all)
            return None
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            self._refuse(Refusal(404, "RevisionNotFound"))
            return None
        return repository, commit

    def _describe(self, source: str, revision: str) -> None:
        if found := self._commit(source, revision):
            repository, commit = found
            if repository.page is not None:
                self._send(200, {"Content-Type": "text/html"}, repository.page)
                return
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            content = {"id": source, "sha": commit, "private": False, "siblings": siblings}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _resolve(self, source: str, revision: str, path: str) -> None:
        found = self._commit(source, revision)
        if found is None:
            return
        repository, commit = found
        if repository.refuse_files is not None:
            self._refuse(repository.refuse_files)
        elif path not in repository.commits[commit]:
            self._refuse(Refusal(404, "EntryNotFound"))
        elif PurePosixPath(path).suffix in LARGE_FILES:
            content = repository.commits[commit][path]
            digest = hashlib.sha256(content).hexdigest()
            location = f"http://localhost:{self.server.server_port}/large/{digest}"
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"'}
            self._send(302, {"X-Repo-Commit": commit, "Location": location, **linked}, b"")
        else:
            content = repository.commits[commit][path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self._send(200, headers, content)

    def _send_content(self, source: str, path: str, content: bytes) -> None:
        fault, half = self.server.repositories[source].faults.get(path), len(content) // 2
        is_first, wanted = path not in self.server.cut_off, self.headers.get("Range", "bytes=0-")
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        if fault == "short":
            self._send(200, {}, content[:half])
        elif fault is None or (fault == "cut_off" and not is_first):
            self.server.ranges.append(wanted)
            self._send(206 if start else 200, {}, content[start:])
        elif fault == "lost" and not is_first:
            self._refuse(Refusal(503, ""))
        else:
            self.server.cut_off.add(path)
            self._send(200, {}, content[:half], announced=len(content))
            if fault == "stalled":
                self.server.stalled.set()
                self.server.stopped.wait()

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Code": refusal.code, "X-Error-Message": f"message of {refusal.code}"}
        self._send(refusal.status, headers, b"{}")

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, announced: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.wfile.flush()
