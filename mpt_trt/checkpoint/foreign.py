"""Recognises folders that are not plain checkpoints, and names the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ADAPTER_CONFIG = "adapter_config.json"
# Checked as text; weights are checked when they are opened.
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
QUANTIZERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}
# Files that AutoGPTQ and AutoAWQ write next to config.json.
QUANTIZER_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
# Suffixes of tensor names that only these programs write.
GPTQ_AND_AWQ = (".qweight", ".qzeros")
BITSANDBYTES = (".SCB", ".weight_format", ".absmax", ".quant_map", ".nested_absmax")
COMPRESSED = (".weight_packed", ".weight_scale", ".weight_scale_inv", ".input_scale")
LORA_PARTS = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "base_layer"})
UNQUANTIZED = "give the unquantized checkpoint that it was made from, and quantize that one here"


def require_plain_checkpoint(folder: Path) -> None:
    """Raises MptTrtError unless the folder contains a plain checkpoint.

    Rejected are an adapter without its model, a quantized model, and pointers or links to files
    that were not downloaded. A folder that does not exist is accepted.
    """
    _require_listing(folder)
    for name in TEXT_FILES:
        require_content(folder / name)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise _adapter_alone(folder)
    _require_unquantized(folder)


def require_content(path: Path) -> None:
    """Raises MptTrtError when a path is a pointer, a dangling link or unreadable.

    Other paths that are not files are accepted.
    """
    try:
        if path.is_symlink() and not path.exists():
            raise MptTrtError(
                f"{path}: links to {path.readlink()}, which does not exist (a hub cache that was "
                "cleaned, or copied without its blobs?); download the file again"
            )
        if not path.is_file():
            return
        with path.open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    except OSError as error:
        raise _unreadable(path, error) from None
    if start == LFS_POINTER:
        raise MptTrtError(
            f"{path}: a git-LFS pointer instead of the file itself; run `git lfs pull` where it "
            "was cloned, or download it with `hf download`"
        )


def require_plain_names(path: Path, names: Iterable[str]) -> None:
    """Raises MptTrtError when tensors' names show a quantized model or an unmerged adapter."""
    for name in names:
        if kind := _quantizer_of(name):
            raise MptTrtError(
                f"{path}: weights are quantized with {kind} (tensor {name}); {UNQUANTIZED}"
            )
        if not LORA_PARTS.isdisjoint(name.split(".")):
            raise MptTrtError(
                f"{path}: a model with an unmerged LoRA adapter (tensor {name}); save it again "
                "after PEFT's merge_and_unload(), or give the base model and, with --adapter, the "
                "adapter's own folder"
            )


def _quantizer_of(name: str) -> str | None:
    if name.endswith(".g_idx"):
        return "GPTQ"
    if name.endswith(GPTQ_AND_AWQ):
        return "GPTQ or AWQ"
    if name.endswith(BITSANDBYTES) or ".quant_state.bitsandbytes" in name:
        return "bitsandbytes"
    return "compressed-tensors or FP8" if name.endswith(COMPRESSED) else None


def _require_listing(folder: Path) -> None:
    try:
        next(folder.iterdir(), None)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unreadable(folder, error) from None


def _require_unquantized(folder: Path) -> None:
    for name, kind in QUANTIZER_FILES.items():
        if (folder / name).is_file():
            raise MptTrtError(f"{folder / name}: the model is quantized with {kind}; {UNQUANTIZED}")
    path = folder / "config.json"
    settings = read_json(path).get("quantization_config") if path.is_file() else None
    if settings:
        raise MptTrtError(
            f"{path}: quantization_config is that of {_quantizer(settings)}; {UNQUANTIZED} (or "
            "delete this field if the weights are not quantized)"
        )


def _quantizer(settings: Any) -> str:
    fields = settings if isinstance(settings, dict) else {}
    method = str(fields.get("quant_method", ""))
    if not method and any(fields.get(key) for key in ("load_in_8bit", "load_in_4bit")):
        method = "bitsandbytes"
    return QUANTIZERS.get(method, method or "a quantized model")


def _adapter_alone(folder: Path) -> MptTrtError:
    adapter = read_json(folder / ADAPTER_CONFIG)
    base = adapter.get("base_model_name_or_path") or "its base model"
    return MptTrtError(
        f"{folder}: an adapter ({adapter.get('peft_type', 'PEFT')}) of {base}, without the model; "
        f"give {base} as the checkpoint and this folder as --adapter"
    )


def _unreadable(path: Path, error: OSError) -> MptTrtError:
    return MptTrtError(
        f"{path}: cannot be read ({error.strerror or error}); ask its owner for permission to read "
        "it, or work on a copy"
    )
