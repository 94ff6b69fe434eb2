"""Environments that break HTTP clients end in one sentence that names the variable."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mpt_trt.checkpoint.hub_environment import require_usable_environment
from mpt_trt.errors import MptTrtError
from support.engines import one_line_error, run_tool

NAMES = (
    *("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_ETAG_TIMEOUT"),
    *(
        "HF_HUB_OFFLINE",
        "HF_HUB_DOWNLOAD_TIMEOUT",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        "HF_TOKEN_PATH",
        "SSLKEYLOGFILE",
    ),
)
NO_SOCKS = importlib.util.find_spec("socksio") is None
WRONG = {
    "proxy of another kind": ("ALL_PROXY", "socks4://127.0.0.1:1080"),
    "proxy without host": ("HTTPS_PROXY", "http://"),
    "proxy's port": ("https_proxy", "http://proxy:80a"),
    "white space around a proxy": ("HTTPS_PROXY", " http://127.0.0.1:9 "),
    "exceptions in brackets": ("NO_PROXY", "localhost,[::1]"),
    "exceptions without commas": ("no_proxy", "localhost 127.0.0.1"),
    "exceptions": ("NO_PROXY", "fd00::/8,10.0.0.0/8"),
    "certificate file": ("SSL_CERT_FILE", "/opt/conda/ssl/gone.pem"),
    "no certificates": ("SSL_CERT_FILE", __file__),
    "certificate folder": ("SSL_CERT_DIR", "/opt/conda/gone"),
    "keys of connections": ("SSLKEYLOGFILE", "/proc/nowhere/keys"),
    "endpoint": ("HF_ENDPOINT", "hf-mirror.example"),
    "endpoint without host": ("HF_ENDPOINT", "https://"),
    "endpoint's address": ("HF_ENDPOINT", "http://[::1"),
    "endpoint's port": ("HF_ENDPOINT", "http://127.0.0.1:99999"),
    "token's folder": ("HF_TOKEN_PATH", "/proc"),
    "empty time-out": ("HF_HUB_DOWNLOAD_TIMEOUT", ""),
    "empty home": ("HF_HOME", ""),
    "empty cache": ("HF_HUB_CACHE", ""),
    "time-out": ("HF_HUB_ETAG_TIMEOUT", "10s"),
    "negative time-out": ("HF_HUB_DOWNLOAD_TIMEOUT", "-1"),
    "home": ("HF_HOME", "/proc/nowhere"),
    "cache": ("HF_HUB_CACHE", "/proc/nowhere"),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))


def refusal() -> str:
    with pytest.raises(MptTrtError) as error:
        require_usable_environment()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("name", "value"), WRONG.values(), ids=WRONG)
def test_the_variable_is_named(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    message = refusal()
    assert message.startswith(f"{name} = {value!r}: ")
    assert message.endswith("; correct or unset the variable")


@pytest.mark.skipif(not NO_SOCKS, reason="the package for SOCKS is installed")
@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_socks_needs_a_package(monkeypatch, scheme: str) -> None:
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://me:secret@127.0.0.1:1080")
    message = refusal()
    assert message.startswith(f"ALL_PROXY = '{scheme}://127.0.0.1:1080': a SOCKS proxy needs")
    assert "pip install 'httpx[socks]'" in message


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize("token", ["hf_abc\u2026", "hf_abc\nhf_def", "hf_abc def"])
def test_stray_characters_of_a_token(monkeypatch, name: str, token: str) -> None:
    monkeypatch.setenv(name, token)
    message = refusal()
    assert message.startswith(f"{name}: character 7 is {token[6]!r}, which no token contains")
    assert "hf_" not in message


def test_stray_characters_of_a_token_file(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_abc\u2026\n")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    message = refusal()
    assert message.startswith(f"HF_TOKEN_PATH = '{tmp_path}/token': character 7 is '\u2026'")
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    assert "no token there (not a text)" in refusal()


def test_variables_in_a_cache_are_replaced(monkeypatch, tmp_path: Path) -> None:
    """Only the folder that the client uses is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_PLACE", str(tmp_path / "place"))
    monkeypatch.setenv("HF_HOME", "$MY_PLACE/hf")
    require_usable_environment()
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "hf" / "hub").is_dir()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:3128"),
        ("HTTPS_PROXY", "127.0.0.1:3128"),
        ("NO_PROXY", "localhost,127.0.0.1,::1,.example,10.0.0.0/8,*"),
        ("HF_TOKEN", "hf_abc\n"),
        ("HF_ENDPOINT", "http://127.0.0.1:9/"),
        ("HF_HUB_ETAG_TIMEOUT", "10"),
        ("HF_ENDPOINT", "HTTPS://mirror.example"),
        ("HF_TOKEN_PATH", "/nowhere/token"),
        ("SSL_CERT_DIR", "/gone:/tmp"),
    ],
)
def test_usable_values(monkeypatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    require_usable_environment()


def test_offline_needs_no_connection(monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:1080")
    require_usable_environment()


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "10s", "HF_HUB_ETAG_TIMEOUT = '10s'"),
        ("HF_TOKEN", "hf_abc\u2026", "HF_TOKEN: character 7"),
        ("HTTPS_PROXY", "127.0.0.1:9", "HTTPS_PROXY = 127.0.0.1:9"),
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:9", "HTTPS_PROXY = http://127.0.0.1:9"),
        ("HF_ENDPOINT", "http://127.0.0.1:9/", "HF_ENDPOINT = http://127.0.0.1:9/"),
        ("HF_ENDPOINT", "http://me:secret@127.0.0.1:9", "HF_ENDPOINT = http://127.0.0.1:9"),
    ],
)
def test_commands(monkeypatch, tmp_path: Path, name: str, value: str, shown: str) -> None:
    monkeypatch.setenv(name, value)
    result = run_tool(
        "steps/fetch_checkpoint.py",
        *("resolve", "--source", "mosaicml/mpt-7b", "--output", tmp_path / "revision.json"),
    )
    message = one_line_error(result)
    assert shown in message
    assert "secret" not in message
