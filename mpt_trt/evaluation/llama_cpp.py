"""llama.cpp's quantizations of a model, measured on the same windows against the same reference.

The model is written as GGUF in float32, quantized by llama.cpp, and evaluated on the CPU, with the
packages llama-cpp-python and gguf. Sizes are those of all tensors, embedding included.
"""

from __future__ import annotations

import logging
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.heldout import HeldOut
from mpt_trt.evaluation.llama_cpp_result import (
    MOST_WEIGHTS,
    LlamaCppResult,
    Point,
    fits_llama_cpp,
    is_llama_cpp_installed,
)
from mpt_trt.evaluation.logits import divergence
from mpt_trt.evaluation.reference import Head, head_of, open_checkpoint
from mpt_trt.generation.logits import log_softmax
from mpt_trt.model.tensors import weights
from mpt_trt.model.torch_tensors import ModelTensors
from mpt_trt.system.progress_lines import Advance, no_progress

TYPES = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
GGUF_NAMES = {
    "wte": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "final_layernorm.weight": "output_norm.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "attention.query_key_value.weight": "attn_qkv.weight",
    "attention.dense.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.dense_h_to_4h.weight": "ffn_up.weight",
    "mlp.dense_4h_to_h.weight": "ffn_down.weight",
}


def measure_llama_cpp(
    model_dir: Path,
    adapter: Path | None,
    heldout: HeldOut,
    folder: Path,
    advance: Advance = no_progress,
) -> LlamaCppResult:
    """Measures all TYPES. folder: of the GGUF files, which are deleted. advance: counts types.

    Raises MptTrtError when the packages are missing, or llama.cpp cannot represent the model.
    """
    if not is_llama_cpp_installed():
        raise MptTrtError(
            "the packages llama-cpp-python and gguf are missing: pip install '.[frontier]'"
        )
    # It reports every tensor.
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model = open_checkpoint(model_dir, adapter)
    if not fits_llama_cpp(model.config):
        raise MptTrtError(
            f"{model_dir}: llama.cpp does not compute this architecture, or the model has more "
            f"than {MOST_WEIGHTS:,} weights"
        )
    plain, head = folder / "f32.gguf", head_of(model)
    write_gguf(model, plain)
    points = []
    for name in TYPES:
        points.append(_point(name, _quantized(plain, name), heldout, head))
        advance(1)
    plain.unlink()
    version = metadata.version("llama-cpp-python")
    return LlamaCppResult(version, heldout.text_hash, heldout.inputs.shape, tuple(points))


def _quantized(plain: Path, name: str) -> Path:
    import llama_cpp  # optional

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    target = plain.with_name(f"{name}.gguf")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), parameters):
        raise MptTrtError(f"llama.cpp cannot quantize {plain} to {name}")
    return target


def write_gguf(model: ModelTensors, target: Path) -> None:
    """Writes a model in float32, without a tokenizer."""
    import gguf  # optional

    config = model.config
    writer = gguf.GGUFWriter(target, "mpt")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_max_alibi_bias(float(config.alibi_bias_max))
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)
    # The windows are token ids already.
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    for weight in weights(config):
        if weight.hf_name is not None:
            writer.add_tensor(_gguf_name(weight.name), model.tensor(weight.hf_name).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return GGUF_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}"


def _point(name: str, path: Path, heldout: HeldOut, head: Head) -> Point:
    """Evaluates a GGUF file on all windows, and deletes it."""
    import gguf  # optional
    import llama_cpp

    length = heldout.inputs.shape[1]
    model = llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    kl, same = [], []
    for ids, hidden in zip(heldout.inputs, heldout.hidden, strict=True):
        model.reset()
        model.eval(ids.tolist())
        found = np.array(model.scores[:length], np.float64)
        expected = head.logits(torch.from_numpy(hidden)).numpy().astype(np.float64)
        kl.append(divergence(log_softmax(expected), log_softmax(found)).mean())
        same.append((expected.argmax(-1) == found.argmax(-1)).mean())
    model.close()
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors) / 1e6
    path.unlink()
    return Point(f"llama.cpp {name}", size, float(np.mean(kl)), float(np.mean(same)))
