"""Recognises folders of another kind than the requested one."""

from __future__ import annotations

from pathlib import Path

from mpt_trt.system.replace import read_mark

# Keys that only one kind of config.json has, and the name of that kind.
KEYS = {
    "ranks": "an engine directory, which run.py reads",
    "pretrained_config": "an engine directory of TensorRT-LLM, which only TensorRT-LLM reads",
    "architecture": "a TensorRT-LLM checkpoint, which build_trtllm.py reads",
    "model_type": "a checkpoint in Hugging Face format, which convert_hf_mpt_to_ft.py converts",
}


def describe_folder(folder: Path) -> str | None:
    """Describes a folder's kind and the command that reads it; None if it is unknown."""
    if (folder / "config.ini").is_file():
        return "an FT checkpoint, which build.py and quantize.py read"
    content = read_mark(folder / "config.json")
    for key, description in KEYS.items():
        if key in content:
            return description
    if (folder / "snapshots").is_dir():
        commits = sorted(path.name for path in (folder / "snapshots").iterdir())
        commit = commits[0] if len(commits) == 1 else "COMMIT"
        return f"a model's folder in the hub cache; give {folder / 'snapshots' / commit}"
    snapshots = folder.parent / "snapshots"
    if folder.name in ("blobs", "refs") and snapshots.is_dir():
        return f"a part of a model's folder in the hub cache; give a folder in {snapshots}"
    if models := sorted(path.name for path in folder.glob("models--*") if path.is_dir()):
        name = models[0].removeprefix("models--").replace("--", "/")
        return f"a hub cache; give a model's id, such as {name}, and this folder as HF_HUB_CACHE"
    if inner := sorted(path.name for path in folder.glob("[0-9]*-gpu") if path.is_dir()):
        return f"a folder that contains {', '.join(inner)}; give {folder / inner[0]}"
    if inner := sorted(path.parent.name for path in folder.glob("*/config.json")):
        names = f"{', '.join(inner[:3])}{', ...' if len(inner) > 3 else ''}"
        return f"a folder that contains {names}; give {folder / inner[0]}"
    return None


def hint(folder: Path) -> str:
    """Makes the end of an error about a missing file: the folder's actual kind."""
    description = describe_folder(folder)
    return "" if description is None else f"; {folder} is {description}"
