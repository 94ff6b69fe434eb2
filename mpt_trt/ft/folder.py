"""The folder of an FT checkpoint: names of its own files, and which folders count as one."""

from __future__ import annotations

import configparser
from pathlib import Path

from mpt_trt.system.files import read_small_file
from mpt_trt.system.json_text import shown
from mpt_trt.system.replace import FolderKind, read_mark

CONFIG = "config.ini"
SECTION = "gpt"
"""Section of config.ini."""
MANIFEST = "manifest.json"
MOST_INI_BYTES = 1 << 20
"""Far above the size of converters' config.ini, about a kilobyte."""
QUOTES = "'"
INI_ERRORS = (configparser.Error, KeyError, ValueError)


def _own_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / MANIFEST)
    files = content.get("files")
    # Earlier versions recorded the provenance as `source`.
    is_foreign = content.keys().isdisjoint(("provenance", "source"))
    if is_foreign or not isinstance(files, dict) or not (folder / CONFIG).is_file():
        return None
    return {CONFIG, MANIFEST, *files}


FT_CHECKPOINT = FolderKind("an FT checkpoint", _own_files)


def parse_ini(content: bytes) -> dict[str, str]:
    """Parses a config.ini, of which at least one byte more than `MOST_INI_BYTES` is given.

    Raises one of INI_ERRORS when it is too large, not UTF-8, no INI file or without the section.
    """
    if len(content) > MOST_INI_BYTES:
        raise ValueError("larger than 1 MiB")
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(content.decode("utf-8"))
    return dict(parser[SECTION])


def content_of(folder: Path) -> str | None:
    """Words for the model and the type of a checkpoint; None if no config.ini names them."""
    try:
        values = parse_ini(read_small_file(folder / CONFIG, MOST_INI_BYTES))
        name, storage_type = values["model_name"], values["storage_dtype"]
    except (OSError, *INI_ERRORS):
        return None
    smoothing = values.get("smoothquant", "None")
    smoothed = "" if smoothing == "None" else f", smoothed with alpha {_plain(smoothing)}"
    return f"{_plain(name)} in {_plain(storage_type)}{smoothed}"


def _plain(value: str) -> str:
    return shown(value).strip(QUOTES)
