"""Checks the environment variables of the hub's client before it is imported.

Some of them break its import (`HF_HUB_ETAG_TIMEOUT=10s`), others its first request.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import ssl
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mpt_trt.errors import MptTrtError

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")
# The first one that is set counts; the cache is that folder or one within it.
CACHES = {"HF_HUB_CACHE": "", "HUGGINGFACE_HUB_CACHE": "", "HF_HOME": "hub"}


def require_usable_environment() -> None:
    """Raises MptTrtError, naming the variable, when the hub's client cannot work with one."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        _require_connection()
    for name in TIMEOUTS:
        value = os.environ.get(name, "10").strip()
        if not (value.isdecimal() and int(value) > 0):
            raise _refused(name, value, "a whole number of seconds is required")
    _require_cache()


def proxies() -> Iterator[tuple[str, str]]:
    """Names and values of the variables that set a proxy."""
    for upper in PROXIES:
        for name in (upper, upper.lower()):
            if (value := os.environ.get(name, "")).strip():
                yield name, value


def without_password(url: str) -> str:
    """Removes user and password from an address."""
    scheme, mark, rest = url.rpartition("://")
    return scheme + mark + rest.rpartition("@")[2]


def _require_connection() -> None:
    for name, value in proxies():
        _require_proxy(name, value)
    for name in ("NO_PROXY", "no_proxy"):
        _require_exceptions(name, os.environ.get(name, ""))
    _require_certificates()
    _require_token()
    _require_endpoint()


def _require_proxy(name: str, value: str) -> None:
    shown = without_password(value)
    if value != value.strip():
        raise _refused(name, shown, "the client does not remove white space around it")
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address or parts.scheme.lower() not in PROXY_SCHEMES:
        why = f"an address with one of {', '.join(PROXY_SCHEMES)} is required (http://host:port)"
        raise _refused(name, shown, why)
    if parts.scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
        why = "a SOCKS proxy needs another package: pip install 'httpx[socks]'"
        raise _refused(name, shown, why)


def _require_exceptions(name: str, value: str) -> None:
    for entry in filter(None, (part.strip() for part in value.split(","))):
        if len(entry.split()) > 1:
            raise _refused(name, value, "commas are required between its entries")
        if entry.startswith("["):
            why = f"{entry} has brackets, which the client does not support around addresses"
            raise _refused(name, value, why)
        address, has_range, _ = entry.partition("/")
        if has_range and _is_ipv6(address):
            why = f"{entry} is a range of IPv6 addresses, which the client does not support"
            raise _refused(name, value, why)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _require_certificates() -> None:
    file, folders = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if file:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise _refused("SSL_CERT_FILE", file, f"no certificates there ({reason})") from None
    if folders and not any(Path(part).is_dir() for part in folders.split(os.pathsep)):
        raise _refused("SSL_CERT_DIR", folders, "no such folder")
    if secrets := os.environ.get("SSLKEYLOGFILE"):
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).keylog_filename = secrets
        except OSError as error:
            why = f"the keys of connections cannot be written there ({error.strerror})"
            raise _refused("SSLKEYLOGFILE", secrets, why) from None


def _require_token() -> None:
    for name in TOKENS:
        _require_token_characters(name, os.environ.get(name, ""))
    if path := os.environ.get("HF_TOKEN_PATH"):
        file = Path(os.path.expandvars(path)).expanduser()
        try:
            token = file.read_text(encoding="utf-8") if file.exists() else ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "not a text"
            raise _refused("HF_TOKEN_PATH", path, f"no token there ({reason})") from None
        _require_token_characters(f"HF_TOKEN_PATH = {path!r}", token)


def _require_token_characters(name: str, token: str) -> None:
    for position, character in enumerate(token.strip(), start=1):
        if not "!" <= character <= "~":
            raise MptTrtError(
                f"{name}: character {position} is {character!r}, which no token contains; copy "
                "the token again, or unset the variable"
            )


def _require_endpoint() -> None:
    value = os.environ.get("HF_ENDPOINT", "")
    if not value:
        return
    shown = without_password(value)
    if not value.lower().startswith(("http://", "https://")):
        raise _refused("HF_ENDPOINT", shown, "http:// or https:// is missing")
    try:
        parts = urlsplit(value)
        is_address = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address:
        raise _refused("HF_ENDPOINT", shown, "an address is required (https://host)")


def _require_cache() -> None:
    for name, inner in CACHES.items():
        if (value := os.environ.get(name)) is None:
            continue
        if not value:
            raise _refused(name, value, "the hub's cache would be in the working directory")
        try:
            folder = Path(os.path.expandvars(value), inner).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            why = f"the hub's cache cannot be made there ({reason}); name a folder for it"
            raise _refused(name, value, why) from None
        return


def _refused(name: str, value: str, why: str) -> MptTrtError:
    return MptTrtError(f"{name} = {value!r}: {why}; correct or unset the variable")
