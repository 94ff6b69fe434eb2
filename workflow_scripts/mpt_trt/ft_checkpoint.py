"""The FasterTransformer (FT) checkpoint directory: `config.ini` and raw `.bin` tensors, by rank.

Files have no header: C order, little endian. Linear weights are transposed to
`[in_features, out_features]`, which is what a MatMul wants. Names, splits and keys are those of
NVIDIA's convert_hf_mpt_to_ft.py; docs/ft_differences.md lists where that is wrong and ours is not.
`manifest.json` is our addition: where the weights came from and a hash of every file.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt import sharding
from mpt_trt.config import MptConfig
from mpt_trt.errors import MptTrtError
from mpt_trt.files import (
    ContentHash,
    content_hashes,
    read_json,
    replace_directory,
    write_in_pieces,
    write_json,
)
from mpt_trt.ft_layout import FtFile, files_of, ft_file, ft_files, held
from mpt_trt.hf_checkpoint import HfCheckpoint, not_finite
from mpt_trt.numerics import BFLOAT16, convert, is_finite, transpose
from mpt_trt.sharding import Range, Shard
from mpt_trt.weight_map import Weight, weights

STORAGE_TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
SECTION = "gpt"
MANIFEST = "manifest.json"
# What a worker takes of each row of a matrix at a time: few enough bytes for the gathered block to
# stay in the processor's cache while it is transposed, checked, hashed and written.
SLAB_ROW_BYTES = 512
# What it takes of a tensor that is not transposed.
SLAB_BYTES = 4 << 20

Advance = Callable[[int], None]


@dataclass(frozen=True)
class FtCheckpoint:
    """A checked FT directory. storage_type: a key of STORAGE_TYPES; manifest: {} when absent."""

    folder: Path
    config: MptConfig
    storage_type: str
    tp_size: int
    model_name: str
    manifest: dict

    def rank_files(self, shard: Shard) -> dict[str, FtFile]:
        """The files that one rank reads, by FT weight name."""
        return {weight.name: ft_file(self.config, weight, shard) for weight in weights(self.config)}

    def file_of(self, weight: Weight, shard: Shard) -> FtFile:
        """The file from which a rank reads a tensor."""
        return ft_file(self.config, weight, shard)

    def matrix(self, weight: Weight, shard: Shard) -> NDArray:
        """A rank's file of a tensor, memory-mapped, in the storage type and of the file's shape."""
        file = self.file_of(weight, shard)
        dtype = STORAGE_TYPES[self.storage_type]
        return np.memmap(self.folder / file.name, dtype, "r", shape=file.shape)

    def hashes(self, names: list[str]) -> dict[str, str]:
        """Content hash of each named file; read from the manifest where it has one."""
        known = {name: entry["hash"] for name, entry in self.manifest.get("files", {}).items()}
        unknown = {name: self.folder / name for name in names if name not in known}
        known.update(content_hashes(unknown))
        return {name: known[name] for name in names}


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConversionSettings:
    """How to write a directory.

    model_name: recorded in config.ini as FT's converter does (its `-i` argument).
    source: where the weights came from, recorded in the manifest.
    """

    storage_type: str
    tp_size: int
    workers: int
    model_name: str
    source: dict


def write_ft_checkpoint(
    checkpoint: HfCheckpoint,
    config: MptConfig,
    settings: ConversionSettings,
    target: Path,
    advance: Advance = lambda _: None,
) -> None:
    """Writes `target` (a `{tp_size}-gpu` folder) as a whole or not at all.

    Tensors are streamed through small slabs, so memory does not grow with the model. `advance`
    is called with the number of bytes written.

    Raises MptTrtError for an illegal tp_size, a NaN or Inf in the checkpoint, a value that the
    storage type cannot hold, and a full disk.
    """
    sharding.require_legal(config, settings.tp_size)
    dtype = STORAGE_TYPES[settings.storage_type]
    with replace_directory(target) as folder, ThreadPoolExecutor(settings.workers) as pool:
        _write_ini(folder / "config.ini", config, settings)
        writer = _Writer(checkpoint, config, folder, dtype, advance)
        jobs = [
            pool.submit(writer.write, weight, files_of(config, weight, settings.tp_size))
            for weight in weights(config)
        ]
        try:
            hashes = dict(pair for job in as_completed(jobs) for pair in job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        _write_manifest(folder, settings, hashes)


def total_bytes(config: MptConfig, storage_type: str, tp_size: int) -> int:
    """Bytes of all `.bin` files of a directory."""
    dtype = STORAGE_TYPES[storage_type]
    return sum(file.byte_size(dtype) for file in ft_files(config, tp_size))


@dataclass(frozen=True)
class _Writer:
    checkpoint: HfCheckpoint
    config: MptConfig
    folder: Path
    dtype: np.dtype
    advance: Advance

    def write(self, weight: Weight, files: list[FtFile]) -> list[tuple[str, str]]:
        """Writes one tensor for all ranks; returns (file name, content hash) pairs."""
        if weight.hf_name is None:
            source, description = np.zeros(weight.shape, self.dtype), weight.name
        else:
            source = self.checkpoint.tensor(weight)
            description = self.checkpoint.describe(weight)
        return [(file.name, self._write_file(file, source, description)) for file in files]

    def _write_file(self, file: FtFile, source: NDArray, description: str) -> str:
        digest = ContentHash()
        with (self.folder / file.name).open("wb") as stream:
            for slab in self._slabs(file, source):
                if not is_finite(slab):
                    raise not_finite(source, description)
                content = self._stored(slab, description).view(np.uint8)
                write_in_pieces(stream, content)
                digest.update(content)
                self.advance(content.nbytes)
        return str(digest)

    def _stored(self, slab: NDArray, description: str) -> NDArray:
        stored = convert(slab, self.dtype)
        if stored.dtype != slab.dtype and not is_finite(stored):
            largest = np.abs(slab.astype(np.float64)).max()
            raise MptTrtError(
                f"{description} holds {largest:g}, which {self.dtype} cannot hold; "
                "choose storage type bfloat16 or float32"
            )
        return stored

    def _slabs(self, file: FtFile, source: NDArray) -> Iterator[NDArray]:
        """Pieces of the file's content in order, flat, in the checkpoint's type."""
        if file.shard is None:
            yield from _flat_slabs(source)
            return
        rows, columns = held(self.config, file.weight, file.shard)
        parts = [source[r.start : r.stop] for r in rows]
        if file.weight.is_linear:
            yield from _transposed_slabs(parts, columns)
        else:
            yield np.concatenate(parts)


def _flat_slabs(source: NDArray) -> Iterator[NDArray]:
    flat = np.ascontiguousarray(source).reshape(-1)
    step = SLAB_BYTES // source.itemsize
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def _transposed_slabs(parts: list[NDArray], columns: Range) -> Iterator[NDArray]:
    """Row blocks of `[len(columns), sum of part rows]`, flat, through reused buffers."""
    width = sum(len(part) for part in parts)
    dtype = parts[0].dtype
    height = min(len(columns), SLAB_ROW_BYTES // dtype.itemsize)
    gathered = np.empty(width * height, dtype)
    transposed = np.empty(height * width, dtype)
    for start in range(columns.start, columns.stop, height):
        stop = min(start + height, columns.stop)
        size = width * (stop - start)
        # Only a contiguous block is transposed fast; so its columns are gathered first.
        block = gathered[:size].reshape(width, stop - start)
        np.concatenate([part[:, start:stop] for part in parts], out=block)
        transpose(block, transposed[:size].reshape(stop - start, width))
        yield transposed[:size]


def _write_ini(path: Path, config: MptConfig, settings: ConversionSettings) -> None:
    values: dict[str, object] = {
        "model_name": settings.model_name or "mpt",
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_positions": config.max_seq_len,
        "n_layer": config.num_layers,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "storage_dtype": settings.storage_type,
        "tensor_parallelism": settings.tp_size,
        "activation_function": "gelu",
        "calibrate_kv_cache": False,
        "smoothquant": None,
        "layer_norm_epsilon": config.layer_norm_epsilon,
    }
    if config.position_embedding == "alibi":
        values["position_embedding_type"] = "alibi"
    if config.num_kv_heads != config.num_heads:
        values["n_kv_head"] = config.num_kv_heads
    if not config.bias:
        values["bias"] = False
    values |= _keys_beyond_ft(config)
    parser = configparser.ConfigParser(interpolation=None)
    parser[SECTION] = {key: str(value) for key, value in values.items()}
    with path.open("w") as stream:
        parser.write(stream)


def _keys_beyond_ft(config: MptConfig) -> dict[str, object]:
    """What FT's config.ini has no key for; written only when it differs from what FT assumes."""
    usual_scale = 1.0 / math.sqrt(config.head_dim)
    found = {
        "position_embedding_type": "learned_absolute"
        if config.position_embedding == "learned"
        else None,
        "alibi_bias_max": config.alibi_bias_max if config.alibi_bias_max != 8 else None,
        "clip_qkv": config.clip_qkv,
        "qk_ln": True if config.qk_ln else None,
        "qk_ln_epsilon": config.qk_ln_epsilon if config.qk_ln_epsilon != 1e-5 else None,
        "softmax_scale": config.softmax_scale if config.softmax_scale != usual_scale else None,
        "logit_scale": config.logit_scale if config.logit_scale != 1.0 else None,
        "norm_type": config.norm_type if config.norm_type != "layernorm" else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def _write_manifest(folder: Path, settings: ConversionSettings, hashes: dict[str, str]) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "hash": hashes[name]}
        for name in sorted(hashes)
    }
    content = {"source": settings.source, "files": files}
    write_json(folder / MANIFEST, content)


# --- reading -------------------------------------------------------------------------------------


def read_ft_checkpoint(folder: Path) -> FtCheckpoint:
    """Opens a directory written by us or by NVIDIA's converter.

    Raises MptTrtError, naming file and field, when config.ini is missing or malformed, or a tensor
    file is missing or of the wrong size.
    """
    path = folder / "config.ini"
    ini = _Ini(path)
    storage_type = ini.text("storage_dtype", "float32")
    if storage_type not in STORAGE_TYPES:
        known = ", ".join(STORAGE_TYPES)
        raise ini.refused("storage_dtype", storage_type, f"known types are {known}")
    if (smoothing := ini.text("smoothquant", "None")) != "None":
        why = "smoothed for int8, not a full-precision checkpoint; convert again without -sq"
        raise ini.refused("smoothquant", smoothing, why)
    manifest_path = folder / MANIFEST
    checkpoint = FtCheckpoint(
        folder=folder,
        config=_config_from_ini(ini, folder),
        storage_type=storage_type,
        tp_size=ini.integer("tensor_parallelism", 1),
        model_name=ini.text("model_name", "mpt"),
        manifest=read_json(manifest_path) if manifest_path.is_file() else {},
    )
    sharding.require_legal(checkpoint.config, checkpoint.tp_size)
    _check_sizes(checkpoint)
    return checkpoint


def _check_sizes(checkpoint: FtCheckpoint) -> None:
    dtype = STORAGE_TYPES[checkpoint.storage_type]
    for file in ft_files(checkpoint.config, checkpoint.tp_size):
        path = checkpoint.folder / file.name
        if not path.is_file():
            raise MptTrtError(f"{path}: tensor file is missing; convert the checkpoint again")
        expected, found = file.byte_size(dtype), path.stat().st_size
        if found != expected:
            raise MptTrtError(
                f"{path}: has {found} bytes, but {list(file.shape)} of {checkpoint.storage_type} "
                f"are {expected}; convert the checkpoint again"
            )


class _Ini:
    """The [gpt] section of a config.ini; keeps the path for error messages."""

    def __init__(self, path: Path):
        self.path = path
        parser = configparser.ConfigParser(interpolation=None)
        try:
            with path.open() as stream:
                parser.read_file(stream)
            self.values = dict(parser[SECTION])
        except FileNotFoundError:
            raise MptTrtError(
                f"{path}: no such file; give a {{tp_size}}-gpu folder of an FT checkpoint"
            ) from None
        except (OSError, configparser.Error, KeyError, UnicodeDecodeError) as error:
            raise MptTrtError(f"{path}: not an FT config.ini ({error})") from None

    def text(self, key: str, default: str) -> str:
        return self.values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        raw = self.values.get(key)
        if raw in (None, "None"):
            if default is None:
                raise MptTrtError(f"{self.path}: {key} is missing; convert the checkpoint again")
            return default
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.refused(key, raw, "a number is required")
        return value

    def refused(self, key: str, value: object, why: str) -> MptTrtError:
        return MptTrtError(f"{self.path}: {key} = {value}: {why}")

    def integer(self, key: str, default: int | None = None) -> int:
        # NVIDIA's converter writes n_inner = 256.0 where expansion_ratio is a float.
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self.refused(key, self.values.get(key), "a positive integer is required")
        return int(value)

    def divisor(self, key: str, whole: int, default: int | None = None) -> int:
        value = self.integer(key, default)
        if whole % value:
            raise self.refused(key, value, f"it must divide {whole}")
        return value

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.values.get(key) not in (None, "None") else None

    def optional_integer(self, key: str) -> int | None:
        value = self.optional_number(key)
        return None if value is None else int(value)

    def flag(self, key: str, default: str) -> bool:
        value = self.values.get(key, default).lower()
        if value not in configparser.ConfigParser.BOOLEAN_STATES:
            raise self.refused(key, value, "True or False is required")
        return configparser.ConfigParser.BOOLEAN_STATES[value]


def _config_from_ini(ini: _Ini, folder: Path) -> MptConfig:
    hidden_size = ini.integer("n_embd")
    num_heads = ini.divisor("n_head", hidden_size)
    usual_scale = 1.0 / math.sqrt(hidden_size // num_heads)
    # NVIDIA's converter writes wpe.bin without saying so in config.ini.
    learned = (folder / "model.wpe.bin").is_file()
    return MptConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=ini.divisor("n_kv_head", num_heads, default=num_heads),
        num_layers=ini.integer("n_layer"),
        intermediate_size=ini.integer("n_inner", 4 * hidden_size),
        vocab_size=ini.integer("vocab_size"),
        max_seq_len=ini.integer("n_positions"),
        softmax_scale=ini.number("softmax_scale", usual_scale),
        position_embedding="learned" if learned else "alibi",
        alibi_bias_max=ini.integer("alibi_bias_max", 8),
        clip_qkv=ini.optional_number("clip_qkv"),
        qk_ln=ini.flag("qk_ln", "false"),
        logit_scale=ini.number("logit_scale", 1.0),
        norm_type="rmsnorm" if ini.text("norm_type", "") == "rmsnorm" else "layernorm",
        layer_norm_epsilon=ini.number("layer_norm_epsilon", 1e-5),
        qk_ln_epsilon=ini.number("qk_ln_epsilon", 1e-5),
        bias=ini.flag("bias", "true"),
        tie_word_embeddings=not (folder / "model.lm_head.weight.bin").is_file(),
        bos_token_id=ini.optional_integer("bos_token_id"),
        eos_token_id=ini.optional_integer("eos_token_id"),
    )
