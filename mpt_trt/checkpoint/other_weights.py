"""Recognises weights under names, or in formats, that are not read, and names the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

# Weights of other programs by the ends of their names.
FORMATS = {".gguf": "GGUF", ".msgpack": "Flax", ".h5": "TensorFlow", ".onnx": "ONNX"}
# Ends of names that download tools use until a file is complete.
UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp")
# Names in each format, as the reader looks for them.
USUAL_NAMES = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
ZIP = b"PK\x03\x04"


def describe_other_weights(folder: Path, ignored: tuple[str, ...]) -> str | None:
    """Describes what a folder without weights has instead, and the remedy; None if unknown.

    ignored: starts of names of files that contain no weights.
    """
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith(ignored))
    for name in USUAL_NAMES.values():
        if (folder / name).is_dir():
            return f"{name} is a folder; put the file of that name there"
        if (folder / name).exists() and not (folder / name).is_file():
            return f"{name} is a pipe or device; put a regular file of that name there"
    if path := _first(paths, UNFINISHED):
        return f"{path.name} is an unfinished download; download it again"
    if path := _first(paths, tuple(USUAL_NAMES)):
        usual = USUAL_NAMES[path.suffix.lower()]
        if path.name.startswith("adapter_model"):
            return f"{path.name} is an adapter; give its base model, and this folder as --adapter"
        return f"if {path.name} has the model's weights, rename it to {usual}"
    if path := _first(paths, tuple(FORMATS)):
        kind = FORMATS[path.suffix.lower()]
        return f"{path.name} is in {kind} format; give the model as safetensors"
    if (folder / "zero_to_fp32.py").is_file():
        return "a checkpoint of DeepSpeed; run its zero_to_fp32.py, which writes one file"
    inner = next((next(folder.glob(f"*/{name}"), None) for name in USUAL_NAMES.values()), None)
    if inner is None:
        return None
    return f"{inner.relative_to(folder)} has some; give {inner.parent}, or move its files here"


def describe_content(path: Path) -> str | None:
    """Describes a weight file whose content is of another format than its name says."""
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
    except OSError:
        return None
    if path.suffix == ".safetensors" and start.startswith(ZIP):
        return "a file of PyTorch; rename it to pytorch_model.bin"
    length = int.from_bytes(start[:8], "little")
    if path.suffix != ".safetensors" and start[8:9] == b"{" and length < path.stat().st_size:
        return "a safetensors file; rename it to model.safetensors"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "a web page or message, not weights; download it again, and log in if it needs that"
    return None


def _first(paths: Iterable[Path], ends: tuple[str, ...]) -> Path | None:
    return next((path for path in paths if path.name.lower().endswith(ends)), None)
