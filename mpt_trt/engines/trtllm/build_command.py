"""Makes the command line of `trtllm-build` for a checkpoint and an engine's limits.

There are no options for precision, quantization, ranks and the embedding's sharding, because
trtllm-build reads them from the checkpoint's config.json.
"""

from __future__ import annotations

from pathlib import Path

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.trtllm.records import record_files
from mpt_trt.system.files import read_json
from mpt_trt.system.replace import FolderKind, read_mark


def _own_files(folder: Path) -> set[str] | None:
    content = read_mark(folder / "config.json")
    if not {"pretrained_config", "build_config"} <= content.keys():
        return None
    engines = {path.name for path in folder.glob("rank*.engine")}
    return {"config.json"} | engines | record_files(folder)


TRTLLM_ENGINE = FolderKind("a TensorRT-LLM engine directory", _own_files)


def build_command(
    builder: str, checkpoint: Path, limits: BuildLimits, workers: int, target: Path
) -> list[str]:
    """Makes the arguments of `trtllm-build`, starting with its path `builder`.

    workers: ranks to build at the same time, each on its own GPU. A row of mpt-trt's batches is a
    request with one beam.
    """
    config = read_json(checkpoint / "config.json")
    dtype = config["dtype"]
    # NVIDIA recommends TensorRT's own products for FP8, because the plugin's are for single
    # requests.
    quantization = config["quantization"]
    is_fp8 = quantization["quant_algo"] == "FP8"
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
    cache = quantization.get("kv_cache_quant_algo")
    if cache == "INT8" or (cache == "FP8" and not is_fp8):
        # Its attention over pages of the context does not read these caches, and 1.x would use it.
        options["use_paged_context_fmha"] = "disable"
    flags = ["--gather_context_logits"] * limits.gather_all_token_logits
    return [builder, *(f"--{name}={value}" for name, value in options.items()), *flags]
