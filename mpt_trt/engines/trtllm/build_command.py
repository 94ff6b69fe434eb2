"""Makes the command line of `trtllm-build` for a checkpoint and an engine's limits.

There are no options for precision, quantization, ranks and the embedding's sharding, because
trtllm-build reads them from the checkpoint's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.trtllm.records import own_files
from mpt_trt.errors import MptTrtError
from mpt_trt.system.files import read_json
from mpt_trt.system.replace import FolderKind
from mpt_trt.system.typed_json import from_json

TRTLLM_ENGINE = FolderKind(
    "a TensorRT-LLM engine directory", lambda folder: own_files(folder, "rank{}.engine")
)


@dataclass(frozen=True)
class _Quantization:
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None


@dataclass(frozen=True)
class _CheckpointConfig:
    """Fields of config.json on which the options depend."""

    dtype: Literal["float32", "float16", "bfloat16"]
    quantization: _Quantization


def _read_config(path: Path) -> _CheckpointConfig:
    try:
        return from_json(_CheckpointConfig, read_json(path))
    except ValueError as error:
        raise MptTrtError(
            f"{path}: not of a TensorRT-LLM checkpoint of this tool, or damaged ({error}); make it "
            "again with convert_ft_to_trtllm.py"
        ) from None


def build_command(
    builder: str, checkpoint: Path, limits: BuildLimits, workers: int, target: Path
) -> list[str]:
    """Makes the arguments of `trtllm-build`, starting with its path `builder`.

    workers: ranks to build at the same time, each on its own GPU. A row of mpt-trt's batches is a
    request with one beam.
    """
    config = _read_config(checkpoint / "config.json")
    dtype = config.dtype
    # NVIDIA recommends TensorRT's own products for FP8, because the plugin's are for single
    # requests.
    is_fp8 = config.quantization.quant_algo == "FP8"
    # Fused attention supports only float16 and bfloat16.
    is_fused = dtype != "float32"
    options = {
        "checkpoint_dir": checkpoint,
        "output_dir": target,
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_input_len + limits.max_output_len,
        "max_beam_width": 1,
        "max_num_tokens": limits.max_batch_size * limits.max_input_len,
        "gpt_attention_plugin": dtype,
        "gemm_plugin": "disable" if is_fp8 else dtype,
        "context_fmha": "enable" if is_fused else "disable",
        "remove_input_padding": "enable",
        "kv_cache_type": "paged",
        "workers": workers,
    }
    cache = config.quantization.kv_cache_quant_algo
    if cache == "INT8" or (cache == "FP8" and not is_fp8):
        # Its attention over pages of the context does not read these caches, and 1.x would use it.
        options["use_paged_context_fmha"] = "disable"
    flags = ["--gather_context_logits"] * limits.gather_all_token_logits
    return [builder, *(f"--{name}={value}" for name, value in options.items()), *flags]
