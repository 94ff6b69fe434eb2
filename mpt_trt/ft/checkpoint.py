"""Reads a FasterTransformer (FT) checkpoint directory: `config.ini` and raw `.bin` files by rank.

Files have no header: C order, little endian. Linear weights are transposed to `[in_features,
out_features]`, as a MatMul expects them. Names, splits and keys are those of NVIDIA's
convert_hf_mpt_to_ft.py, except where that is wrong (docs/ft_differences.md). mpt-trt adds
`manifest.json` with the provenance of the weights and a hash of every file.
"""

from __future__ import annotations

import configparser
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpt_trt.arrays.cast import STORAGE_TYPES
from mpt_trt.checkpoint.other_folders import hint
from mpt_trt.checkpoint.source import TOKENIZER_FOLDER
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.folder import CONFIG, INI_ERRORS, MANIFEST, MOST_INI_BYTES, QUOTES, parse_ini
from mpt_trt.ft.layout import (
    FtFile,
    Int8Files,
    Int8Layers,
    ft_file,
    ft_files,
    int8_files,
    linear_name,
)
from mpt_trt.model import sharding
from mpt_trt.model.config import MOST, MptConfig, NormType, PositionEmbedding
from mpt_trt.model.rope import Rope, RopeScaling
from mpt_trt.model.sharding import Rank
from mpt_trt.model.tensors import BlockMatrix, Weight, weights
from mpt_trt.system.files import CONTENT_HASH, content_hashes, read_json, read_small_file
from mpt_trt.system.json_text import shown
from mpt_trt.system.staging import recover
from mpt_trt.system.typed_json import from_json
from mpt_trt.system.verified_files import require_recorded

NORM_TYPES: dict[str, NormType] = {"layernorm": "layernorm", "rmsnorm": "rmsnorm"}
POSITION_EMBEDDINGS: dict[str, PositionEmbedding] = {
    "alibi": "alibi",
    "learned_absolute": "learned",
    "rope": "rope",
}
ROPE_SCALINGS: dict[str, RopeScaling] = {
    "none": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
}
# If this file exists, a plain checkpoint also has int8 files of QKV.
KV_SCALE = f"model.layers.0.{BlockMatrix.QKV}.scale_y_quant_orig.bin"


@dataclass(frozen=True)
class _Entry:
    """The manifest's record of a file."""

    hash: str


@dataclass(frozen=True)
class _Manifest:
    """The fields of the manifest that are read."""

    files: dict[str, _Entry] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    ignored_end_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class FtCheckpoint:
    """A checked FT directory.

    storage_type: a key of STORAGE_TYPES. manifest: {} when absent. smoothing: SmoothQuant's alpha
    if the weights and norms are smoothed; such a directory is not a plain checkpoint. int8_layers:
    linear layers with int8 weights and scales.
    """

    folder: Path
    config: MptConfig
    storage_type: str
    tp_size: int
    model_name: str
    manifest: dict[str, Any]
    smoothing: float | None = None
    int8_layers: Int8Layers = Int8Layers.NONE

    def rank_files(self, rank: Rank) -> dict[str, FtFile]:
        """Files in the storage type that one rank reads, by FT weight name."""
        return {
            weight.name: ft_file(self.config, weight, rank, self.storage_type)
            for weight in weights(self.config)
        }

    def rank_int8_files(self, rank: Rank) -> dict[str, Int8Files]:
        """Int8 files that one rank reads, by FT layer name, e.g. `layers.0.attention.dense`."""
        return {
            linear_name(weight): int8_files(self.config, weight, rank)
            for weight in weights(self.config)
            if self.int8_layers.includes(weight)
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of the weights from the manifest; {} if it is not recorded."""
        provenance = self.manifest.get("provenance", {})
        return provenance if isinstance(provenance, dict) else {}

    @property
    def recorded_hashes(self) -> dict[str, str]:
        """Content hashes by name, from the manifest."""
        return {name: entry["hash"] for name, entry in self.manifest.get("files", {}).items()}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text, from the manifest; config.ini stores only one of them.

        Raises MptTrtError when the manifest's value is malformed.
        """
        single = self.config.eos_token_id
        recorded = self.manifest.get("end_ids", [] if single is None else [single])
        legal = range(self.config.vocab_size)
        if not isinstance(recorded, list) or any(
            not isinstance(token, int) or token not in legal for token in recorded
        ):
            raise MptTrtError(
                f"{self.folder / MANIFEST}: end_ids = {shown(recorded)}: a list of token ids below "
                f"{self.config.vocab_size} is required"
            )
        return tuple(recorded)

    @property
    def ignored_end_ids(self) -> dict[str, tuple[int, ...]]:
        """End tokens that other files of the checkpoint name, by file."""
        recorded = self.manifest.get("ignored_end_ids", {})
        return {name: tuple(ids) for name, ids in recorded.items()}

    @property
    def tokenizer_files(self) -> list[str]:
        """Paths, in the folder, of the tokenizer's files; [] if it has none."""
        paths = sorted((self.folder / TOKENIZER_FOLDER).glob("*"))
        return [str(path.relative_to(self.folder)) for path in paths if path.is_file()]

    def require_plain(self) -> None:
        """Raises MptTrtError when the weights are smoothed, because the network would be wrong."""
        if self.smoothing is not None:
            raise MptTrtError(
                f"{self.folder}/config.ini: smoothquant = {self.smoothing:g}: smoothed for int8, "
                "not a full-precision checkpoint; convert again without -sq"
            )

    def file_of(self, weight: Weight, rank: Rank) -> FtFile:
        """File from which a rank reads a tensor."""
        return ft_file(self.config, weight, rank, self.storage_type)

    def matrix(self, weight: Weight, rank: Rank) -> NDArray[Any]:
        """Maps a rank's part of a linear layer's weight, `[in, out]`, into memory."""
        return self.mapped(self.file_of(weight, rank))

    def mapped(self, file: FtFile) -> NDArray[Any]:
        """Maps a file in the storage type, `file.shape`, into memory for reading."""
        dtype = STORAGE_TYPES[self.storage_type]
        return np.memmap(self.folder / file.name, dtype, "r", shape=file.shape)

    def hashes(self, names: list[str]) -> dict[str, str]:
        """Content hash of each named file, from the manifest or computed."""
        known = self.recorded_hashes
        unknown = {name: self.folder / name for name in names if name not in known}
        known.update(content_hashes(unknown))
        return {name: known[name] for name in names}


def read_ft_checkpoint(folder: Path, is_trusted: bool = False) -> FtCheckpoint:
    """Opens a directory written by mpt-trt or by NVIDIA's converter.

    is_trusted: files are not compared with the manifest's hashes.

    Raises MptTrtError, naming file and field, when config.ini is missing or malformed, or a tensor
    file is missing, has the wrong size, or differs from the manifest.
    """
    recover(folder)
    path = folder / CONFIG
    ini = _Ini(path)
    storage_type = ini.text("storage_dtype", "float32")
    if storage_type not in STORAGE_TYPES:
        known = ", ".join(STORAGE_TYPES)
        raise ini.refused("storage_dtype", storage_type, f"known types are {known}")
    smoothing = ini.optional_number("smoothquant")
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise ini.refused("smoothquant", smoothing, "alpha is a number from 0 to 1")
    manifest_path = folder / MANIFEST
    checkpoint = FtCheckpoint(
        folder=folder,
        config=_config_from_ini(ini, folder),
        storage_type=storage_type,
        tp_size=ini.integer("tensor_parallelism", MOST["num_heads"], 1),
        model_name=ini.text("model_name", "mpt"),
        manifest=_read_manifest(manifest_path) if manifest_path.is_file() else {},
        smoothing=smoothing,
        int8_layers=_int8_layers(folder, smoothing),
    )
    sharding.require_legal(checkpoint.config, checkpoint.tp_size)
    names = _check_sizes(checkpoint)
    if not is_trusted:
        recorded = checkpoint.recorded_hashes
        hashes = {name: recorded[name] for name in names if name in recorded}
        require_recorded(folder, hashes, manifest_path, "convert the checkpoint again")
    return checkpoint


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path)
    try:
        for name, entry in from_json(_Manifest, manifest).files.items():
            if not CONTENT_HASH.fullmatch(entry.hash):
                raise ValueError(f"files.{shown(name)}.hash = {shown(entry.hash)}: not a hash")
    except ValueError as error:
        raise MptTrtError(f"{path}: damaged ({error}); convert the checkpoint again") from None
    return manifest


def _int8_layers(folder: Path, smoothing: float | None) -> Int8Layers:
    if smoothing is not None:
        return Int8Layers.ALL
    # NVIDIA's config.ini always has `calibrate_kv_cache = False`.
    has_kv_scale = (folder / KV_SCALE).is_file()
    return Int8Layers.QKV if has_kv_scale else Int8Layers.NONE


def _check_sizes(checkpoint: FtCheckpoint) -> list[str]:
    """Checks the size of every file and returns the names of all files."""
    names = []
    for file in ft_files(
        checkpoint.config, checkpoint.tp_size, checkpoint.storage_type, checkpoint.int8_layers
    ):
        path = checkpoint.folder / file.name
        if not path.is_file():
            raise MptTrtError(f"{path}: tensor file is missing; {_convert_again(path.parent)}")
        size = path.stat().st_size
        if size != file.byte_size:
            raise MptTrtError(
                f"{path}: has {size} bytes, but {list(file.shape)} of {file.dtype} "
                f"are {file.byte_size}; {_convert_again(path.parent)}"
            )
        names.append(file.name)
    return names


def _convert_again(folder: Path) -> str:
    return f"delete {folder} and convert the checkpoint again"


class _Ini:
    """The [gpt] section of a config.ini, with the file's path for error messages."""

    def __init__(self, path: Path):
        self.path = path
        if not path.exists():
            has_tensors = any(path.parent.glob("model.*.bin"))
            remedy = "give a {tp_size}-gpu folder of an FT checkpoint" + hint(path.parent)
            raise MptTrtError(
                f"{path}: no such file; {_convert_again(path.parent) if has_tensors else remedy}"
            )
        content = read_small_file(path, MOST_INI_BYTES)
        try:
            self.values = parse_ini(content)
        except INI_ERRORS as error:
            reason = " ".join(shown(error).split())  # the parser's messages have several lines
            raise MptTrtError(
                f"{path}: not an FT config.ini ({reason}); convert the checkpoint again"
            ) from None

    def text(self, key: str, default: str) -> str:
        return self.values.get(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        raw = self.values.get(key)
        if raw is None or raw == "None":
            if default is None:
                raise MptTrtError(
                    f"{self.path}: {key} is missing; {_convert_again(self.path.parent)}"
                )
            return default
        try:
            value = float(raw)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.refused(key, raw, "a number is required")
        return value

    def refused(self, key: str, value: object, why: str) -> MptTrtError:
        return MptTrtError(f"{self.path}: {key} = {shown(value).strip(QUOTES)}: {why}")

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise self.refused(key, self.values.get(key), "a positive number is required")
        return value

    def integer(self, key: str, most: int, default: int | None = None) -> int:
        # NVIDIA's converter writes n_inner = 256.0 if expansion_ratio is a float.
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise self.refused(key, self.values.get(key), "a positive integer is required")
        if value > most:
            raise self.refused(key, self.values.get(key), f"at most {most} is supported")
        return int(value)

    def divisor(self, key: str, whole: int, most: int, default: int | None = None) -> int:
        value = self.integer(key, most, default)
        if whole % value:
            raise self.refused(key, value, f"it must divide {whole}")
        return value

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.values.get(key) not in (None, "None") else None

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self.optional_number(key)
        if value is None:
            return None
        if value != int(value) or not 0 <= value < vocab_size:
            raise self.refused(
                key, self.values.get(key), f"a token id below {vocab_size} is required"
            )
        return int(value)

    def choice(self, key: str, choices: Collection[str], default: str) -> str:
        value = self.text(key, default)
        if value not in choices:
            raise self.refused(key, value, f"only {' and '.join(choices)} can be computed")
        return value

    def flag(self, key: str, default: str) -> bool:
        value = self.values.get(key, default).lower()
        if value not in configparser.ConfigParser.BOOLEAN_STATES:
            raise self.refused(key, value, "True or False is required")
        return configparser.ConfigParser.BOOLEAN_STATES[value]


def _config_from_ini(ini: _Ini, folder: Path) -> MptConfig:
    ini.choice("activation_function", ["gelu"], "gelu")
    hidden_size = ini.integer("n_embd", MOST["hidden_size"])
    num_heads = ini.divisor("n_head", hidden_size, MOST["num_heads"])
    vocab_size = ini.integer("vocab_size", MOST["vocab_size"])
    usual_scale = 1.0 / math.sqrt(hidden_size // num_heads)
    clip_qkv = ini.optional_number("clip_qkv")
    position_embedding = _position_embedding(ini, folder)
    return MptConfig(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=ini.divisor("n_kv_head", num_heads, num_heads, default=num_heads),
        num_layers=ini.integer("n_layer", MOST["num_layers"]),
        intermediate_size=ini.integer("n_inner", MOST["intermediate_size"], 4 * hidden_size),
        vocab_size=vocab_size,
        max_seq_len=ini.integer("n_positions", MOST["max_seq_len"]),
        softmax_scale=ini.positive("softmax_scale", usual_scale),
        position_embedding=position_embedding,
        rope=_rope(ini) if position_embedding == "rope" else None,
        alibi_bias_max=ini.integer("alibi_bias_max", MOST["alibi_bias_max"], 8),
        clip_qkv=None if clip_qkv is None else ini.positive("clip_qkv", clip_qkv),
        qk_ln=ini.flag("qk_ln", "false"),
        logit_scale=ini.positive("logit_scale", 1.0),
        norm_type=NORM_TYPES[ini.choice("norm_type", NORM_TYPES, "layernorm")],
        layer_norm_epsilon=ini.positive("layer_norm_epsilon", 1e-5),
        qk_ln_epsilon=ini.positive("qk_ln_epsilon", 1e-5),
        bias=ini.flag("bias", "true"),
        tie_word_embeddings=not (folder / "model.lm_head.weight.bin").is_file(),
        bos_token_id=ini.token_id("bos_token_id", vocab_size),
        eos_token_id=ini.token_id("eos_token_id", vocab_size),
    )


def _position_embedding(ini: _Ini, folder: Path) -> PositionEmbedding:
    # NVIDIA's converter writes wpe.bin without recording it in config.ini.
    is_learned = (folder / "model.wpe.bin").is_file()
    stored = "learned_absolute" if is_learned else "alibi"
    named = ini.choice("position_embedding_type", POSITION_EMBEDDINGS, stored)
    if (named == "learned_absolute") != is_learned:
        verb = "lies" if is_learned else "does not lie"
        raise ini.refused("position_embedding_type", named, f"but model.wpe.bin {verb} next to it")
    return POSITION_EMBEDDINGS[named]


def _rope(ini: _Ini) -> Rope:
    if "rope_theta" not in ini.values:
        raise ini.refused("position_embedding_type", "rope", "rope_theta is missing")
    usual = Rope()
    positions = "original_max_position_embeddings"
    return Rope(
        theta=ini.positive("rope_theta", usual.theta),
        scaling=ROPE_SCALINGS[ini.choice("rope_scaling", ROPE_SCALINGS, usual.scaling)],
        factor=ini.positive("rope_factor", usual.factor),
        low_freq_factor=ini.positive("rope_low_freq_factor", usual.low_freq_factor),
        high_freq_factor=ini.positive("rope_high_freq_factor", usual.high_freq_factor),
        original_max_position_embeddings=ini.integer(
            f"rope_{positions}", MOST["max_seq_len"], getattr(usual, positions)
        ),
    )
