"""JSON files with any content: accepted, or rejected in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.json_text import MOST_BYTES, shown

BAD = {
    "lists 100,000 deep": (b"[" * 100_000, "nested|not valid JSON"),
    "closed lists 100,000 deep": (b"[" * 100_000 + b"]" * 100_000, "nested"),
    "objects 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    "lists 200 deep": (b'{"a":' + b"[" * 200 + b"]" * 200 + b"}", "nested"),
    "integer of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
    "integer of 401 digits": (b'{"a": -1' + b"0" * 400 + b"}", "401 digits"),
    "a list": (b"[1]", "expected a JSON object, found list"),
    "a number": (b"1", "expected a JSON object, found int"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "a comment": (b"{} // comment", "Extra data"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "BOM"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "half": (b'{"a": [1, 2', "not valid JSON"),
    "nothing": (b"", "not valid JSON"),
    "NUL bytes": (b"\0" * 100, "not valid JSON"),
    "too large": (b" " * (MOST_BYTES + 1), "larger than 16 MiB"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_content_is_refused(case: str, tmp_path: Path) -> None:
    content, message = BAD[case]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(MptTrtError, match=message) as raised:
        read_json(path)
    assert str(raised.value).startswith(str(path))
    assert len(str(raised.value)) < len(str(path)) + 250


def test_a_folder_a_pipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MptTrtError, match="not a file"):
        read_json(tmp_path)
    with pytest.raises(MptTrtError, match="not a file"):
        read_json(Path("/dev/zero"))
    with pytest.raises(MptTrtError, match="no such file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").symlink_to("config.json")
    with pytest.raises(
        MptTrtError, match=r"config.json: cannot be read: Too many levels of sym[^:]*$"
    ):
        read_json(tmp_path / "config.json")


def test_usual_content_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [9223372036854775807, -1.5e300, {"b": null}], "c": "é"}')
    assert read_json(path) == {"a": [9223372036854775807, -1.5e300, {"b": None}], "c": "é"}


def test_long_values_are_cut_in_messages() -> None:
    assert shown("mpt") == "'mpt'"
    assert len(shown("m" * 10_000)) == 80
