"""Writes TensorRT-LLM's unified checkpoint: `config.json` and `rank{r}.safetensors`, with records.

The sources are an FT checkpoint with the same tensor-parallel size and, if the quantization needs
one, a calibration result. docs/formats.md describes the content; the tests compare it with
ModelOpt's export.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.engines.backend_support import (
    mixed_is_unsupported,
    require_supported,
    uses_modelopt_form,
    uses_plugin_form,
)
from mpt_trt.engines.spec import TENSORRT_LLM, BuildLimits, EngineSpec
from mpt_trt.engines.trtllm.linear_tensors import LinearForm, Tensors, choose_form, vector
from mpt_trt.engines.trtllm.names import EMBEDDING, HEAD, module_name
from mpt_trt.engines.trtllm.records import own_files, write_records
from mpt_trt.engines.trtllm.safetensors_file import StreamedTensor, write_safetensors
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import FtCheckpoint
from mpt_trt.ft.layout import FtFile
from mpt_trt.model.config import MptConfig
from mpt_trt.model.sharding import Rank, VocabularySharding, all_ranks
from mpt_trt.model.tensors import weights
from mpt_trt.quantization.calibrated_weights import FP8_MAX, INT8_MAX
from mpt_trt.quantization.integers import row_blocks
from mpt_trt.quantization.schemes import Awq, Fp8, Gptq, Mixed, SmoothQuant, WeightOnly
from mpt_trt.system.files import write_json
from mpt_trt.system.replace import FolderKind, replace_directory

# The checkpoint does not depend on limits, because trtllm-build receives them.
NO_LIMITS = BuildLimits(max_batch_size=1, max_input_len=1, max_output_len=1)
KV_CACHE_ALGORITHMS = {"auto": None, "int8": "INT8", "fp8": "FP8"}
KV_CACHE_MAX = {"int8": INT8_MAX, "fp8": FP8_MAX}
# Keys are (per_channel, per_token).
PLUGIN_ALGORITHMS = {
    (True, True): "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    (True, False): "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    (False, True): "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
    (False, False): "W8A8_SQ_PER_TENSOR_PLUGIN",
}


@dataclass(frozen=True)
class TrtllmConversion:
    """Conversion of an FT checkpoint with the same tensor-parallel size.

    Raises MptTrtError, before any work, when TensorRT-LLM's MPT model does not support it, or a
    calibration result is missing or has another format.
    """

    checkpoint: FtCheckpoint
    calibrated: CalibratedQuantization
    vocabulary: VocabularySharding

    def __post_init__(self) -> None:
        spec = self.spec
        require_supported(spec, TENSORRT_LLM)
        if uses_modelopt_form(spec.scheme):
            self._require_int8_sq()
        if spec.quantization.kv_cache != "auto":
            # Raises for a result without the amax of keys and values.
            self.calibrated.required_calibration.kv_amax(0)
        # Raises for a smoothed checkpoint that should be plain, and the reverse.
        self.linear_form(Rank(0, self.checkpoint.tp_size))

    @property
    def config(self) -> MptConfig:
        return self.checkpoint.config

    @property
    def spec(self) -> EngineSpec:
        """Spec of the engine, with the calibration result's group size."""
        quantization = self.calibrated.quantization
        if isinstance(quantization.scheme, Awq | Gptq):
            group_size = self.calibrated.required_calibration.group_size
            scheme = replace(quantization.scheme, group_size=group_size)
            quantization = replace(quantization, scheme=scheme)
        return EngineSpec(
            self.config,
            self.checkpoint.storage_type,
            self.checkpoint.tp_size,
            NO_LIMITS,
            self.vocabulary,
            quantization,
        )

    def linear_form(self, rank: Rank) -> LinearForm:
        return choose_form(self.checkpoint, rank, self.calibrated)

    def _require_int8_sq(self) -> None:
        result = self.calibrated.calibration
        if result is None or result.quantization_format != "int8_sq":
            problem = "there is none" if result is None else f"{result.path} has another format"
            raise MptTrtError(
                "smoothquant with per_channel and without per_token needs a calibration result of "
                f"int8_sq, but {problem}; make it with quantize.py --qformat int8_sq"
            )


TRTLLM_CHECKPOINT = FolderKind(
    "a TensorRT-LLM checkpoint", lambda folder: own_files(folder, "rank{}.safetensors")
)


def write_trtllm_checkpoint(
    conversion: TrtllmConversion, target: Path, workers: int = 1, force: bool = False
) -> None:
    """Writes the folder `target` in one step, `workers` ranks at a time.

    Tensors are streamed, so that each of these ranks needs memory for one matrix. force: see
    `require_replaceable`.
    """
    calibration = conversion.calibrated.calibration
    inputs = [conversion.checkpoint.folder, *([calibration.path] if calibration else [])]
    replacement = replace_directory(target, TRTLLM_CHECKPOINT, inputs, force)
    with replacement as folder, ThreadPoolExecutor(workers) as pool:
        write_json(folder / "config.json", config_content(conversion))
        write_records(conversion.checkpoint, folder)

        def write(rank: Rank) -> None:
            path = folder / f"rank{rank.index}.safetensors"
            write_safetensors(path, rank_tensors(conversion, rank))

        list(pool.map(write, all_ranks(conversion.checkpoint.tp_size)))


# --- config.json ---------------------------------------------------------------------------------


def config_content(conversion: TrtllmConversion) -> dict:
    """Makes the content of config.json."""
    config, tp_size = conversion.config, conversion.checkpoint.tp_size
    return {
        "architecture": "MPTForCausalLM",
        "dtype": conversion.checkpoint.storage_type,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "norm_epsilon": config.layer_norm_epsilon,
        "position_embedding_type": "alibi",
        "max_position_embeddings": config.max_seq_len,
        "bias": config.bias,
        "clip_qkv": config.clip_qkv,
        "alibi_bias_max": config.alibi_bias_max,
        "use_parallel_embedding": conversion.vocabulary.embedding,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": tp_size, "tp_size": tp_size, "pp_size": 1},
        "quantization": _quantization_content(conversion.calibrated),
    }


def _quantization_content(calibrated: CalibratedQuantization) -> dict:
    """Makes the key `quantization`, only with keys that TensorRT-LLM accepts.

    Without exclude_modules, TensorRT-LLM excludes the head and the embedding.
    """
    cache = {"kv_cache_quant_algo": KV_CACHE_ALGORITHMS[calibrated.quantization.kv_cache]}
    excluded = {"exclude_modules": ["lm_head"]}
    match calibrated.quantization.scheme:
        case None:
            return {"quant_algo": None, **cache}
        case WeightOnly(bits=bits):
            return {"quant_algo": f"W{bits}A16", **cache}
        case Awq() | Gptq():
            return {
                "quant_algo": "W4A16_AWQ",
                **cache,
                "group_size": calibrated.required_calibration.group_size,
                "has_zero_point": False,
                "pre_quant_scale": True,
                **excluded,
            }
        case Mixed():
            raise mixed_is_unsupported()
        case Fp8():
            return {"quant_algo": "FP8", **cache, **excluded}
        case SmoothQuant() as scheme if uses_plugin_form(scheme):
            algorithm = PLUGIN_ALGORITHMS[scheme.per_channel, scheme.per_token]
            return {"quant_algo": algorithm, **cache, "smoothquant_val": scheme.alpha}
        case SmoothQuant():
            return {"quant_algo": "W8A8_SQ_PER_CHANNEL", **cache, **excluded}


# --- tensors -------------------------------------------------------------------------------------


def rank_tensors(conversion: TrtllmConversion, rank: Rank) -> Tensors:
    """Tensors of one rank's file by name."""
    checkpoint = conversion.checkpoint
    linear_form = conversion.linear_form(rank)
    tensors = _vocabulary_tensors(conversion, rank)
    for weight in weights(checkpoint.config):
        if weight.is_linear:
            tensors |= linear_form.tensors(weight)
        # Norms, because FT stores zeros for norms without a bias.
        elif len(weight.shape) == 1 and weight.hf_name is not None:
            module, _, kind = weight.name.rpartition(".")
            stored = checkpoint.mapped(checkpoint.file_of(weight, rank))
            tensors[f"{module_name(module)}.{kind}"] = _whole(stored)
    return tensors | _cache_tensors(conversion)


def _vocabulary_tensors(conversion: TrtllmConversion, rank: Rank) -> Tensors:
    """Embedding and head, which TensorRT-LLM stores even if they are tied."""
    checkpoint, config = conversion.checkpoint, conversion.config
    files = {name: file for name, file in checkpoint.rank_files(rank).items() if _is_table(file)}
    embedding = checkpoint.mapped(files["wte"])
    head = embedding if config.tie_word_embeddings else checkpoint.mapped(files["lm_head.weight"])
    part = rank.part(config.vocab_size)
    own = slice(part.start, part.stop)
    is_sharded = conversion.vocabulary.embedding
    return {EMBEDDING: _whole(embedding[own] if is_sharded else embedding), HEAD: _whole(head[own])}


def _is_table(file: FtFile) -> bool:
    return file.weight.name in ("wte", "lm_head.weight")


def _cache_tensors(conversion: TrtllmConversion) -> Tensors:
    """Scale of each layer's cache, which keys and values share."""
    cache = conversion.calibrated.quantization.kv_cache
    if cache == "auto":
        return {}
    scales = {}
    for layer in range(conversion.config.num_layers):
        amax = conversion.calibrated.required_calibration.kv_amax(layer)
        scale = max(amax.key, amax.value) / KV_CACHE_MAX[cache]
        name = f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"
        scales[name] = vector([scale or 1.0])
    return scales


def _whole(stored: NDArray) -> StreamedTensor:
    """Makes a tensor of an unchanged array, streamed in blocks of rows."""

    def blocks() -> Iterator[NDArray]:
        yield from row_blocks(np.atleast_2d(stored))

    return StreamedTensor(stored.dtype, stored.shape, blocks)
