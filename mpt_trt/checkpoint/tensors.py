"""Reads tensors of a Hugging Face checkpoint folder lazily.

Weights are safetensors or PyTorch `.bin`, in one file or in shards with an index, or a trainer's
`.pt`, under any of the names in `weight_names`. Files are memory-mapped, so unused tensors take
only memory that the system can reclaim. Nothing in the checkpoint is executed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mpt_trt.arrays.cast import BFLOAT16, is_finite
from mpt_trt.checkpoint.files import file_of_tensor, weight_files
from mpt_trt.checkpoint.foreign import require_plain_names
from mpt_trt.checkpoint.weight_errors import broken, not_float
from mpt_trt.checkpoint.weight_names import USUAL_PREFIXES, is_weight, plain_name
from mpt_trt.errors import MptTrtError
from mpt_trt.model.tensors import Weight
from mpt_trt.system.files import map_pages
from mpt_trt.system.json_text import MOST_BYTES, shown

if TYPE_CHECKING:
    from mpt_trt.checkpoint.adapter import LoraAdapter

log = logging.getLogger(__name__)

# NumPy has 64, but no weight has more than 2.
MOST_DIMENSIONS = 8

SAFETENSORS_TYPES = {
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}


class WeightFile(Protocol):
    """A weight file with tensors by name."""

    path: Path

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def require_values(self, name: str) -> None:
        """Raises MptTrtError when a tensor has no values, or not all of them."""
        ...

    def tensor(self, name: str) -> NDArray:
        """A tensor as stored, memory-mapped; raises MptTrtError if it is not floating point."""
        ...

    def prefetch(self, name: str) -> None:
        """Reads a tensor ahead, in the order of its file."""
        ...


class SafetensorsFile:
    """A safetensors file, mapped into memory as a whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="np"):
                pass  # the library compares the header with the file's size
            self._header, data_start = _safetensors_header(path)
            for name, entry in self._header.items():
                if len(entry["shape"]) > MOST_DIMENSIONS:
                    raise ValueError(f"{shown(name)} has {len(entry['shape'])} dimensions")
            self._data = np.memmap(path, np.uint8, "r")[data_start:]
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise broken(path, error, _first_incomplete_tensor(path)) from None

    def names(self) -> Iterable[str]:
        """Implements `WeightFile`."""
        return self._header

    def shape(self, name: str) -> tuple[int, ...]:
        """Implements `WeightFile`."""
        return tuple(self._header[name]["shape"])

    def require_values(self, name: str) -> None:
        """Does nothing, because the format has only whole tensors."""

    def tensor(self, name: str) -> NDArray:
        """Implements `WeightFile`."""
        entry = self._header[name]
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise not_float(self.path, name, entry["dtype"])
        start, stop = entry["data_offsets"]
        data = self._data[start:stop].view(SAFETENSORS_TYPES[entry["dtype"]])
        return data.reshape(entry["shape"])

    def prefetch(self, name: str) -> None:
        """Implements `WeightFile`."""
        start, stop = self._header[name]["data_offsets"]
        map_pages(self._data[start:stop])


class HfCheckpoint:
    """Tensors of a checkpoint, with checked names, shapes and types.

    Raises MptTrtError, naming file and tensor, when a shard is missing or broken, or a tensor is
    missing, unexpected, of another shape or not floating point.

    adapter: folder of a LoRA adapter that is merged while tensors are read; None: no adapter.
    """

    def __init__(self, folder: Path, weights: list[Weight], adapter: Path | None = None):
        self.folder = folder
        self.files = [_open_weight_file(path) for path in weight_files(folder)]
        self._location: dict[str, tuple[WeightFile, str]] = {}
        indexed = file_of_tensor(folder)
        for file in self.files:
            require_plain_names(file.path, file.names())
            self._locate_tensors(file, indexed)
        self._adapter = None if adapter is None else _open_adapter(adapter)
        self._check_names(weights)
        self._report_prefix(weights[0])
        self._check_shapes(weights)
        if self._adapter is not None:
            self._adapter.require_fitting({_hf_name(w): w.shape for w in weights if w.hf_name})

    def tensor(self, weight: Weight) -> NDArray:
        """Reads a tensor `weight.shape` as stored, memory-mapped, of one of EXPONENTS' types.

        A tensor that the adapter updates is a new float32 array.
        """
        file, name = self._location[_hf_name(weight)]
        stored = file.tensor(name)
        update = None if self._adapter is None else self._adapter.updates.get(_hf_name(weight))
        return stored if update is None else update.merged(stored)

    def adapter_provenance(self) -> dict[str, str]:
        """Origin of the adapter, for manifests; {} without an adapter."""
        return {} if self._adapter is None else self._adapter.provenance()

    def prefetch(self, weight: Weight) -> None:
        """Reads a tensor ahead, in the order of its file, before its parts are read in another."""
        file, name = self._location[_hf_name(weight)]
        file.prefetch(name)

    def describe(self, weight: Weight) -> str:
        """Label of a tensor for error messages: `file: tensor name`."""
        file, name = self._location[_hf_name(weight)]
        return f"{file.path}: tensor {name}"

    def _locate_tensors(self, file: WeightFile, indexed: dict[str, str]) -> None:
        """Assigns the tensors of a file. indexed: file names by tensor, from the index."""
        for stored in filter(is_weight, file.names()):
            if (place := indexed.get(stored, file.path.name)) != file.path.name:
                raise MptTrtError(
                    f"{file.path}: holds tensor {stored}, which the index puts into {place}; "
                    "one of the files is of another checkpoint; download the checkpoint again"
                )
            name = plain_name(stored)
            if (other := self._location.get(name)) is not None:
                raise MptTrtError(
                    f"{file.path}: tensors {other[1]} (in {other[0].path.name}) and {stored} are "
                    f"both {name} of an MPT; remove the ones that are not the model's"
                )
            self._location[name] = file, stored

    def _report_prefix(self, embedding: Weight) -> None:
        file, stored = self._location[_hf_name(embedding)]
        prefix = stored.removesuffix(_hf_name(embedding))
        if prefix not in USUAL_PREFIXES:
            log.warning("%s: names of tensors begin with %r", file.path, prefix)

    def _check_names(self, weights: list[Weight]) -> None:
        expected = {w.hf_name for w in weights if w.hf_name is not None}
        unexpected = sorted(self._location.keys() - expected)
        if missing := sorted(expected - self._location.keys()):
            there = f"all {len(self._location)} present tensors are expected"
            if unexpected:
                stored = [self._location[name][1] for name in unexpected]
                there = f"found instead: {', '.join(stored[:3])}{_and_others(stored[2:])}"
            raise MptTrtError(
                f"{self.files[0].path if len(self.files) == 1 else self.folder}: "
                f"tensor {missing[0]} is missing{_and_others(missing)}; {there}; config.json and "
                "the weights do not belong together, or the download is incomplete"
            )
        if unexpected == ["lm_head.weight"]:
            self._require_tied_head(weights[0])
        elif unexpected:
            file, name = self._location[unexpected[0]]
            raise MptTrtError(
                f"{file.path}: unexpected tensor {name}{_and_others(unexpected)}; config.json "
                "does not describe this model (biases? untied embeddings? another architecture?)"
            )

    def _require_tied_head(self, embedding: Weight) -> None:
        file, name = self._location["lm_head.weight"]
        owner, embedding_name = self._location[_hf_name(embedding)]
        file.require_values(name)
        owner.require_values(embedding_name)
        if not np.array_equal(file.tensor(name), owner.tensor(embedding_name)):
            raise MptTrtError(
                f"{file.path}: tensor {name} differs from the embedding although config.json says "
                "tie_word_embeddings = true; set it to false to use the separate head"
            )

    def _check_shapes(self, weights: list[Weight]) -> None:
        for weight in weights:
            if weight.hf_name is None:
                continue
            file, name = self._location[weight.hf_name]
            file.require_values(name)
            shape = file.shape(name)
            if shape != weight.shape:
                raise MptTrtError(
                    f"{file.path}: tensor {name} has shape {list(shape)}, but config.json "
                    f"requires {list(weight.shape)}"
                )


def _hf_name(weight: Weight) -> str:
    if weight.hf_name is None:
        raise ValueError(f"{weight.name} is not stored in Hugging Face checkpoints")
    return weight.hf_name


def _open_adapter(folder: Path) -> LoraAdapter:
    from mpt_trt.checkpoint.adapter import adapter_weights, read_adapter  # few models have one

    return read_adapter(folder, _open_weight_file(adapter_weights(folder)))


def _open_weight_file(path: Path) -> WeightFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    # It imports PyTorch, which takes a second, and safetensors do not need it.
    from mpt_trt.checkpoint.pickled import PickleFile

    return PickleFile(path)


def _safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Reads the entries of a safetensors file by tensor name, and the offset of its data.

    Format: 8 bytes little-endian header length, JSON header with `data_offsets` relative to the end
    of the header, data (safetensors README, section "Format").
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > MOST_BYTES:
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(stream.read(length))
    return {k: v for k, v in header.items() if k != "__metadata__"}, 8 + length


def _first_incomplete_tensor(path: Path) -> str:
    """Name of the first tensor that is incomplete in a truncated safetensors file."""
    try:
        header, data_start = _safetensors_header(path)
        ends = {name: data_start + entry["data_offsets"][1] for name, entry in header.items()}
        size = path.stat().st_size
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "every tensor"
    cut_off = [name for name, end in ends.items() if end > size]
    return min(cut_off, key=ends.__getitem__, default="every tensor")


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
