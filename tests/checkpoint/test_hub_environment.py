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
    ),
)
NO_SOCKS = importlib.util.find_spec("socksio") is None
WRONG = {
    "proxy of another kind": ("ALL_PROXY", "socks4://127.0.0.1:1080"),
    "proxy without host": ("HTTPS_PROXY", "http://"),
    "proxy's port": ("https_proxy", "http://proxy:80a"),
    "exceptions": ("NO_PROXY", "fd00::/8,10.0.0.0/8"),
    "certificate file": ("SSL_CERT_FILE", "/opt/conda/ssl/gone.pem"),
    "no certificates": ("SSL_CERT_FILE", __file__),
    "certificate folder": ("SSL_CERT_DIR", "/opt/conda/gone"),
    "endpoint": ("HF_ENDPOINT", "hf-mirror.example"),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:3128"),
        ("HTTPS_PROXY", "127.0.0.1:3128"),
        ("NO_PROXY", "localhost,127.0.0.1,::1,.example,10.0.0.0/8,*"),
        ("HF_TOKEN", "hf_abc\n"),
        ("HF_ENDPOINT", "http://127.0.0.1:9/"),
        ("HF_HUB_ETAG_TIMEOUT", "10"),
        ("HF_HUB_ETAG_TIMEOUT", ""),
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
