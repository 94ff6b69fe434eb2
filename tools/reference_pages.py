"""Makes the tables of docs/config.md and docs/scripts.md from the schema and the scripts."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mpt_trt.workflow.settings import SCHEMA

SCRIPTS = "workflow_scripts"


def configuration() -> str:
    """Makes Markdown tables of all keys of config.yaml, one table per section."""
    schema = yaml.safe_load(SCHEMA.read_text())
    definitions = schema["$defs"]
    sections = {
        "models.{name}": definitions["model"],
        "variants.{name}": definitions["variant"],
        **{
            name: section
            for name, section in schema["properties"].items()
            if "properties" in section
        },
    }
    tables = (
        f"### `{name}`\n\n{section['description']}\n\n"
        "| key | values | default | meaning |\n|---|---|---|---|\n"
        + "".join(_rows(section["properties"]))
        for name, section in sections.items()
    )
    targets = schema["properties"]["targets"]["description"]
    return "\n".join([*tables, f"### `targets`\n\n{targets} A list.\n"])


def scripts(repository: Path) -> str:
    """Makes a Markdown table of the scripts with the first sentence of their help."""
    rows = (
        f"| `{path.relative_to(repository / SCRIPTS)}` | {_first_sentence(path)} |\n"
        for folder in (SCRIPTS, f"{SCRIPTS}/steps")
        for path in sorted((repository / folder).glob("*.py"))
    )
    return "| script | purpose |\n|---|---|\n" + "".join(rows)


def _rows(properties: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in properties.items():
        if "properties" in value:
            yield from _rows(value["properties"], f"{prefix}{name}.")
            continue
        default = f"`{json.dumps(value['default'])}`" if "default" in value else "required"
        meaning = value["description"].replace("\n", " ").replace("|", r"\|")
        yield f"| `{prefix}{name}` | {_values(value)} | {default} | {meaning} |\n"


def _values(value: dict[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{json.dumps(choice).strip(chr(34))}`" for choice in value["enum"])
    kinds: list[str] = value["type"] if isinstance(value["type"], list) else [value["type"]]
    words = {"array": "list", "object": "mapping"}
    return " or ".join(words.get(kind, kind) for kind in kinds)


def _first_sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")
