"""Messages of the library in a tool's own words."""

from __future__ import annotations

import pytest

from mpt_trt.cli.own_flags import own_flags
from mpt_trt.errors import MptTrtError, SharedError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_new_tokens is 0; lower max_new_tokens", "--n is 0; lower --n"),
        ("my_max_new_tokens, max_new_tokens_", "my_max_new_tokens, max_new_tokens_"),
        ("smoke_test.max_new_tokens = 3", "smoke_test.max_new_tokens = 3"),
        ("name it (--calibration)", "name it (--npz)"),
        ("--calibration_text", "--calibration_text"),
    ],
)
@pytest.mark.parametrize("kind", [MptTrtError, SharedError])
def test_names_become_flags(text: str, expected: str, kind: type[MptTrtError]) -> None:
    @own_flags({"max_new_tokens": "--n", "--calibration": "--npz"})
    def fail() -> None:
        raise kind(text)

    with pytest.raises(kind) as caught:
        fail()
    assert str(caught.value) == expected


def test_other_errors_stay() -> None:
    with pytest.raises(KeyError, match="a"), own_flags({"a": "b"}):
        raise KeyError("a")
