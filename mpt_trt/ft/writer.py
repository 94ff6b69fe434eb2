"""Writes an FT checkpoint directory from the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

import configparser
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpt_trt
from mpt_trt.checkpoint.source import TOKENIZER_FOLDER
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.ft.folder import CONFIG, FT_CHECKPOINT, MANIFEST, SECTION
from mpt_trt.ft.layout import Int8Layers, files_of
from mpt_trt.ft.streams import FtWriter, TensorSource
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.rope import Rope
from mpt_trt.model.tensors import Weight, preceding_norm, weights
from mpt_trt.system.files import content_hash, write_json
from mpt_trt.system.process_pool import Advance, Job, run_forked
from mpt_trt.system.replace import replace_directory
from mpt_trt.system.verified_files import remember_written

if TYPE_CHECKING:
    from mpt_trt.ft.int8 import Int8Conversion

# FT's key has only the value "alibi"; without it, FT uses learned positions.
POSITION_TYPES = {"learned": "learned_absolute", "rope": "rope"}


@dataclass(frozen=True)
class ConversionSettings:
    """Settings of a conversion.

    workers: number of processes; 0 for the caller's own. model_name: recorded in config.ini, as by
    FT's converter (its `-i` argument). provenance: origin of the weights, recorded in the manifest.
    int8: inputs of int8 weights and scales; None for a plain checkpoint. tokenizer: files that are
    copied to the folder `tokenizer`. end_ids: tokens that end a text, recorded in the manifest.
    ignored_end_ids: other end tokens by the file that names them, also recorded.
    """

    storage_type: str
    tp_size: int
    workers: int
    model_name: str
    provenance: dict[str, Any]
    int8: Int8Conversion | None = None
    tokenizer: tuple[Path, ...] = ()
    end_ids: tuple[int, ...] = ()
    ignored_end_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def alpha(self) -> float | None:
        """SmoothQuant's alpha; None without smoothing."""
        return None if self.int8 is None else self.int8.alpha

    @property
    def int8_layers(self) -> Int8Layers:
        """The linear layers that get int8 weights and scales."""
        return Int8Layers.NONE if self.int8 is None else self.int8.layers


def write_ft_checkpoint(
    checkpoint: HfCheckpoint,
    config: MptConfig,
    settings: ConversionSettings,
    target: Path,
    advance: Advance = lambda _: None,
    force: bool = False,
) -> None:
    """Writes `target` (a `{tp_size}-gpu` folder) completely or not at all.

    Tensors are streamed through small blocks, so memory does not grow with the model. `advance` is
    called with the number of bytes written. force: see `require_replaceable`.

    Raises MptTrtError for an illegal tp_size, a NaN or Inf in the checkpoint, a value that the
    storage type cannot hold, a full disk, and an activation amax that does not fit the model.
    """
    sharding.require_legal(config, settings.tp_size)
    if settings.int8 is not None:
        settings.int8.require_fitting(config)
    with replace_directory(target, FT_CHECKPOINT, [checkpoint.folder], force) as folder:
        _write_ini(folder / CONFIG, config, settings)
        source = TensorSource(checkpoint, config, settings.storage_type)
        jobs = list(_writing_jobs(source, folder, settings))
        hashes: dict[str, str] = {}
        for job_hashes in run_forked(jobs, settings.workers, advance):
            hashes |= job_hashes
        hashes |= _copy_tokenizer(settings.tokenizer, folder)
        _write_manifest(folder, settings, hashes)
    remember_written(target, hashes)


def _copy_tokenizer(paths: tuple[Path, ...], folder: Path) -> dict[str, str]:
    """Copies files to `folder/tokenizer`; returns content hashes by path in `folder`."""
    names = [f"{TOKENIZER_FOLDER}/{path.name}" for path in paths]
    for path, name in zip(paths, names, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return {name: content_hash(folder / name) for name in names}


def _writing_jobs(
    source: TensorSource, folder: Path, settings: ConversionSettings
) -> Iterator[Job[dict[str, str]]]:
    """Yields jobs that together write all `.bin` files and return content hashes by file name."""
    all_weights = weights(source.config)
    quantized = [weight for weight in all_weights if settings.int8_layers.includes(weight)]
    folded = {preceding_norm(weight) for weight in quantized}
    if settings.int8 is not None:
        for weight in quantized:
            yield functools.partial(
                _write_int8, source, folder, settings.tp_size, settings.int8, weight
            )
    for weight in all_weights:
        if weight not in quantized and weight.name.rpartition(".")[0] not in folded:
            yield functools.partial(_write_plain, source, folder, settings.tp_size, weight)


def _write_int8(
    source: TensorSource,
    folder: Path,
    tp_size: int,
    int8: Int8Conversion,
    weight: Weight,
    advance: Advance,
) -> dict[str, str]:
    """Writes all files of a linear layer except its bias, for all ranks."""
    return int8.writer(source, FtWriter(folder, advance), tp_size).write(weight)


def _write_plain(
    source: TensorSource, folder: Path, tp_size: int, weight: Weight, advance: Advance
) -> dict[str, str]:
    """Writes one tensor for all ranks."""
    source.prefetch(weight)
    files = files_of(source.config, weight, tp_size, source.storage_type)
    return FtWriter(folder, advance).write_all(files, source.pieces(files))


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
        "smoothquant": settings.alpha,
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
    """Settings without a key in FT's config.ini that differ from FT's assumptions."""
    default_scale = 1.0 / math.sqrt(config.head_dim)
    values: dict[str, object] = {
        "position_embedding_type": POSITION_TYPES.get(config.position_embedding),
        "alibi_bias_max": config.alibi_bias_max if config.alibi_bias_max != 8 else None,
        "clip_qkv": config.clip_qkv,
        "qk_ln": True if config.qk_ln else None,
        "qk_ln_epsilon": config.qk_ln_epsilon if config.qk_ln_epsilon != 1e-5 else None,
        "softmax_scale": config.softmax_scale if config.softmax_scale != default_scale else None,
        "logit_scale": config.logit_scale if config.logit_scale != 1.0 else None,
        "norm_type": config.norm_type if config.norm_type != "layernorm" else None,
    }
    if config.rope is not None:
        values |= _rope_keys(config.rope)
    return {key: value for key, value in values.items() if value is not None}


def _rope_keys(rope: Rope) -> dict[str, object]:
    """Keys of rope: always `rope_theta`, and other settings that differ from the defaults."""
    changed = {k: v for k, v in asdict(rope).items() if v != getattr(Rope(), k)}
    return {f"rope_{key}": value for key, value in {"theta": rope.theta, **changed}.items()}


def _write_manifest(folder: Path, settings: ConversionSettings, hashes: dict[str, str]) -> None:
    files = {
        name: {"bytes": (folder / name).stat().st_size, "hash": hashes[name]}
        for name in sorted(hashes)
    }
    content: dict[str, object] = {
        "mpt_trt_version": mpt_trt.__version__,
        "provenance": settings.provenance,
    }
    if settings.int8 is not None:
        content["calibration"] = settings.int8.provenance
    if settings.end_ids:
        content["end_ids"] = list(settings.end_ids)
    if settings.ignored_end_ids:
        content["ignored_end_ids"] = settings.ignored_end_ids
    content["files"] = files
    write_json(folder / MANIFEST, content)
