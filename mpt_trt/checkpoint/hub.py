"""Fetches checkpoints from the Hugging Face hub: the commit of a revision, and the files needed.

Files go into the hub's cache (`HF_HOME`), which other programs share. Only configuration, tokenizer
and one format of weights are downloaded, and nothing in a repository is executed. If the hub cannot
be reached, cached files are used.

Files are downloaded one by one with `hf_hub_download`: `snapshot_download` requests the listing
without a time limit, does not name the file whose download failed, and continues in threads that
Ctrl-C does not end.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, errors, hf_hub_download

from mpt_trt.checkpoint.files import INDEX_SUFFIX, WEIGHT_FILES
from mpt_trt.checkpoint.hub_errors import (
    OFFLINE_REMEDY,
    Unreachable,
    cache_folder,
    offline,
    plain_errors,
)
from mpt_trt.checkpoint.snapshot import COMMIT, Snapshot
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import replace_file

# Files are downloaded in the order of these tables, so if the last one exists, the others do as
# well.
CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)

# The client has no time limit, and a firewall may drop packets.
ANSWER_SECONDS = 10

log = logging.getLogger(__name__)


def resolve_revision(source: str, revision: str) -> str:
    """Resolves a branch, tag or commit to a commit (40 hexadecimal digits) on the hub.

    Makes one request. If the hub cannot be reached, the cache is used.

    Raises MptTrtError when the hub rejects the model or the revision, or when it cannot be reached
    and the cache does not have the revision.
    """
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = _ask_hub(source, revision).sha
    except Unreachable as reason:
        return _cached_commit(source, revision, reason)
    if commit is None or not COMMIT.fullmatch(commit):
        raise MptTrtError(
            f"{source} (revision {revision}): the answer names no commit; check HF_ENDPOINT"
        )
    # Only later runs without a network need it, so an unwritable cache is not an error yet.
    with contextlib.suppress(OSError, MptTrtError), replace_file(_ref(source, revision)) as ref:
        ref.write_text(commit)
    return commit


def fetch_checkpoint(source: str, revision: str, commit: str | None = None) -> Snapshot:
    """Fetches configuration, weights and, if there is one, tokenizer of a hub model into the cache.

    commit: the commit that `revision` was resolved to before; None resolves it now.

    Raises MptTrtError that names the model and the remedy when the hub rejects the request or
    cannot be reached, a file is missing, its download is interrupted, or the disk is full.
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
    """Fetches only the tokenizer's files; makes no request if they are cached.

    Arguments and errors are those of `fetch_checkpoint`.
    """
    commit = commit or resolve_revision(source, revision)
    repository = _cached_repository(source, revision, commit)
    if not repository.names.issuperset(TOKENIZER_FILES[-2:]):
        repository = _repository(source, revision, commit)
    repository.require("tokenizer.json")
    files = repository.present(TOKENIZER_FILES)
    paths = [repository.download(name) for name in files]
    return Snapshot(source, revision, commit, paths[0].parent, tuple(files))


@dataclass(frozen=True)
class _Repository:
    """Files of a commit, listed by the hub or by the cache.

    names: paths of its files. place, remedy: for the error about a missing file.
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
        """Chooses the weight file, or the index of the shards."""
        if weights := self.present(WEIGHT_FILES):
            return weights[0]
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
                raise MptTrtError(
                    f"{index}: weight_map names {shown(name)}, which is not a {suffix} file"
                )
            self.require(name)
        return shards

    def download(self, name: str) -> Path:
        """Downloads a file unless it is in the cache; returns its path there."""
        try:
            with plain_errors(self.source, self.revision):
                return Path(hf_hub_download(self.source, name, revision=self.commit))
        except Unreachable as reason:
            raise MptTrtError(
                f"{self.source} (revision {self.revision}): {name} could not be downloaded "
                f"({reason}); run the same command again, finished files are kept"
            ) from reason


def _repository(source: str, revision: str, commit: str) -> _Repository:
    """Lists the files of `commit` on the hub or, if it cannot be reached, in the cache."""
    try:
        siblings = _ask_hub(source, commit, asked=revision).siblings or ()
    except Unreachable as reason:
        cached = _cached_repository(source, revision, commit, reason)
        if not cached.names:
            raise offline(source, revision, reason) from reason
        log.warning("%s: the hub cannot be reached (%s); using the cache", source, reason)
        return cached
    names = frozenset(file.rfilename for file in siblings)
    remedy = "choose a model or revision in Hugging Face format"
    return _Repository(source, revision, commit, names, "on the hub", remedy)


def _cached_repository(
    source: str, revision: str, commit: str, reason: Exception | str = ""
) -> _Repository:
    folder = _model_folder(source) / "snapshots" / commit
    paths = folder.iterdir() if folder.is_dir() else ()
    names = frozenset(path.name for path in paths if path.is_file())
    place = f"in the hub cache, and the hub cannot be reached ({reason})"
    return _Repository(source, revision, commit, names, place, OFFLINE_REMEDY)


def _cached_commit(source: str, revision: str, reason: Exception) -> str:
    ref = _ref(source, revision)
    commit = ref.read_text().strip() if ref.is_file() else ""
    if not COMMIT.fullmatch(commit):
        raise offline(source, revision, reason) from reason
    log.warning(
        "%s: the hub cannot be reached (%s); for revision %s, commit %s of the cache is used",
        *(source, reason, revision, commit),
    )
    return commit


def _model_folder(source: str) -> Path:
    """Folder of a model in the hub's cache.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    return cache_folder() / f"models--{source.replace('/', '--')}"


def _ref(source: str, revision: str) -> Path:
    """File in the cache with the commit of a branch or tag."""
    return _model_folder(source) / "refs" / revision


def _ask_hub(source: str, revision: str, asked: str | None = None) -> ModelInfo:
    """Requests commit and file names of a revision; messages name `asked` instead, if given."""
    with plain_errors(source, asked or revision):
        try:
            return HfApi().model_info(source, revision=revision, timeout=ANSWER_SECONDS)
        except (errors.HFValidationError, errors.HfHubHTTPError):
            raise
        except (KeyError, TypeError, ValueError) as error:
            # For example, a login page, or a mirror with another protocol.
            raise Unreachable("its answer is not a hub's; check HF_ENDPOINT, proxy") from error
