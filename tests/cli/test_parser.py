"""Options that name files and folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.cli.parser import tool_parser


def parse(*arguments: str) -> Path:
    parser = tool_parser("Does something.", "tool.py")
    parser.add_argument_group("files").add_argument("--output", type=Path)
    steps = parser.add_subparsers().add_parser("step")
    steps.add_argument("--output", type=Path)
    return parser.parse_args(arguments).output


@pytest.mark.parametrize("arguments", [("--output", ""), ("--output=",), ("step", "--output=")])
def test_an_empty_path_is_rejected(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(*arguments)
    assert raised.value.code == 2
    assert "argument --output: the path is empty; name a file or folder" in capsys.readouterr().err


def test_errors_are_one_line_that_points_to_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--ouput=x"], ["step", "--output"]):
        with pytest.raises(SystemExit) as raised:
            parse(*arguments)
        assert raised.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and line.endswith(" --help")


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("--output=~/engine") == Path("/home/somebody/engine")
    assert parse("--output=~no-such-user/engine") == Path("~no-such-user/engine")
    assert parse("--output=a~b") == Path("a~b")
