"""Reads tensors of a Hugging Face checkpoint folder lazily.

Weights are safetensors or PyTorch `.bin`, in one file or in shards with an index, with or without
the `transformer.` prefix. Files are memory-mapped: until a tensor is computed with, it takes no
memory that the system cannot reclaim. Nothing in the checkpoint is executed.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpt_trt.arrays.cast import BFLOAT16, is_finite
from mpt_trt.checkpoint.files import weight_files
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import Weight
from mpt_trt.system.files import map_pages

PREFIX = "transformer."
SAFETENSORS_TYPES = {
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class WeightFile(Protocol):
    """One weight file."""

    path: Path

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def tensor(self, name: str) -> NDArray:
        """A tensor as stored, memory-mapped; raises MptTrtError if it is not floating point."""
        ...

    def prefetch(self, name: str) -> None:
        """Reads a tensor ahead, in the order of its file."""
        ...


class SafetensorsShard:
    """A safetensors file, mapped into memory as a whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="np"):
                pass  # the library checks the header against the file's size
            self._header, data_start = _safetensors_header(path)
            self._data = np.memmap(path, np.uint8, "r")[data_start:]
        except (SafetensorError, OSError, ValueError) as error:
            raise _broken(path, error, _first_incomplete_tensor(path)) from None

    def names(self) -> Iterable[str]:
        """See `WeightFile`."""
        return self._header

    def shape(self, name: str) -> tuple[int, ...]:
        """See `WeightFile`."""
        return tuple(self._header[name]["shape"])

    def tensor(self, name: str) -> NDArray:
        """See `WeightFile`."""
        entry = self._header[name]
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise _not_float(self.path, name, entry["dtype"])
        start, stop = entry["data_offsets"]
        data = self._data[start:stop].view(SAFETENSORS_TYPES[entry["dtype"]])
        return data.reshape(entry["shape"])

    def prefetch(self, name: str) -> None:
        """See `WeightFile`."""
        start, stop = self._header[name]["data_offsets"]
        map_pages(self._data[start:stop])


class PickleShard:
    """A PyTorch `.bin` file, mapped into memory; only tensors are unpickled."""

    def __init__(self, path: Path):
        # PyTorch takes a second to import, and safetensors do without it.
        import torch

        self.path = path
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise MptTrtError(
                f"{path}: refused, since it holds more than tensors ({_culprit(error)}); convert "
                "it to safetensors on a machine where you trust it"
            ) from None
        except (RuntimeError, OSError, EOFError) as error:
            if _is_bare_pickle(path):
                raise MptTrtError(
                    f"{path}: in PyTorch's format from before version 1.6, which cannot be mapped "
                    "into memory; save it again as safetensors"
                ) from None
            raise _broken(path, error, "every tensor") from None
        if not isinstance(content, dict):
            raise MptTrtError(f"{path}: a state dict is expected, found {type(content).__name__}")
        self._tensors = {n: t.detach() for n, t in content.items() if isinstance(t, torch.Tensor)}
        self._bfloat16 = torch.bfloat16
        self._uint16 = torch.uint16

    def names(self) -> Iterable[str]:
        """See `WeightFile`."""
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """See `WeightFile`."""
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> NDArray:
        """See `WeightFile`."""
        tensor = self._tensors[name]
        if tensor.dtype is self._bfloat16:
            return tensor.view(self._uint16).numpy().view(BFLOAT16)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            raise _not_float(self.path, name, str(tensor.dtype).removeprefix("torch."))
        return tensor.numpy()

    def prefetch(self, name: str) -> None:
        """Does nothing: PyTorch has mapped the file."""


class HfCheckpoint:
    """The tensors of a checkpoint whose names, shapes and types have been checked.

    Raises MptTrtError, naming file and tensor, when a shard is missing or broken, or a tensor is
    missing, unexpected, of another shape or not floating point.
    """

    def __init__(self, folder: Path, weights: list[Weight]):
        self.folder = folder
        self.shards = [_open_weight_file(path) for path in weight_files(folder)]
        self._location = {
            name.removeprefix(PREFIX): (shard, name)
            for shard in self.shards
            for name in shard.names()
        }
        self._check_names(weights)
        self._check_shapes(weights)

    def tensor(self, weight: Weight) -> NDArray:
        """A memory-mapped tensor as stored: `weight.shape`, of one of EXPONENTS' types."""
        shard, name = self._location[_hf_name(weight)]
        return shard.tensor(name)

    def prefetch(self, weight: Weight) -> None:
        """Reads a tensor ahead, in the order of its file, before its parts are read in another."""
        shard, name = self._location[_hf_name(weight)]
        shard.prefetch(name)

    def describe(self, weight: Weight) -> str:
        """Label of a tensor for error messages: `file: tensor name`."""
        shard, name = self._location[_hf_name(weight)]
        return f"{shard.path}: tensor {name}"

    def _check_names(self, weights: list[Weight]) -> None:
        expected = {w.hf_name for w in weights if w.hf_name is not None}
        if missing := sorted(expected - self._location.keys()):
            raise MptTrtError(
                f"{self.shards[0].path if len(self.shards) == 1 else self.folder}: "
                f"tensor {missing[0]} is missing{_and_others(missing)}; config.json and the "
                "weights do not belong together, or the download is incomplete"
            )
        unexpected = sorted(self._location.keys() - expected)
        if unexpected == ["lm_head.weight"]:
            self._require_tied_head(weights[0])
        elif unexpected:
            shard, name = self._location[unexpected[0]]
            raise MptTrtError(
                f"{shard.path}: unexpected tensor {name}{_and_others(unexpected)}; config.json "
                "does not describe this model (biases? untied embeddings? another architecture?)"
            )

    def _require_tied_head(self, embedding: Weight) -> None:
        shard, name = self._location["lm_head.weight"]
        if not np.array_equal(shard.tensor(name), self.tensor(embedding)):
            raise MptTrtError(
                f"{shard.path}: tensor {name} differs from the embedding although config.json says "
                "tie_word_embeddings = true; set it to false to use the separate head"
            )

    def _check_shapes(self, weights: list[Weight]) -> None:
        for weight in weights:
            if weight.hf_name is None:
                continue
            shard, name = self._location[weight.hf_name]
            shape = shard.shape(name)
            if shape != weight.shape:
                raise MptTrtError(
                    f"{shard.path}: tensor {name} has shape {list(shape)}, but config.json asks "
                    f"for {list(weight.shape)}"
                )


def _hf_name(weight: Weight) -> str:
    if weight.hf_name is None:
        raise ValueError(f"{weight.name} is not stored in Hugging Face checkpoints")
    return weight.hf_name


def _open_weight_file(path: Path) -> WeightFile:
    return SafetensorsShard(path) if path.suffix == ".safetensors" else PickleShard(path)


def _culprit(error: pickle.UnpicklingError) -> str:
    """Names what PyTorch refused to load, without its advice to load it anyway."""
    name = re.search(r"GLOBAL (\S+)", str(error))
    return name[1] if name else "it is no state dict"


def _is_bare_pickle(path: Path) -> bool:
    """Whether the file is a pickle without zip archive, as PyTorch wrote before version 1.6."""
    try:
        with path.open("rb") as stream:
            return stream.read(1) == pickle.PROTO
    except OSError:
        return False


def _broken(path: Path, error: Exception, tensor: str) -> MptTrtError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return MptTrtError(
        f"{path}: truncated or damaged, {tensor} cannot be read ({reason}); download the file again"
    )


def _safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Reads the entries of a safetensors file by tensor name, and where the data begins.

    Format: 8 bytes little-endian header length, JSON header with `data_offsets` relative to the end
    of the header, data (safetensors README, section "Format").
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, path.stat().st_size)))
    return {k: v for k, v in header.items() if k != "__metadata__"}, 8 + length


def _first_incomplete_tensor(path: Path) -> str:
    """The first tensor whose bytes lie beyond the end of a truncated safetensors file."""
    try:
        header, data_start = _safetensors_header(path)
        ends = {name: data_start + entry["data_offsets"][1] for name, entry in header.items()}
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "every tensor"
    cut_off = [name for name, end in ends.items() if end > size]
    return min(cut_off, key=ends.__getitem__, default="every tensor")


def _not_float(path: Path, name: str, dtype: str) -> MptTrtError:
    return MptTrtError(
        f"{path}: tensor {name} is {dtype}; only unquantized checkpoints (float32, float16, "
        "bfloat16) are read"
    )


def _and_others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def not_finite(tensor: NDArray, description: str) -> MptTrtError:
    """Makes the error that names the place of the first NaN or infinity in `tensor`."""
    # Row by row: a mask of the whole tensor would take as much memory as the tensor.
    rows = tensor if tensor.ndim > 1 else tensor[None]
    index, row = next((i, row) for i, row in enumerate(rows) if not is_finite(row))
    column = int(np.argmin(np.isfinite(row)))
    position = [index, column] if tensor.ndim > 1 else [column]
    kind = "NaN" if np.isnan(row[column]) else "Inf"
    return MptTrtError(f"{description} holds {kind} at {position}; the checkpoint is damaged")
