"""Seeded random MPT checkpoints for tests: configuration, weights and a tokenizer on disk."""

from __future__ import annotations

import functools
import itertools
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

Style = Literal["hub", "native"]
Layout = Literal["safetensors", "sharded_safetensors", "bin", "sharded_bin"]
NUM_SHARDS = 3


@dataclass(frozen=True)
class CheckpointSpec:
    """Architecture and seed of a checkpoint.

    `num_kv_heads` None is multi-head attention without a `kv_n_heads` key, 1 is
    `multiquery_attention` and any other number `grouped_query_attention` (also when it equals
    `num_heads`). `rope` is what `attn_config` has of rope besides `rope: true`; then there is
    neither ALiBi nor `wpe`.

    Raises:
        ValueError: heads do not divide evenly, or the feed-forward width is not whole.
    """

    hidden_size: int = 48
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_layers: int = 2
    vocab_size: int = 97
    max_seq_len: int = 64
    expansion_ratio: int | float = 4
    no_bias: bool = True
    tie_word_embeddings: bool = True
    alibi: bool = True
    rope: dict[str, Any] | None = field(default=None, hash=False)
    alibi_bias_max: int = 8
    clip_qkv: float | None = None
    qk_ln: bool = False
    softmax_scale: float | None = None
    logit_scale: float | str | None = None
    norm_type: str = "low_precision_layernorm"
    layer_norm_epsilon: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"{self.num_heads} heads do not divide {self.hidden_size}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} kv heads do not divide {self.num_heads} heads")
        if self.hidden_size * self.expansion_ratio != self.ffn_size:
            raise ValueError(f"{self.hidden_size} * {self.expansion_ratio} is not a whole number")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Rows of K, and of V, in Wqkv."""
        return (self.num_kv_heads or self.num_heads) * self.head_dim

    @property
    def ffn_size(self) -> int:
        """Rows of up_proj: `int(hidden_size * expansion_ratio)`, as in llm-foundry."""
        return int(self.hidden_size * self.expansion_ratio)

    @property
    def runs_in_transformers(self) -> bool:
        """Returns whether MptForCausalLM computes this model.

        It reads no kv_n_heads, alibi, alibi_bias_max, qk_ln, logit_scale, norm_type or
        expansion_ratio, and has no biases.
        """
        return (
            self.num_kv_heads is None
            and self.expansion_ratio == 4
            and self.no_bias
            and self.alibi
            and self.rope is None
            and self.alibi_bias_max == 8
            and not self.qk_ln
            and self.logit_scale is None
            and "layernorm" in self.norm_type
        )


def config_dict(
    spec: CheckpointSpec, style: Style = "hub", dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """`config.json` of the checkpoint.

    "hub" is llm-foundry's form as found on the hub (`learned_pos_emb` is true there even with
    ALiBi). "native" is what transformers' MptConfig writes with `to_dict`.

    Raises:
        ValueError: style "native" and MptConfig has no way to say it (grouped-query attention,
            a float expansion_ratio).
    """
    if style == "hub":
        return _hub_config(spec, dtype)
    return _native_config(spec, dtype)


def tensors(spec: CheckpointSpec) -> dict[str, Tensor]:
    """The state dict, float32, names with the `transformer.` prefix, weights `[out, in]`.

    The scales make logits of standard deviation 1 to 2 (before `logit_scale`) and attention
    that is far from uniform, so that a wrong slope, scale or head order shows in the logits.
    """
    return _copies(_random_tensors(spec))


def write_checkpoint(
    folder: str | Path,
    spec: CheckpointSpec,
    *,
    layout: Layout = "safetensors",
    prefix: bool = True,
    dtype: torch.dtype = torch.float32,
    style: Style = "hub",
) -> Path:
    """Write config.json, the weights and a tokenizer into `folder`; return it.

    `prefix` False drops `transformer.` from the names, as in a state dict of the bare MptModel
    (`lm_head.weight` keeps its name).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(dtype) for name, tensor in tensors(spec).items()}
    if not prefix:
        weights = {name.removeprefix("transformer."): t for name, t in weights.items()}
    _write_json(folder / "config.json", config_dict(spec, style, dtype), indent=2)
    _write_weights(folder, weights, layout)
    _write_tokenizer(folder, spec.vocab_size)
    return folder


SEEDED_SPECS = {
    "a": CheckpointSpec(
        hidden_size=64, num_heads=4, num_layers=2, vocab_size=128, max_seq_len=128, seed=11
    ),
    "gqa": CheckpointSpec(
        hidden_size=64,
        num_heads=8,
        num_kv_heads=4,
        num_layers=2,
        vocab_size=128,
        max_seq_len=128,
        seed=13,
    ),
}


def write_seeded_checkpoint(folder: str | Path, name: Literal["a", "gqa"]) -> Path:
    """Write the checkpoint that NVIDIA's converter was run on into `folder`; return it.

    That run was given the relative path `ckpts/<name>`, which its `config.ini` repeats as
    `model_name`: to compare that file, write to `<dir>/ckpts/<name>` and convert
    `ckpts/<name>` from `<dir>`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = SEEDED_SPECS[name]
    config = config_dict(spec) | {"learned_pos_emb": False}
    _write_json(folder / "config.json", config, indent=1)
    _write_weights(folder, seeded_tensors(name), "safetensors")
    _write_tokenizer(folder, spec.vocab_size)
    return folder


def seeded_tensors(name: Literal["a", "gqa"]) -> dict[str, Tensor]:
    """Weights of `write_seeded_checkpoint`: every matrix has standard deviation 0.05."""
    return _copies(_random_tensors(SEEDED_SPECS[name], 0.05))


def _hub_config(spec: CheckpointSpec, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["MptForCausalLM"],
        "model_type": "mpt",
        "d_model": spec.hidden_size,
        "n_heads": spec.num_heads,
        "n_layers": spec.num_layers,
        "expansion_ratio": spec.expansion_ratio,
        "max_seq_len": spec.max_seq_len,
        "vocab_size": spec.vocab_size,
        "no_bias": spec.no_bias,
        "attn_config": _attn_config(spec),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "layer_norm_epsilon": spec.layer_norm_epsilon,
        "learned_pos_emb": True,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
        "logit_scale": spec.logit_scale,
        "emb_pdrop": 0,
        "resid_pdrop": 0,
        "embedding_fraction": 1.0,
        "norm_type": spec.norm_type,
        "init_device": "cpu",
        "verbose": 0,
        "initializer_range": 0.02,
    }


def _attn_config(spec: CheckpointSpec) -> dict[str, Any]:
    # llm-foundry's multihead and multiquery classes take no kv_n_heads: only the grouped one does.
    attn_types = {None: "multihead_attention", 1: "multiquery_attention"}
    attn_type = attn_types.get(spec.num_kv_heads, "grouped_query_attention")
    attn = {
        "attn_type": attn_type,
        "attn_pdrop": 0,
        "attn_impl": "torch",
        "clip_qkv": spec.clip_qkv,
        "softmax_scale": spec.softmax_scale,
        "prefix_lm": False,
        "qk_ln": spec.qk_ln,
        "attn_uses_sequence_id": False,
        "alibi": spec.alibi and spec.rope is None,
        "alibi_bias_max": spec.alibi_bias_max,
    }
    if spec.rope is not None:
        attn |= {"rope": True, **spec.rope}
    if attn_type == "grouped_query_attention":
        attn["kv_n_heads"] = spec.num_kv_heads
    return attn


def _native_config(spec: CheckpointSpec, dtype: torch.dtype) -> dict[str, Any]:
    from transformers import MptConfig  # slow to import, and few tests need it

    attn = _attn_config(spec)
    if "kv_n_heads" in attn or not isinstance(spec.expansion_ratio, int):
        raise ValueError("MptConfig knows neither grouped-query nor a float expansion_ratio")
    hub_only = ("attn_config", "model_type", "torch_dtype", "verbose")
    settings = {k: v for k, v in _hub_config(spec, dtype).items() if k not in hub_only}
    return MptConfig(**settings, attn_config=attn, dtype=dtype).to_dict()


def _shapes(spec: CheckpointSpec) -> dict[str, tuple[int, ...]]:
    hidden, ffn = spec.hidden_size, spec.ffn_size
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (spec.vocab_size, hidden)}
    if not spec.alibi and spec.rope is None:
        shapes["transformer.wpe.weight"] = (spec.max_seq_len, hidden)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)

    norm_bias = not spec.no_bias and "rms" not in spec.norm_type
    for layer in range(spec.num_layers):
        block = f"transformer.blocks.{layer}"
        for name, shape in {
            "attn.Wqkv": (hidden + 2 * spec.kv_size, hidden),
            "attn.out_proj": (hidden, hidden),
            "ffn.up_proj": (ffn, hidden),
            "ffn.down_proj": (hidden, ffn),
        }.items():
            shapes |= _with_bias(f"{block}.{name}", shape, not spec.no_bias)
        shapes |= _with_bias(f"{block}.norm_1", (hidden,), norm_bias)
        shapes |= _with_bias(f"{block}.norm_2", (hidden,), norm_bias)
        if spec.qk_ln:
            # Layer norms for any norm_type, because llm-foundry's blocks do not pass it on.
            shapes |= _with_bias(f"{block}.attn.q_ln", (hidden,), not spec.no_bias)
            shapes |= _with_bias(f"{block}.attn.k_ln", (spec.kv_size,), not spec.no_bias)
    return shapes | _with_bias("transformer.norm_f", (hidden,), norm_bias)


def _with_bias(name: str, shape: tuple[int, ...], bias: bool) -> dict[str, tuple[int, ...]]:
    weight = {f"{name}.weight": shape}
    return weight | {f"{name}.bias": shape[:1]} if bias else weight


def _copies(filled: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that the caller may change."""
    return {name: tensor.clone() for name, tensor in filled.items()}


# A test often needs those of one model several times, and the next test the same ones.
@functools.lru_cache(maxsize=64)
def _random_tensors(spec: CheckpointSpec, matrix_std: float | None = None) -> dict[str, Tensor]:
    """Norm weights 1 + 0.1 z, biases 0.1 z, matrices matrix_std z; z standard normal.

    matrix_std: None for that of `_matrix_std`.

    The i-th name in sorted order draws from `PCG64(SeedSequence([seed, i]))`, so a value depends
    neither on torch's generator nor on the order of drawing.
    """
    shapes = _shapes(spec)
    filled = {}
    for index, name in enumerate(sorted(shapes)):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([spec.seed, index])))
        z = generator.standard_normal(shapes[name], dtype=np.float32)
        if name.endswith("bias"):
            values = 0.1 * z
        elif len(shapes[name]) == 1:
            values = 1.0 + 0.1 * z
        else:
            values = (_matrix_std(spec, name) if matrix_std is None else matrix_std) * z
        filled[name] = torch.from_numpy(np.ascontiguousarray(values))
    return filled


def _matrix_std(spec: CheckpointSpec, name: str) -> float:
    """Standard deviation that gives outputs of about `gain` on inputs of about 1."""
    gains = {"Wqkv": 1.3, "down_proj": 1.5}
    module = name.split(".")[-2]
    if module in ("wte", "wpe", "lm_head"):
        return 1.5 / math.sqrt(spec.hidden_size)
    fan_in = spec.ffn_size if module == "down_proj" else spec.hidden_size
    return gains.get(module, 1.0) / math.sqrt(fan_in)


def _write_weights(folder: Path, weights: dict[str, Tensor], layout: Layout) -> None:
    stem, suffix = ("pytorch_model", "bin") if "bin" in layout else ("model", "safetensors")
    if not layout.startswith("sharded"):
        _save(folder / f"{stem}.{suffix}", weights)
        return
    weight_map = {}
    for number, names in enumerate(_split(sorted(weights), NUM_SHARDS), start=1):
        file_name = f"{stem}-{number:05d}-of-{NUM_SHARDS:05d}.{suffix}"
        _save(folder / file_name, {name: weights[name] for name in names})
        weight_map |= dict.fromkeys(names, file_name)
    total_size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.{suffix}.index.json", index, indent=2)


def _split(names: list[str], parts: int) -> list[list[str]]:
    """Cut into `parts` runs of nearly equal length; a block's tensors may part company."""
    cuts = [len(names) * part // parts for part in range(parts + 1)]
    return [names[start:end] for start, end in itertools.pairwise(cuts)]


def _save(path: Path, weights: dict[str, Tensor]) -> None:
    if path.suffix == ".bin":
        torch.save(weights, path)
    else:
        save_file(weights, path, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A character tokenizer: `<|endoftext|>` 0, `<unk>` 1, then a few ASCII characters."""
    words = ["<|endoftext|>", "<unk>", *"abcdefghijklmnopqrstuvwxyzTLDR;:' "][:vocab_size]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    end = {"id": 0, "content": words[0], **plain, "special": True}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }
    _write_json(folder / "tokenizer.json", tokenizer, indent=None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "model_max_length": 100000,
    }
    _write_json(folder / "tokenizer_config.json", settings, indent=None)


def _write_json(path: Path, value: dict[str, Any], indent: int | None) -> None:
    path.write_text(json.dumps(value, indent=indent), encoding="utf-8")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as an array; bfloat16 becomes ml_dtypes.bfloat16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The reverse of `as_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array.view(np.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def write_zeros(folder: Path) -> int:
    """Makes model.safetensors float32 zeros in the shapes of config.json, which take no disk space.

    Returns the bytes that the tensors would take.
    """
    from mpt_trt.checkpoint.hf_config import read_hf_config
    from mpt_trt.model.tensors import weights

    header, end = {}, 0
    for weight in weights(read_hf_config(folder)):
        if weight.hf_name is not None:
            start, end = end, end + 4 * math.prod(weight.shape)
            header[f"transformer.{weight.hf_name}"] = {
                "dtype": "F32",
                "shape": weight.shape,
                "data_offsets": [start, end],
            }
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + end)
    return end
