"""Turns errors of the Hugging Face hub's client into one sentence that names the remedy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
from huggingface_hub import constants, errors

from mpt_trt.checkpoint.hub_environment import proxies, without_password
from mpt_trt.errors import MptTrtError

OFFLINE_REMEDY = (
    "connect to the network, set HF_HOME to a cache that holds the model, or give a local folder"
)
# The client's native part for Xet storage raises RuntimeError.
SILENCE = (httpx.RequestError, httpx.InvalidURL, ConnectionError, TimeoutError, RuntimeError)


class Unreachable(Exception):
    """Raised when the hub gives no usable answer; the text is the reason."""


@contextlib.contextmanager
def plain_errors(source: str, revision: str) -> Iterator[None]:
    """Turns the client's errors into MptTrtError, or Unreachable if there is no answer."""
    try:
        yield
    except errors.HFValidationError:
        raise MptTrtError(f"{source}: neither an existing folder nor a valid hub id") from None
    except (errors.HfHubHTTPError, OSError, *SILENCE) as error:
        cause: BaseException = error
        if isinstance(error, errors.LocalEntryNotFoundError):
            cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refusal(cause, source, revision) from error
        if not isinstance(cause, OSError) or isinstance(cause, SILENCE) or cause.errno is None:
            raise Unreachable(_reason(cause)) from error
        raise MptTrtError(
            f"{source} (revision {revision}): cannot be stored in the hub cache "
            f"{cache_folder()} ({cause.strerror}); free space or correct permissions, or set "
            "HF_HOME to another folder"
        ) from error


def offline(source: str, revision: str, reason: Exception) -> MptTrtError:
    """Makes the error for a model that neither the hub nor the cache can provide."""
    return MptTrtError(
        f"{source} (revision {revision}): the hub cannot be reached ({reason}), and the cache "
        f"{cache_folder()} does not hold it; {OFFLINE_REMEDY}"
    )


def cache_folder() -> Path:
    """The folder of the hub cache."""
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def _reason(error: BaseException) -> str:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if not isinstance(error, httpx.RequestError):
        return reason
    # The proxy or endpoint on the way to the hub, by the name of its variable.
    between = [f"{name} = {without_password(value)}" for name, value in proxies()]
    if endpoint := os.environ.get("HF_ENDPOINT"):
        between.append(f"HF_ENDPOINT = {without_password(endpoint)}")
    return f"{reason}; {', '.join(between)}" if between else reason


def _refusal(error: errors.HfHubHTTPError, source: str, revision: str) -> Exception:
    page = f"{constants.ENDPOINT}/{source}"
    status = error.response.status_code
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    if status == 429 or status >= 500:
        return Unreachable(f"HTTP status {status}")
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
