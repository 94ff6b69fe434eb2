"""Checkpoints on the Hugging Face hub: the commit of a revision, and its files that are needed.

Files go into the hub's own cache (`HF_HOME`), which other programs share. Only configuration,
tokenizer and one format of weights are downloaded, and nothing in a repository is executed. What
the cache holds is used when the hub cannot be reached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt.checkpoint.files import INDEX_SUFFIX, WEIGHT_FILES
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import hard_link, read_json, replace_directory, replace_file

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo
    from huggingface_hub.errors import HfHubHTTPError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
RECORD = "source.json"
RECORD_FIELDS = ("source", "revision", "commit")

# Files are downloaded in the order of these tables: where the last one is, so are the others.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")

# The client itself waits for ever where a firewall swallows packets.
ANSWER_SECONDS = 10
OFFLINE_REMEDY = (
    "connect to the network, set HF_HOME to a cache that holds the model, or give a local folder"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit in the hub cache.

    revision: as asked for. commit: 40 hexadecimal digits. folder: holds the files, and maybe others
    that other programs have downloaded.
    """

    source: str
    revision: str
    commit: str
    folder: Path
    files: tuple[str, ...]

    def record(self) -> dict[str, str]:
        """Where the files come from, for manifests."""
        return {name: getattr(self, name) for name in RECORD_FIELDS}


def is_hub_id(source: str) -> bool:
    """Whether `source` is spelt `owner/name` and no local file or folder has that path.

    Names without an owner, which a few of the hub's oldest models have, count as paths.
    """
    return HUB_ID.fullmatch(source) is not None and not Path(source).exists()


def resolve_revision(source: str, revision: str) -> str:
    """The commit (40 hexadecimal digits) that a branch, tag or commit of a hub model stands for.

    One request; when the hub cannot be reached, what the cache has for the revision.

    Raises MptTrtError when the hub refuses the model or the revision, and when it cannot be reached
    and the cache does not know the revision.
    """
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = _ask_hub(source, revision).sha
    except _Unreachable as reason:
        return _cached_commit(source, revision, reason)
    if commit is None or not COMMIT.fullmatch(commit):
        raise MptTrtError(
            f"{source} (revision {revision}): the answer names no commit; check HF_ENDPOINT"
        )
    # Serves later runs without network only; a cache that cannot be written shows when it matters.
    with contextlib.suppress(OSError, MptTrtError), replace_file(_ref(source, revision)) as ref:
        ref.write_text(commit)
    return commit


def fetch_checkpoint(source: str, revision: str, commit: str | None = None) -> Snapshot:
    """Configuration, weights and, where there is one, tokenizer of a hub model, into the cache.

    commit: what `revision` was resolved to before; None resolves it now.

    Raises MptTrtError that names the model and the remedy when the hub refuses or cannot be
    reached, a file is missing or its download is cut off, or the disk is full.
    """
    repository = _repository(source, revision, commit or resolve_revision(source, revision))
    repository.require("config.json")
    weights = repository.weights()
    files = [*repository.present(CONFIG_FILES + TOKENIZER_FILES), weights]
    paths = [repository.download(name) for name in files]
    if weights.endswith(INDEX_SUFFIX):
        shards = repository.shards(paths[-1])
        paths += [repository.download(name) for name in shards]
        files += shards
    return Snapshot(source, revision, repository.commit, paths[0].parent, tuple(files))


def fetch_tokenizer(source: str, revision: str, commit: str | None = None) -> Snapshot:
    """Like `fetch_checkpoint`, of the tokenizer's files alone; asks nothing if they are cached."""
    commit = commit or resolve_revision(source, revision)
    repository = _cached_repository(source, revision, commit)
    if not repository.names.issuperset(TOKENIZER_FILES[1:]):
        repository = _repository(source, revision, commit)
    repository.require("tokenizer.json")
    files = repository.present(TOKENIZER_FILES)
    paths = [repository.download(name) for name in files]
    return Snapshot(source, revision, commit, paths[0].parent, tuple(files))


def local_folder(
    source: str,
    revision: str = "main",
    fetch: Callable[[str, str], Snapshot] = fetch_checkpoint,
) -> tuple[Path, dict[str, str]]:
    """The folder of a checkpoint, and where it comes from (for manifests).

    source: a folder, or a hub id, of which `fetch` gets `revision`. The second result holds source,
    revision and commit, or, of a folder that `link_folder` did not make, the path alone as
    `source`.

    Raises MptTrtError when there is no such folder, or the hub does not provide the files.
    """
    if is_hub_id(source):
        snapshot = fetch(source, revision)
        return snapshot.folder, snapshot.record()
    folder = Path(source).expanduser()
    if not folder.is_dir():
        kind = "not a folder" if folder.exists() else "no such folder"
        raise MptTrtError(
            f"{source}: {kind}; give a folder in Hugging Face format or a hub id (owner/name)"
        )
    return folder, _recorded_origin(folder) or {"source": source}


def tokenizer_folder(source: str, revision: str = "main") -> Path:
    """The folder that holds the tokenizer of `source`, a folder or a hub id."""
    return local_folder(source, revision, fetch_tokenizer)[0]


def tokenizer_folder_of(made: Path, origin: dict, asked: str | None) -> Path:
    """The folder of the tokenizer for something that was made from a checkpoint.

    origin: of the checkpoint, as the manifest of `made` has it. asked: a folder or hub id that is
    taken instead, unless None.

    Raises MptTrtError when neither says where the tokenizer is, or it is not there.
    """
    source = asked or origin.get("source")
    if source is None:
        raise MptTrtError(
            f"{made}: does not say where its checkpoint came from; give --tokenizer_dir"
        )
    revision = origin.get("commit", "main") if source == origin.get("source") else "main"
    return tokenizer_folder(source, revision)


def link_folder(snapshot: Snapshot, target: Path) -> None:
    """Makes `target` a folder of symbolic links to the files of `snapshot`, plus `source.json`.

    Where the file system has no symbolic links they are hard links, or copies. `target` is complete
    or absent. Raises MptTrtError when it is there already and holds something else.
    """
    _require_replaceable(target)
    sizes = {name: (snapshot.folder / name).stat().st_size for name in snapshot.files}
    with replace_directory(target) as partial:
        for name in snapshot.files:
            try:
                (partial / name).symlink_to(snapshot.folder / name)
            except PermissionError:
                hard_link(snapshot.folder / name, partial / name)
        record = {**snapshot.record(), "files": sizes}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _require_replaceable(target: Path) -> None:
    if target.is_dir():
        if (target / RECORD).is_file() or not any(target.iterdir()):
            return
    elif not target.exists():
        return
    raise MptTrtError(
        f"{target}: holds something else than a fetched checkpoint, which would be lost; "
        "name another folder"
    )


def read_record(path: Path) -> dict[str, str]:
    """source, revision and commit from a JSON file; raises MptTrtError if they are not there."""
    content = read_json(path)
    record = {name: content.get(name) for name in RECORD_FIELDS}
    if not all(isinstance(value, str) for value in record.values()):
        raise MptTrtError(f"{path}: fields {', '.join(RECORD_FIELDS)} are expected; make it again")
    if not COMMIT.fullmatch(record["commit"]):
        raise MptTrtError(f"{path}: commit = {record['commit']!r}: 40 hexadecimal digits expected")
    return record


@dataclass(frozen=True)
class _Repository:
    """A commit of a hub model, as far as we see it.

    names: paths of its files. place: where we saw them. remedy: if one is missing.
    """

    source: str
    revision: str
    commit: str
    names: frozenset[str]
    place: str
    remedy: str

    def present(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if name in self.names]

    def require(self, name: str) -> None:
        if name not in self.names:
            raise MptTrtError(
                f"{self.source} (revision {self.revision}): no {name} {self.place}; {self.remedy}"
            )

    def weights(self) -> str:
        """The weight file, or the index of the shards."""
        if found := self.present(WEIGHT_FILES):
            return found[0]
        raise MptTrtError(
            f"{self.source} (revision {self.revision}): no weights ({', '.join(WEIGHT_FILES)}) "
            f"{self.place}; {self.remedy}"
        )

    def shards(self, index: Path) -> list[str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise MptTrtError(f"{index}: field weight_map is missing; choose another revision")
        suffix = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
        shards = sorted({str(name) for name in weight_map.values()})
        for name in shards:
            if "/" in name or not name.endswith(suffix):
                raise MptTrtError(f"{index}: weight_map names {name!r}, which is no {suffix} file")
            self.require(name)
        return shards

    def download(self, name: str) -> Path:
        """The file in the cache, downloaded unless it is there."""
        from huggingface_hub import hf_hub_download

        try:
            with _plain_errors(self.source, self.revision):
                return Path(hf_hub_download(self.source, name, revision=self.commit))
        except _Unreachable as reason:
            raise MptTrtError(
                f"{self.source} (revision {self.revision}): {name} could not be downloaded "
                f"({reason}); run the same command again, finished files are kept"
            ) from reason


def _repository(source: str, revision: str, commit: str) -> _Repository:
    """What the hub has of `commit` or, when it cannot be reached, what the cache has."""
    try:
        siblings = _ask_hub(source, commit, asked=revision).siblings or ()
    except _Unreachable as reason:
        cached = _cached_repository(source, revision, commit, reason)
        if not cached.names:
            raise _offline(source, revision, reason) from reason
        log.warning("%s: the hub cannot be reached (%s); using the cache", source, reason)
        return cached
    names = frozenset(file.rfilename for file in siblings)
    remedy = "choose a model or revision in Hugging Face format"
    return _Repository(source, revision, commit, names, "on the hub", remedy)


def _cached_repository(
    source: str, revision: str, commit: str, reason: Exception | str = ""
) -> _Repository:
    folder = _cache_folder(source) / "snapshots" / commit
    found = folder.iterdir() if folder.is_dir() else ()
    names = frozenset(path.name for path in found if path.is_file())
    place = f"in the hub cache, and the hub cannot be reached ({reason})"
    return _Repository(source, revision, commit, names, place, OFFLINE_REMEDY)


def _cached_commit(source: str, revision: str, reason: Exception) -> str:
    ref = _ref(source, revision)
    commit = ref.read_text().strip() if ref.is_file() else ""
    if not COMMIT.fullmatch(commit):
        raise _offline(source, revision, reason) from reason
    log.warning(
        "%s: the hub cannot be reached (%s); revision %s is taken to be commit %s, as in the cache",
        *(source, reason, revision, commit),
    )
    return commit


def _cache_folder(source: str) -> Path:
    """The hub cache's folder of a model.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / f"models--{source.replace('/', '--')}"


def _ref(source: str, revision: str) -> Path:
    """The cache's file with the commit of a branch or tag."""
    return _cache_folder(source) / "refs" / revision


def _recorded_origin(folder: Path) -> dict[str, str] | None:
    """What `link_folder` recorded in `folder`; None for any other folder."""
    record = folder / RECORD
    if not record.is_file():
        return None
    content = read_json(record)
    if not content.keys() >= {*RECORD_FIELDS, "files"}:
        return None
    for name in content["files"]:
        if not (folder / name).is_file():
            raise MptTrtError(
                f"{folder / name}: the hub cache no longer holds the file that it links to; "
                "fetch the checkpoint again"
            )
    return read_record(record)


class _Unreachable(Exception):
    """The hub gives no usable answer; the text says why."""


def _ask_hub(source: str, revision: str, asked: str | None = None) -> ModelInfo:
    """Commit and file names of a revision. asked: how messages call it, if not `revision`."""
    from huggingface_hub import HfApi, errors

    with _plain_errors(source, asked or revision):
        try:
            return HfApi().model_info(source, revision=revision, timeout=ANSWER_SECONDS)
        except (errors.HFValidationError, errors.HfHubHTTPError):
            raise
        except (KeyError, TypeError, ValueError) as error:
            # A login page, say, or a mirror that speaks another language.
            raise _Unreachable("its answer is not a hub's; check HF_ENDPOINT, proxy") from error


@contextlib.contextmanager
def _plain_errors(source: str, revision: str) -> Iterator[None]:
    """Turns what the hub's client raises into MptTrtError, or _Unreachable if nobody answers."""
    import httpx
    from huggingface_hub import errors

    # RuntimeError is what the client's native part for Xet storage raises.
    silence = (httpx.RequestError, httpx.InvalidURL, ConnectionError, TimeoutError, RuntimeError)
    try:
        yield
    except errors.HFValidationError:
        raise MptTrtError(f"{source}: no folder, and not a possible hub id either") from None
    except (errors.HfHubHTTPError, OSError, *silence) as error:
        cause = error
        if isinstance(error, errors.LocalEntryNotFoundError):
            cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refusal(cause, source, revision) from error
        if isinstance(cause, silence) or getattr(cause, "errno", None) is None:
            raise _Unreachable(_reason(cause)) from error
        raise MptTrtError(
            f"{source} (revision {revision}): cannot be stored in the hub cache "
            f"{_cache_folder(source).parent} ({cause.strerror}); free space or correct "
            "permissions, or set HF_HOME to another folder"
        ) from error


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _refusal(error: HfHubHTTPError, source: str, revision: str) -> Exception:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source}"
    status = error.response.status_code
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if status == 429 or status >= 500:
        return _Unreachable(f"HTTP status {status}")
    if isinstance(error, errors.GatedRepoError):
        remedy = f"the model is gated; accept its terms at {page}, then {log_in}"
    elif isinstance(error, errors.RevisionNotFoundError):
        remedy = f"no such revision; choose a branch, tag or commit of {page}"
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        remedy = (
            f"no such model at {constants.ENDPOINT}, nor a local folder of that name; "
            f"correct the name or, if the model is private, {log_in}"
        )
    else:
        detail = error.server_message or f"see {page}"
        remedy = f"refused with HTTP status {status} ({detail}); {log_in}, or choose another model"
    return MptTrtError(f"{source} (revision {revision}): {remedy}")


def _offline(source: str, revision: str, reason: Exception) -> MptTrtError:
    return MptTrtError(
        f"{source} (revision {revision}): the hub cannot be reached ({reason}), and the cache "
        f"{_cache_folder(source).parent} does not hold it; {OFFLINE_REMEDY}"
    )
