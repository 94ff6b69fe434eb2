"""A loader of TensorRT-LLM checkpoints (0.20 to 1.2.1) for MPTForCausalLM, stricter than its own.

Written after what TensorRT-LLM's model, layers and loader ask for, from config.json alone; it
knows nothing of the library. Every tensor that the model has must be there, in its shape and type;
nothing else may be.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

LINEAR = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
MANDATORY = {
    "architecture": ("MPTForCausalLM", "MptForCausalLM"),
    "dtype": ("float16", "bfloat16", "float32"),
    "logits_dtype": ("float32", "float16"),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("alibi",),
    "norm_epsilon": (1e-5,),
    "bias": (False,),
    "embedding_sharding_dim": (0,),
}
NUMBERS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "has_zero_point", "pre_quant_scale",
    "smoothquant_val", "clamp_val", "use_meta_recipe", "exclude_modules",
}  # fmt: skip
PLUGIN = {
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": (True, True),
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": (True, False),
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN": (False, True),
    "W8A8_SQ_PER_TENSOR_PLUGIN": (False, False),
}
ALGORITHMS = {None, "W8A16", "W4A16", "W4A16_AWQ", "FP8", "W8A8_SQ_PER_CHANNEL", *PLUGIN}

Wanted = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Loaded:
    """config: config.json. ranks: tensors of each rank by name."""

    config: dict
    ranks: list[dict[str, Tensor]]

    @property
    def tp_size(self) -> int:
        return self.config["mapping"]["tp_size"]


def load(folder: Path) -> Loaded:
    """Reads and checks a checkpoint; asserts what is wrong with it."""
    config = json.loads((folder / "config.json").read_text())
    check_config(config)
    world = config["mapping"]["world_size"]
    # Snakemake leaves a hidden time stamp.
    # TensorRT-LLM ignores what it does not know.
    others = {"manifest.json", "tokenizer"}
    files = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - others
    assert files == {"config.json", *(f"rank{rank}.safetensors" for rank in range(world))}
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(world)]
    wanted = expected(config)
    for found in ranks:
        described = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
        assert described == wanted
        for name, tensor in found.items():
            assert tensor.float().isfinite().all(), name
            if "scal" in name or name.endswith("smoother"):
                assert (tensor.float() > 0).all(), name
    return Loaded(config, ranks)


def check_config(config: dict) -> None:
    for key, values in MANDATORY.items():
        assert config[key] in values, key
    assert all(isinstance(config[key], int) and config[key] > 0 for key in NUMBERS)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    assert config["head_size"] * heads == hidden
    assert config["intermediate_size"] == 4 * hidden
    mapping = config["mapping"]
    assert mapping["world_size"] == mapping["tp_size"] * mapping["pp_size"]
    assert mapping["pp_size"] == 1
    assert config["vocab_size"] % mapping["tp_size"] == 0
    assert isinstance(config["use_parallel_embedding"], bool)
    check_quantization(config)


def check_quantization(config: dict) -> None:
    content = config["quantization"]
    # QuantConfig(**content) raises for other keys.
    assert content.keys() <= QUANTIZATION_KEYS
    assert content["quant_algo"] in ALGORITHMS
    assert content["kv_cache_quant_algo"] in (None, "INT8", "FP8")
    algorithm, excluded = content["quant_algo"], content.get("exclude_modules")
    if algorithm in ("W8A16", "W4A16"):
        # Otherwise the embedding would be taken for a quantized one.
        assert excluded is None or "*vocab_embedding" in excluded
    if algorithm == "W4A16_AWQ":
        assert content["pre_quant_scale"] is True and content["has_zero_point"] is False
        assert content["group_size"] in (64, 128)
    if excluded is not None:
        assert "lm_head" in excluded
    if algorithm in PLUGIN:
        # SmoothQuantAttention has no such parameters.
        assert config["clip_qkv"] is None and config["alibi_bias_max"] == 8


def expected(config: dict) -> Wanted:
    """Every tensor of one rank."""
    dtype, tp_size = getattr(torch, config["dtype"]), config["mapping"]["tp_size"]
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    parallel = config["use_parallel_embedding"]
    found: Wanted = {
        "transformer.vocab_embedding.weight": (
            (vocab // tp_size if parallel else vocab, hidden),
            dtype,
        ),
        "transformer.ln_f.weight": ((hidden,), dtype),
        "lm_head.weight": ((vocab // tp_size, hidden), dtype),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, wanted in block(config).items():
            found[f"transformer.layers.{layer}.{name}"] = wanted
    return found


def block(config: dict) -> Wanted:
    dtype = getattr(torch, config["dtype"])
    algorithm = config["quantization"]["quant_algo"]
    found: Wanted = {
        f"{norm}.weight": ((config["hidden_size"],), dtype)
        for norm in ("input_layernorm", "post_layernorm")
    }
    for name, shape in linear_shapes(config).items():
        found |= {f"{name}.{key}": value for key, value in linear(config, name, shape).items()}
    if algorithm in PLUGIN:
        for norm in ("input_layernorm", "post_layernorm"):
            found[f"{norm}.scale_to_int"] = ((1,), torch.float32)
        if not PLUGIN[algorithm][1]:
            for part in ("attention", "mlp"):
                found[f"{part}.quantization_scaling_factor"] = ((1,), torch.float32)
    if config["quantization"]["kv_cache_quant_algo"] is not None:
        found["attention.kv_cache_scaling_factor"] = ((1,), torch.float32)
    return found


def linear_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """`[out, in]` of a rank's matrices."""
    hidden, tp_size = config["hidden_size"], config["mapping"]["tp_size"]
    queries = config["num_attention_heads"] // tp_size
    keys = math.ceil(config["num_key_value_heads"] / tp_size)
    return {
        "attention.qkv": ((queries + 2 * keys) * config["head_size"], hidden),
        "attention.dense": (hidden, hidden // tp_size),
        "mlp.fc": (4 * hidden // tp_size, hidden),
        "mlp.proj": (hidden, 4 * hidden // tp_size),
    }


def linear(config: dict, name: str, shape: tuple[int, int]) -> Wanted:
    out, inner = shape
    dtype, float32 = getattr(torch, config["dtype"]), torch.float32
    algorithm = config["quantization"]["quant_algo"]
    if algorithm in ("W8A16", "W4A16", "W4A16_AWQ"):
        group_size = config["quantization"].get("group_size") or 0
        tp_size = config["mapping"]["tp_size"]
        is_split_by_output = name in ("attention.qkv", "mlp.fc")
        whole = (out * tp_size, inner) if is_split_by_output else (out, inner * tp_size)
        # Otherwise the layers pad themselves, and the weights do not fit.
        assert not any(size % (max(64, group_size) * tp_size) for size in whole)
    match algorithm:
        case None | "W8A16" | "W4A16":
            return {"weight": (shape, dtype)}
        case "W4A16_AWQ":
            groups = inner // config["quantization"]["group_size"]
            return {
                "weight": ((out // 2, inner), torch.int8),
                "weights_scaling_factor": ((out, groups), float32),
                "prequant_scaling_factor": ((inner,), dtype),
            }
        case "FP8":
            return {
                "weight": (shape, torch.float8_e4m3fn),
                "weights_scaling_factor": ((1,), float32),
                "activation_scaling_factor": ((1,), float32),
            }
        case "W8A8_SQ_PER_CHANNEL":
            return {
                "weight": (shape, torch.int8),
                "weights_scaling_factor": ((out,), float32),
                "activation_scaling_factor": ((1,), float32),
                "prequant_scaling_factor": ((inner,), dtype),
            }
    per_channel, per_token = PLUGIN[algorithm]
    scales = (1, out) if per_channel or name == "attention.qkv" else (1, 1)
    found: Wanted = {"weight": (shape, torch.int8), "per_channel_scale": (scales, float32)}
    if name in ("attention.dense", "mlp.proj"):
        found["smoother"] = ((1, inner), float32)
    if not per_token:
        found["act_scale"] = ((1, 1), float32)
    return found


# --- stored tensors, as TensorRT-LLM reads them ---------------------------------------------------


def unpacked(packed: Tensor) -> Tensor:
    """int8 `[out / 2, in]` to 4-bit integers `[out, in]`: row 2j is the low half of byte j."""
    low = (packed << 4) >> 4  # both shifts are arithmetic
    high = packed >> 4
    return torch.stack([low, high], dim=1).reshape(-1, packed.shape[1])


def whole_matrix(loaded: Loaded, layer: int, name: str) -> Tensor:
    """A layer's weights of all ranks, float32 `[out, in]`, as Hugging Face has them.

    Quantized ones are dequantized; what the input is multiplied by is multiplied in.
    """
    parts = [rank_matrix(loaded.config, rank, layer, name) for rank in loaded.ranks]
    if name in ("attention.dense", "mlp.proj"):
        return torch.cat(parts, dim=1)
    if name == "mlp.fc":
        return torch.cat(parts)
    config = loaded.config
    queries = config["num_attention_heads"] // loaded.tp_size * config["head_size"]
    kv_heads = config["num_key_value_heads"]
    # Of ranks that hold the same K/V head, the first.
    step = max(1, loaded.tp_size // kv_heads)
    pieces = [part.split([queries, *[(len(part) - queries) // 2] * 2]) for part in parts]
    for first in range(0, loaded.tp_size, step):
        for other in pieces[first : first + step]:
            assert torch.equal(other[1], pieces[first][1])
            assert torch.equal(other[2], pieces[first][2])
    return torch.cat(
        [piece[0] for piece in pieces]
        + [piece[1] for piece in pieces[::step]]
        + [piece[2] for piece in pieces[::step]]
    )


def rank_matrix(config: dict, rank: dict[str, Tensor], layer: int, name: str) -> Tensor:
    module = f"transformer.layers.{layer}.{name}"
    weight = rank[f"{module}.weight"]
    match config["quantization"]["quant_algo"]:
        case None | "W8A16" | "W4A16":
            return weight.float()
        case "W4A16_AWQ":
            scales = rank[f"{module}.weights_scaling_factor"]
            group_size = config["quantization"]["group_size"]
            values = unpacked(weight).float() * scales.repeat_interleave(group_size, dim=1)
        case "FP8":
            return weight.float() * rank[f"{module}.weights_scaling_factor"]
        case "W8A8_SQ_PER_CHANNEL":
            values = weight.float() * rank[f"{module}.weights_scaling_factor"][:, None]
        case _:
            # The smoothed weights, not divided again.
            return weight.float()
    return values * rank[f"{module}.prequant_scaling_factor"].float()
