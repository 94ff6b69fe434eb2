"""Layout of an FT checkpoint: its files and the part of a tensor in each; pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Range, Rank
from mpt_trt.model.tensors import Split, Weight, weights

ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class FtFile:
    """A `.bin` file.

    tensor: FT name without `model.` and rank. weight: the tensor that it contains or belongs to.
    rank: None for a file that all ranks read. dtype: a key of ELEMENT_BYTES.
    """

    tensor: str
    weight: Weight
    rank: Rank | None
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The file's name within the directory."""
        rank = "" if self.rank is None else f".{self.rank.index}"
        return f"model.{self.tensor}{rank}.bin"

    @property
    def num_elements(self) -> int:
        """Number of values in the file."""
        return math.prod(self.shape)

    @property
    def byte_size(self) -> int:
        """Size of the file in bytes."""
        return self.num_elements * ELEMENT_BYTES[self.dtype]


class Int8Layers(Enum):
    """Linear layers of a directory that have int8 weights and scales.

    NONE: a plain checkpoint. QKV: with `-kv`, in addition to a plain checkpoint. ALL: with `-sq`;
    the plain files then contain smoothed values.
    """

    NONE = "none"
    QKV = "qkv"
    ALL = "all"

    def includes(self, weight: Weight) -> bool:
        """Returns whether the layer of `weight` has int8 weights and scales."""
        if self is Int8Layers.QKV:
            return weight.is_linear and weight.split is Split.QKV
        return weight.is_linear and self is Int8Layers.ALL


@dataclass(frozen=True)
class Int8Files:
    """Files of one linear layer that a rank reads for 8-bit products.

    weight, weight_col: int8 `[in, out]`; quantized with one scale for the matrix (one each for Q, K
    and V), and with one per output feature.

    All others are float32. integer = value * orig_quant, value = integer * quant_orig:

    scale_x_orig_quant: for the layer's input (divided by the smoother, if any), `[1]`.
    scale_y_quant_orig: for the layer's output, `[1]`. scale_w_quant_orig: for weight, `[1]`, or
    `[out]` for QKV. scale_w_quant_orig_col: for weight_col,
        `[out]`. scale_y_accum_quant(_col): from the sum of integer products to the output's
        integer; shaped like scale_w_quant_orig(_col). smoother: divisors of the layer's input,
        `[in]`; None if a norm has absorbed them.
    """

    weight: FtFile
    weight_col: FtFile
    scale_x_orig_quant: FtFile
    scale_y_quant_orig: FtFile
    scale_w_quant_orig: FtFile
    scale_w_quant_orig_col: FtFile
    scale_y_accum_quant: FtFile
    scale_y_accum_quant_col: FtFile
    smoother: FtFile | None

    def __iter__(self) -> Iterator[FtFile]:
        files = (getattr(self, field.name) for field in dataclasses.fields(self))
        return (file for file in files if file is not None)


def ft_file(config: MptConfig, weight: Weight, rank: Rank, dtype: str) -> FtFile:
    """File from which rank `rank.index` reads `weight`."""
    if weight.split is Split.WHOLE:
        return FtFile(weight.name, weight, None, weight.shape, dtype)
    rows, columns = held(config, weight, rank)
    out_features = sum(map(len, rows))
    shape = (len(columns), out_features) if weight.is_linear else (out_features,)
    return FtFile(weight.name, weight, rank, shape, dtype)


def int8_files(config: MptConfig, weight: Weight, rank: Rank) -> Int8Files:
    """Int8 files of a linear layer that rank `rank.index` reads."""
    rows, columns = held(config, weight, rank)
    out_features, in_features = sum(map(len, rows)), len(columns)
    layer = linear_name(weight)
    # Every rank has all outputs of a layer that is split by input rows.
    by_output = None if weight.split is Split.ROWS else rank

    def scale(name: str, size: int = 1, of: Rank | None = None) -> FtFile:
        return FtFile(f"{layer}.{name}", weight, of, (size,), "float32")

    def per_tensor(name: str) -> FtFile:
        is_packed = weight.split is Split.QKV
        return scale(name, out_features, rank) if is_packed else scale(name)

    def matrix(suffix: str) -> FtFile:
        shape = (in_features, out_features)
        return FtFile(f"{weight.name}.{suffix}", weight, rank, shape, "int8")

    return Int8Files(
        weight=matrix("int8"),
        weight_col=matrix("int8.col"),
        scale_x_orig_quant=scale("scale_x_orig_quant"),
        scale_y_quant_orig=scale("scale_y_quant_orig"),
        scale_w_quant_orig=per_tensor("scale_w_quant_orig"),
        scale_w_quant_orig_col=scale("scale_w_quant_orig.col", out_features, by_output),
        scale_y_accum_quant=per_tensor("scale_y_accum_quant"),
        scale_y_accum_quant_col=scale("scale_y_accum_quant.col", out_features, by_output),
        smoother=scale("smoother", in_features, rank) if weight.split is Split.ROWS else None,
    )


def linear_name(weight: Weight) -> str:
    """FT name of the layer of `weight`, e.g. `layers.0.attention.dense`."""
    return weight.name.removesuffix(".weight")


def ft_files(
    config: MptConfig, tp_size: int, dtype: str, int8_layers: Int8Layers = Int8Layers.NONE
) -> list[FtFile]:
    """Lists all `.bin` files of a directory for tp_size ranks."""
    by_name: dict[str, FtFile] = {}
    for weight in weights(config):
        files = files_of(config, weight, tp_size, dtype)
        if int8_layers.includes(weight):
            for rank in sharding.all_ranks(tp_size):
                files += int8_files(config, weight, rank)
        # Ranks share some of them.
        by_name |= {file.name: file for file in files}
    return list(by_name.values())


def total_bytes(
    config: MptConfig,
    storage_type: str,
    tp_size: int,
    int8_layers: Int8Layers = Int8Layers.NONE,
) -> int:
    """Bytes of all `.bin` files of a directory."""
    return sum(file.byte_size for file in ft_files(config, tp_size, storage_type, int8_layers))


def files_of(config: MptConfig, weight: Weight, tp_size: int, dtype: str) -> list[FtFile]:
    """Files of one tensor: one for all ranks, or one per rank."""
    if weight.split is Split.WHOLE:
        return [FtFile(weight.name, weight, None, weight.shape, dtype)]
    return [ft_file(config, weight, rank, dtype) for rank in sharding.all_ranks(tp_size)]


def held(config: MptConfig, weight: Weight, rank: Rank) -> tuple[list[Range], Range]:
    """Rows and columns of the Hugging Face tensor `[out, in]` (or `[out]`) on a rank."""
    every_input = Range(0, weight.shape[-1])
    if weight.split is Split.QKV:
        return list(sharding.qkv_columns(config, rank)), every_input
    if weight.split is Split.COLUMNS:
        return [sharding.feed_forward_columns(config, rank)], every_input
    return [Range(0, weight.shape[0])], rank.part(weight.shape[1])
