"""The environments of `--sdm conda` are the one that everything is tested in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from support.workflow import REPOSITORY

ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))
OURS = ("base", "tensorrt")


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if re.match(r"\w", line)]
    return dict(line.split("==") for line in lines)


def pip_pins(path: Path) -> dict[str, str]:
    (packages,) = (
        entry["pip"]
        for entry in yaml.safe_load(path.read_text())["dependencies"]
        if isinstance(entry, dict)
    )
    return dict(package.split("==") for package in packages)


@pytest.mark.parametrize("name", OURS)
def test_environments_hold_what_is_required_in_the_same_versions(name: str) -> None:
    required = pins(REPOSITORY / "requirements.txt")
    found = pip_pins(REPOSITORY / f"envs/{name}.yaml")
    assert required.items() <= found.items()
    if name == "base":
        assert found == required


@pytest.mark.parametrize("name", OURS)
def test_nothing_contradicts_the_constraints(name: str) -> None:
    constraints = {k.lower(): v for k, v in pins(REPOSITORY / "constraints.txt").items()}
    for package, version in pip_pins(REPOSITORY / f"envs/{name}.yaml").items():
        assert constraints.get(package.lower(), version) == version


def test_every_rule_names_an_environment_that_is_there() -> None:
    for module in (REPOSITORY / "rules").glob("*.smk"):
        text = module.read_text()
        named = re.findall(r'conda:\s+"\.\./envs/([\w-]+\.yaml)"', text)
        assert len(named) == len(re.findall(r"^rule ", text, re.MULTILINE))
        assert {f"{name}" for name in named} <= {path.name for path in ENVIRONMENTS}
