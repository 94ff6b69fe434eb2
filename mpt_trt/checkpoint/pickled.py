"""Reads PyTorch's pickled weight files, and state dicts in trainers' containers."""

from __future__ import annotations

import codecs
import datetime
import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpt_trt.arrays.cast import BFLOAT16
from mpt_trt.checkpoint.weight_errors import broken, not_float
from mpt_trt.errors import MptTrtError

# Keys of the state dict in trainers' files: Composer, Lightning, plain loops, DeepSpeed.
CONTAINERS = (
    ("state", "model"),
    ("state_dict",),
    ("model_state_dict",),
    ("model",),
    ("module",),
    ("state", "state_dict"),
)
# Size of zip's local header up to the name; it ends with the lengths of name and extra field.
LOCAL_HEADER_BYTES = 30
CHUNK_BYTES = 1 << 17
log = logging.getLogger(__name__)


class PickleFile:
    """A PyTorch `.bin` or `.pt` file, mapped into memory; only tensors are unpickled."""

    def __init__(self, path: Path):
        self.path = path
        state = _state_dict(path, _load(path))
        self._tensors: dict[str, torch.Tensor] = {
            str(n): t.detach() for n, t in state.items() if isinstance(t, torch.Tensor)
        }

    def names(self) -> Iterable[str]:
        """Implements `WeightFile`."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Implements `WeightFile`."""
        return tuple(self._tensors[name].shape)

    def require_values(self, name: str) -> None:
        """Implements `WeightFile`."""
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise MptTrtError(
                f"{self.path}: tensor {name} is on the meta device, which holds no values; save "
                "the model again after its weights are loaded"
            )
        if tensor.is_nested:
            raise MptTrtError(
                f"{self.path}: tensor {name} is nested, a list of tensors; save it as one tensor"
            )
        if tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise MptTrtError(
                f"{self.path}: tensor {name} is sparse ({layout}); save it again after to_dense()"
            )

    def tensor(self, name: str) -> NDArray:
        """Implements `WeightFile`."""
        tensor = self._tensors[name].resolve_neg()
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(BFLOAT16)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise not_float(self.path, name, str(tensor.dtype).removeprefix("torch."))
        return tensor.numpy()

    def prefetch(self, name: str) -> None:
        """Does nothing, because PyTorch has mapped the file."""


def _load(path: Path) -> Any:
    _require_check_sums(path)
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):
            raise MptTrtError(
                f"{path}: saved with another pickle_protocol than torch.save's default, or "
                "damaged; save it again with the default, or as safetensors"
            ) from None
        raise MptTrtError(
            f"{path}: rejected, because it holds more than tensors ({_culprit(error)}); convert "
            "it to safetensors on a machine where you trust it"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise many types
        if _is_bare_pickle(path):
            raise MptTrtError(
                f"{path}: in PyTorch's format from before version 1.6, which cannot be mapped "
                "into memory; save it again as safetensors"
            ) from None
        raise broken(path, error, "every tensor") from None


def _require_check_sums(path: Path) -> None:
    """Compares the entries of a zip archive with their checksums, which PyTorch does not do.

    Raises MptTrtError when one differs. Files that are not archives are left to PyTorch.
    """
    try:
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(4) as pool:
            entries = archive.infolist()
            sums = list(pool.map(lambda entry: _check_sum(path, entry), entries))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return
    for entry, actual in zip(entries, sums, strict=True):
        # PyTorch can be set to write no checksums (set_crc32_options).
        if entry.CRC not in (0, actual):
            raise broken(path, ValueError(f"check sum of {entry.filename}"), "some tensor")


def _check_sum(path: Path, entry: zipfile.ZipInfo) -> int:
    """CRC-32 of the content of an uncompressed entry."""
    with path.open("rb") as stream:
        stream.seek(entry.header_offset + LOCAL_HEADER_BYTES - 4)
        stream.seek(sum(struct.unpack("<HH", stream.read(4))), os.SEEK_CUR)
        left, check = entry.compress_size, 0
        while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
            check = zlib.crc32(chunk, check)
            left -= len(chunk)
    return check


def _state_dict(path: Path, content: Any) -> dict[Any, Any]:
    """Finds the state dict: the content itself, or within a trainer's container."""
    if not isinstance(content, dict):
        raise MptTrtError(f"{path}: a state dict is expected, found {type(content).__name__}")
    if _has_tensors(content):
        return content
    for keys in CONTAINERS:
        inner: Any = content
        for key in keys:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and _has_tensors(inner):
            log.warning("%s: the weights are taken from its %s", path, "/".join(keys))
            return inner
    names = ", ".join(str(key) for key in list(content)[:8])
    raise MptTrtError(
        f"{path}: holds no tensors, neither itself nor in "
        f"{', '.join('/'.join(keys) for keys in CONTAINERS)} (its keys: {names or 'none'}); give a "
        "file with the model's weights"
    )


def _has_tensors(content: dict[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in content.values())


def _harmless_globals() -> list[Any]:
    """Types of random states and clocks in trainers' checkpoints; none of them runs code."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [
        *((reconstruct, f"{module}._reconstruct") for module in modules),
        *((scalar, f"{module}.scalar") for module in modules),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"},
        (codecs.encode, "_codecs.encode"),
        datetime.timedelta,
    ]


def _culprit(error: pickle.UnpicklingError) -> str:
    """Names the object that PyTorch refused to load, without its advice to load it anyway."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else "not a state dict"


def _is_bare_pickle(path: Path) -> bool:
    """Returns whether the file is a bare pickle, PyTorch's format before version 1.6."""
    try:
        with path.open("rb") as stream:
            return stream.read(1) == pickle.PROTO
    except OSError:
        return False
