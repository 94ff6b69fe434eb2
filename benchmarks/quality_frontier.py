"""Divergence over size: the engines of a model next to llama.cpp's quantizations of the same model.

Reads the measurements that the workflow has made in a folder (targets
`quality/MODEL/VARIANT/1-gpu.json`), and measures llama.cpp on the same windows against the same
reference: it writes the model as GGUF, quantizes it, and evaluates it on the CPU. That needs the
packages llama-cpp-python and gguf. Sizes are those of all weights, embedding included, without
graphs, tokenizers and metadata.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from common import REPOSITORY, weight_bytes, write_result

from mpt_trt.calibration.model_source import open_model
from mpt_trt.evaluation.heldout import HeldOut, read_heldout
from mpt_trt.evaluation.logits import divergence
from mpt_trt.evaluation.quality_result import read_quality
from mpt_trt.evaluation.reference import Head, read_head
from mpt_trt.generation.logits import log_softmax
from mpt_trt.model.tensors import weights

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


@dataclass(frozen=True)
class Point:
    """kl: nats per token. top1: share of positions with the same most likely token."""

    name: str
    megabytes: float
    kl: float
    top1: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--project", type=Path, default=REPOSITORY, help="folder of quality/ and trt_engines/")
    add("--model", default="mpt-demo", help="name in the configuration (default: %(default)s)")
    add("--model_dir", type=Path, default=REPOSITORY / "resources" / "mpt-demo")
    add("--variants", nargs="+", help="(default: all that have been measured)")
    add("--folder", type=Path, default=Path("build/benchmark-frontier"), help="for GGUF files")
    add("--llama_result", type=Path, help="a result whose points of llama.cpp are taken over")
    arguments = parser.parse_args()
    points = our_points(arguments.project, arguments.model, arguments.variants)
    heldout = read_heldout(
        arguments.project / "quality" / arguments.model / "reference.safetensors"
    )
    if arguments.llama_result is None:
        points += llama_points(arguments.model_dir, heldout, arguments.folder)
    else:
        points += recorded_points(arguments.llama_result, heldout)
    points.sort(key=lambda point: point.megabytes)
    figures = {
        "model": arguments.model,
        "windows": list(heldout.inputs.shape),
        "text_hash": heldout.text_hash,
        "llama_cpp_python": metadata.version("llama-cpp-python"),
        "points": [asdict(point) for point in points],
    }
    print(write_result(f"quality-frontier-{arguments.model}", figures))
    for point in points:
        print(f"| {point.name} | {point.megabytes:.2f} | {point.kl:.4f} | {point.top1:.1%} |")


def our_points(project: Path, model: str, variants: list[str] | None) -> list[Point]:
    """Points of the engines that have been measured."""
    folder = project / "quality" / model
    names = variants or sorted(path.parent.name for path in folder.glob("*/1-gpu.json"))
    points = []
    for name in names:
        figures = read_quality(folder / name / "1-gpu.json").figures
        size = weight_bytes(project / "trt_engines" / model / name / "1-gpu") / 1e6
        points.append(Point(name, size, figures.kl.mean, figures.top1.mean))
    return points


def llama_points(model_dir: Path, heldout: HeldOut, folder: Path) -> list[Point]:
    """Points of llama.cpp's types."""
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    plain, head = folder / "f32.gguf", read_head(model_dir)
    write_gguf(model_dir, plain)
    points = [llama_point("llama.cpp F32", plain, heldout, head)]
    for name in TYPES:
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        target = folder / f"{name}.gguf"
        if llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), parameters):
            raise RuntimeError(f"llama.cpp cannot quantize {plain} to {name}")
        points.append(llama_point(f"llama.cpp {name}", target, heldout, head))
    return points


def recorded_points(result: Path, heldout: HeldOut) -> list[Point]:
    """Points of llama.cpp in an earlier result on the same text."""
    content = json.loads(result.read_text())
    if (content["windows"], content["text_hash"]) != (
        list(heldout.inputs.shape),
        heldout.text_hash,
    ):
        raise RuntimeError(f"{result}: measured on other text")
    points = [Point(**each) for each in content["points"]]
    return [point for point in points if point.name.startswith("llama.cpp")]


def write_gguf(model_dir: Path, target: Path) -> None:
    """Writes a model in float32, with a tokenizer of the same tokens."""
    import gguf

    source = open_model(model_dir)
    config = source.config
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
    tokenizer = json.loads((model_dir / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {
        each["content"]: each["id"] for each in tokenizer.get("added_tokens", [])
    }
    tokens = {number: text for text, number in ids.items()}
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("mpt")
    writer.add_token_list([tokens.get(n, f"<unused{n}>") for n in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    for weight in weights(config):
        if weight.hf_name is not None:
            values = source.reader.tensor(weight).astype(np.float32)
            writer.add_tensor(_gguf_name(weight.name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("layers."):
        return GGUF_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[rest]}"


def llama_point(name: str, path: Path, heldout: HeldOut, head: Head) -> Point:
    """Evaluates a GGUF file on all windows."""
    import gguf
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
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors) / 1e6
    return Point(name, size, float(np.mean(kl)), float(np.mean(same)))


if __name__ == "__main__":
    main()
