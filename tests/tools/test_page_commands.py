"""Commands in the documentation are accepted by the parsers of the programs that they start."""

from __future__ import annotations

import re
import runpy
import shlex

import pytest
from snakemake.cli import get_argument_parser

from support.paths import REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
COMMAND = re.compile(
    r"^(?:    )?(?:PATH/|path/to/mpt-trt/)?\.venv/bin/((?:.*\\\n)*.*)$", re.MULTILINE
)
COMMANDS = [
    (page.name, shlex.split(command.replace("\\\n", " "), comments=True))
    for page in PAGES
    for command in COMMAND.findall(page.read_text())
]
SNAKEMAKE = [(page, words[1:]) for page, words in COMMANDS if words[0] == "snakemake"]
# Commands of other programs, such as mpirun, may start one of these.
SCRIPTS = [
    (page, words[words.index("python") + 1 :])
    for page, words in COMMANDS
    for words in [[word.removeprefix(".venv/bin/") for word in words]]
    if "python" in words and words[words.index("python") + 1].startswith("workflow_scripts/")
]


def test_commands_are_found() -> None:
    assert len(SNAKEMAKE) > 25 and len(SCRIPTS) > 20


@pytest.mark.parametrize(
    ("page", "words"), SNAKEMAKE, ids=[" ".join(each[1]) for each in SNAKEMAKE]
)
def test_snakemake_takes_the_targets_for_targets(page: str, words: list[str]) -> None:
    """Some options of Snakemake, such as --sdm, take all words up to the next option."""
    options = get_argument_parser().parse_args(words)
    assert options.targets or options.unlock, page


@pytest.mark.parametrize(("page", "words"), SCRIPTS, ids=[" ".join(each[1]) for each in SCRIPTS])
def test_scripts_accept_the_options(page: str, words: list[str]) -> None:
    parser = runpy.run_path(str(REPOSITORY / words[0]))["make_parser"]()
    parser.parse_args(words[1:])
