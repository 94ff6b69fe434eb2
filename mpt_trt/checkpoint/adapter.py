"""Merges LoRA adapters in PEFT's format into a checkpoint's tensors while they are read.

Format: PEFT's `tuners/lora/{config,layer,model}.py` and `utils/save_and_load.py`. The result is
that of `merge_and_unload()`: `W + scaling * B @ A`, in float32 and not rounded to W's type.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpt_trt.checkpoint.foreign import ADAPTER_CONFIG, require_content
from mpt_trt.checkpoint.weight_names import plain_name
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import content_hash, read_json
from mpt_trt.system.json_text import shown

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
# Keys that matter only in training, or whose effect the tensors already show.
NO_EFFECT = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        # All layers of an MPT are nn.Linear, for which PEFT sets it to false.
        "fan_in_fan_out",
    ]
)
USED = frozenset(
    ["alpha_pattern", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern"]
)
# Other initializations also change the base model.
PLAIN_INITIALIZATIONS = (None, True, False, "gaussian", "orthogonal")
ABSENT: tuple[object, ...] = (None, False, 0, "", "none", [], {})
PARTS = {"lora_A": "A", "lora_B": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}


class AdapterFile(Protocol):
    """Reader of an adapter's tensors; see `checkpoint.tensors.WeightFile`."""

    path: Path

    def names(self) -> Any:
        """Names of all tensors."""
        ...

    def require_values(self, name: str) -> None:
        """Raises MptTrtError when a tensor has no values."""
        ...

    def tensor(self, name: str) -> NDArray:
        """A tensor as stored."""
        ...


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one weight: `scaling * B @ A`.

    down, up: A `[rank, in_features]` and B `[out_features, rank]`, float32. is_embedding: the
    product is stored transposed, as PEFT does for embeddings.
    """

    down: NDArray[np.float32]
    up: NDArray[np.float32]
    scaling: float
    is_embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the update belongs to."""
        out_features, in_features = self.up.shape[0], self.down.shape[1]
        return (in_features, out_features) if self.is_embedding else (out_features, in_features)

    def merged(self, weight: NDArray) -> NDArray[np.float32]:
        """Adds the update to the weight, float32."""
        product = self.up @ self.down
        product *= np.float32(self.scaling)
        return np.add(weight, product.T if self.is_embedding else product, dtype=np.float32)


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter. updates: by name of the weight, e.g. `blocks.0.attn.Wqkv.weight`."""

    folder: Path
    path: Path
    updates: Mapping[str, LayerUpdate]

    def provenance(self) -> dict[str, str]:
        """Origin of the adapter, for manifests."""
        return {"adapter": str(self.folder.absolute()), "adapter_hash": content_hash(self.path)}

    def require_fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises MptTrtError unless each update belongs to a weight of the model.

        shapes: shapes of the model's weights by name.
        """
        for name, update in self.updates.items():
            if name not in shapes:
                raise MptTrtError(
                    f"{self.path}: updates {name}, which the model does not have; the adapter is "
                    "of another model"
                )
            if update.shape != shapes[name]:
                raise MptTrtError(
                    f"{self.path}: the update of {name} has shape {list(update.shape)}, but the "
                    f"model's has {list(shapes[name])}; the adapter is of another model"
                )


def adapter_files(folder: Path) -> list[Path]:
    """Lists the files of an adapter that are read; raises MptTrtError when it holds no adapter."""
    return [folder / ADAPTER_CONFIG, adapter_weights(folder)]


def adapter_weights(folder: Path) -> Path:
    """Finds the file of an adapter's tensors.

    Raises MptTrtError when the folder does not contain an adapter.
    """
    for name in (ADAPTER_CONFIG, *WEIGHT_FILES):
        require_content(folder / name)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise MptTrtError(
            f"{folder}: no {ADAPTER_CONFIG}; an adapter is a folder that PEFT's save_pretrained "
            "has written"
        )
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise MptTrtError(f"{folder}: no tensors of an adapter; {' or '.join(WEIGHT_FILES)} is needed")


def read_adapter(folder: Path, file: AdapterFile) -> LoraAdapter:
    """Reads a LoRA adapter; `file` reads its `adapter_weights`.

    Raises MptTrtError, naming file, field and value, for other kinds of adapters, and for settings
    and tensors that plain LoRA does not have.
    """
    settings = _Settings(folder / ADAPTER_CONFIG)
    updates = {}
    for module, parts in _modules(file).items():
        name = f"{plain_name(module)}.weight"
        if parts.keys() != {"A", "B"}:
            raise MptTrtError(f"{file.path}: {module} has only {' and '.join(parts)} of LoRA")
        updates[name] = _update(file, settings, module, parts)
    if not updates:
        raise MptTrtError(f"{file.path}: no LoRA tensors; the adapter is empty")
    return LoraAdapter(folder, file.path, updates)


def _modules(file: AdapterFile) -> dict[str, dict[str, str]]:
    """Names of the tensors A and B by the module that they belong to."""
    modules: dict[str, dict[str, str]] = {}
    for stored in file.names():
        words = stored.split(".")
        place = next((i for i, word in enumerate(words) if word in PARTS), None)
        if place is None:
            kind = "DoRA's " if "lora_magnitude_vector" in words else ""
            raise MptTrtError(
                f"{file.path}: {kind}tensor {stored} does not belong to a plain LoRA adapter, and "
                "only these are merged; merge it with PEFT's merge_and_unload()"
            )
        module = ".".join(words[:place])
        parts = modules.setdefault(module, {})
        if PARTS[words[place]] in parts:
            raise MptTrtError(f"{file.path}: holds several adapters of {module}; save only one")
        parts[PARTS[words[place]]] = stored
    return modules


def _update(
    file: AdapterFile, settings: _Settings, module: str, parts: dict[str, str]
) -> LayerUpdate:
    for stored in parts.values():
        file.require_values(stored)
    down, up = (file.tensor(parts[part]).astype(np.float32) for part in "AB")
    # PEFT matches patterns with names within the base model.
    inner = module.removeprefix("base_model.model.")
    rank = settings.rank(inner)
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise MptTrtError(
            f"{file.path}: A and B of {module} have shapes {list(down.shape)} and "
            f"{list(up.shape)}, but {ADAPTER_CONFIG} gives it rank {rank}"
        )
    is_embedding = "lora_embedding_A" in parts["A"]
    return LayerUpdate(down, up, settings.scaling(inner), is_embedding)


class _Settings:
    """An adapter's configuration."""

    def __init__(self, path: Path):
        self.path = path
        self.content = read_json(path)
        kind = self.content.get("peft_type")
        if kind != "LORA":
            raise self.refused("peft_type", kind, "only LORA is merged")
        initialization = self.content.get("init_lora_weights")
        if initialization not in PLAIN_INITIALIZATIONS:
            why = "it also changes the base model; merge it with PEFT's merge_and_unload()"
            raise self.refused("init_lora_weights", initialization, why)
        for key, value in self.content.items():
            if key not in USED | NO_EFFECT and key != "use_rslora" and value not in ABSENT:
                why = "not supported; merge it with PEFT's merge_and_unload()"
                raise self.refused(key, value, why)

    def refused(self, field: str, value: object, why: str) -> MptTrtError:
        return MptTrtError(f"{self.path}: {field} = {shown(value)}: {why}")

    def rank(self, module: str) -> int:
        """The rank of a module."""
        field, value = self._of_module("rank_pattern", "r", module)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refused(field, value, "a positive integer is required")
        return value

    def scaling(self, module: str) -> float:
        """The factor of a module's update: alpha / r, or alpha / sqrt(r) if rank-stabilised."""
        field, alpha = self._of_module("alpha_pattern", "lora_alpha", module)
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            raise self.refused(field, alpha, "a number is required")
        stabilised = self.content.get("use_rslora") or False
        if not isinstance(stabilised, bool):
            raise self.refused("use_rslora", stabilised, "true or false is required")
        rank = self.rank(module)
        return float(alpha) / (math.sqrt(rank) if stabilised else rank)

    def _of_module(self, patterns: str, default: str, module: str) -> tuple[str, Any]:
        """Name and value of a setting; the first matching pattern overrides the default."""
        overrides = self.content.get(patterns) or {}
        if not isinstance(overrides, dict):
            raise self.refused(patterns, overrides, "an object is expected")
        for pattern, value in overrides.items():
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise self.refused(
                    patterns, pattern, f"not a regular expression ({error})"
                ) from None
            if fits:
                return f"{patterns}.{pattern}", value
        return default, self.content.get(default)
