"""Sources of the configuration's values: files, and `--config` on the command line.

PyYAML is imported where it is used: the tools read their options' defaults before they can report a
missing package.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.system.shown_paths import seen_from

COMMAND_LINE = "--config"

Schema = dict[str, Any]


@dataclass(frozen=True)
class ConfigSources:
    """Sources that Snakemake merges: files (later ones have precedence), then `--config`."""

    files: tuple[str, ...] = ("config.yaml",)
    command_line: Mapping[str, Any] | None = None

    @classmethod
    def of_run(
        cls, files: Sequence[str | Path], command_line: Mapping[str, Any] | None
    ) -> ConfigSources:
        """Makes the sources of a run; files below the working directory get relative names."""
        return cls(tuple(map(_shown, files)), command_line)

    def of(self, path: Sequence[object]) -> str:
        """Name of the source of a value. path: the keys that lead to it."""
        if _has(self.command_line or {}, path):
            return COMMAND_LINE
        if len(self.files) == 1:
            return self.files[0]
        import yaml

        readable = (name for name in reversed(self.files) if Path(name).is_file())
        holding = (name for name in readable if _has(yaml.safe_load(_text(name)) or {}, path))
        return next(holding, self.files[0] if self.files else "configuration")

    def with_types(
        self, content: Mapping[str, Any], schema: Schema, resolved: Callable[[Schema], Schema]
    ) -> dict[str, Any]:
        """Converts values of `--config` in `content` to the types of the schema.

        Snakemake passes nested values as strings: `--config 'variants={fp16: {max_batch_size:
        4}}'`. A value of another type stays a string. resolved: follows a schema's `$ref`.
        """
        return _typed(content, self.command_line or {}, schema, resolved)


def require_yaml(path: Path) -> None:
    """Raise MptTrtError, with the line, when a file is not valid YAML or repeats a key."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(_text(str(path)))
        node = loader.get_single_node()
        # First, because construction puts merged mappings (<<) into their nodes.
        _require_unique_keys(path, node)
        if node is not None:
            loader.construct_document(node)
    except MptTrtError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = path if mark is None else f"{path}, line {mark.line + 1}"
        raise MptTrtError(
            f"{place}: not valid YAML: {error.problem}; indent with spaces, and quote texts with "
            "special characters"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MptTrtError(f"{path}: cannot be read as YAML: {error}") from None


def _require_unique_keys(path: Path, node: Any) -> None:
    """Raises MptTrtError when a mapping has a key twice, of which YAML's readers take the last.

    node: of PyYAML's graph of the file.
    """
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        # Aliases share nodes, and may form circles.
        if node is None or id(node) in seen or isinstance(node.value, str):
            continue
        seen.add(id(node))
        if node.id == "sequence":
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            waiting.append(value)
            if not isinstance(key.value, str):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise MptTrtError(
                    f"{path}, line {line}: the key {key.value} is also in line {lines[key.value]}, "
                    "which would not count; remove or rename one of them"
                )
            lines[key.value] = line


def _shown(file: str | Path) -> str:
    return seen_from(Path.cwd(), Path(file))


def _text(name: str) -> str:
    return Path(name).read_text(encoding="utf-8")


def _has(content: object, path: Sequence[object]) -> bool:
    """Returns whether `content`, of mappings and lists, has a value at `path`."""
    for key in path:
        try:
            content = content[key]  # type: ignore[index]
        except (LookupError, TypeError):
            return False
    return bool(path)


def _typed(value: Any, given: Any, schema: Schema, resolved: Callable[[Schema], Schema]) -> Any:
    """Converts a value. given: the same value in `--config`."""
    schema = resolved(schema)
    if isinstance(value, Mapping) and isinstance(given, Mapping):
        known, others = schema.get("properties", {}), schema.get("additionalProperties") or {}
        return {
            key: _typed(entry, given[key], known.get(key, others), resolved)
            if key in given
            else entry
            for key, entry in value.items()
        }
    if isinstance(value, list) and value == given:
        return [_typed(item, item, schema.get("items", {}), resolved) for item in value]
    return _converted(value, schema) if isinstance(value, str) and value == given else value


def _converted(text: str, schema: Schema) -> Any:
    """Converts the text to a number, boolean or null, if the schema has one of these types."""
    numbers = {"integer": int, "number": float}
    types = schema.get("type", ())
    for kind in [types] if isinstance(types, str) else types:
        if kind in numbers:
            with contextlib.suppress(ValueError):
                number = numbers[kind](text)
                return number if math.isfinite(number) else text
        if kind == "boolean" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "null" and text == "null":
            return None
    others = [choice for choice in schema.get("enum", ()) if not isinstance(choice, str)]
    return next((c for c in others if ("null" if c is None else str(c)) == text), text)
