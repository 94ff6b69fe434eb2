"""ModelOpt's own quantization of a whole model, to hold ours against.

The model is transformers' where it has the architecture, and one of our plain blocks where it has
not. ModelOpt is given its presets and nothing of the library's.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MptForCausalLM

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.evaluation.reference import is_in_transformers
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import weights
from mpt_trt.model.torch_block import PlainBlock, causal_bias, model_norm, with_weights
from mpt_trt.model.torch_tensors import ModelTensors

QuantizationFormat = Literal["int4_awq", "fp8", "int8_sq"]
KvFormat = Literal["auto", "fp8", "int8"]
PRESETS = {
    "int4_awq": mtq.INT4_AWQ_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
}
KV_BITS = {"fp8": (4, 3), "int8": 8}


def fake_quantized_logits(
    hf_folder: Path,
    qformat: QuantizationFormat | None,
    token_ids: list[int],
    samples: Tensor,
    group_size: int = 128,
    kv_cache: KvFormat = "auto",
    alpha: float = 0.5,
) -> Tensor:
    """Logits of the model that ModelOpt quantized and computes with, float32 `[tokens, vocab]`.

    qformat: None quantizes only the cache. samples: int64 `[number, seq]`, for calibration. alpha:
    SmoothQuant's.
    """
    model = whole_model(hf_folder)
    quantize_whole(model, qformat, samples, group_size, kv_cache, alpha)
    with torch.no_grad():
        return logits_of(model, torch.tensor([token_ids]))[0]


def whole_model(hf_folder: Path) -> nn.Module:
    """All of the model, in float32."""
    config = read_hf_config(hf_folder)
    if is_in_transformers(config) and config.alibi_bias_max == 8:
        return MptForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    return PlainMpt(ModelTensors(config, HfCheckpoint(hf_folder, weights(config))))


def quantize_whole(
    model: nn.Module,
    qformat: QuantizationFormat | None,
    samples: Tensor,
    group_size: int = 128,
    kv_cache: KvFormat = "auto",
    alpha: float = 0.5,
) -> None:
    """Lets ModelOpt calibrate and quantize all of a model in place, sample by sample."""

    def read_samples(model: nn.Module) -> None:
        for sample in samples:
            logits_of(model, sample[None])

    with _without_traces(), warnings.catch_warnings():
        # Of the head, which is not quantized.
        warnings.filterwarnings("ignore", ".* is not calibrated, skip smoothing")
        mtq.quantize(model, preset(qformat, group_size, kv_cache, alpha), read_samples)


def preset(
    qformat: QuantizationFormat | None, group_size: int, kv_cache: KvFormat, alpha: float
) -> dict:
    if qformat is None:
        config = {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": "max"}
    else:
        config = copy.deepcopy(PRESETS[qformat])
    if qformat == "int8_sq":
        config["algorithm"] = {"method": "smoothquant", "alpha": alpha}
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"][-1] = group_size
    # The presets would also round the inputs of layer norms, which no exporter of ModelOpt keeps.
    for name in ("*norm*", "*[qk]_ln*"):
        config["quant_cfg"].append({"quantizer_name": name, "enable": False})
    if kv_cache != "auto":
        bits = {"num_bits": KV_BITS[kv_cache], "axis": None}
        config["quant_cfg"].append(
            {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": bits, "enable": True}
        )
    return config


def logits_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    """`[batch, seq]` to float32 `[batch, seq, vocab]`."""
    found = model(token_ids)
    return found if isinstance(found, Tensor) else found.logits


class PlainMpt(nn.Module):
    """A whole model of plain blocks, for what transformers does not have."""

    def __init__(self, model: ModelTensors):
        super().__init__()
        self.config: MptConfig = model.config
        self.wte = nn.Parameter(model.tensor("wte.weight"), requires_grad=False)
        learned = self.config.position_embedding == "learned"
        self.wpe = (
            nn.Parameter(model.tensor("wpe.weight"), requires_grad=False) if learned else None
        )
        self.blocks = nn.ModuleList(
            with_weights(partial(PlainBlock, self.config), model.tensors(f"blocks.{layer}."))
            for layer in range(self.config.num_layers)
        )
        self.norm_f = with_weights(partial(model_norm, self.config), model.tensors("norm_f."))
        tied = self.config.tie_word_embeddings
        head = self.wte if tied else model.tensor("lm_head.weight")
        self.head = nn.Parameter(head, requires_grad=False)
        for block in self.blocks:
            block.attn.key, block.attn.value = _Key(), _Value()

    def forward(self, token_ids: Tensor) -> Tensor:
        length = token_ids.shape[1]
        hidden = functional.embedding(token_ids, self.wte)
        if self.wpe is not None:
            hidden = hidden + self.wpe[:length]
        bias = causal_bias(self.config, length)
        for block in self.blocks:
            hidden = block(hidden, bias)
        return functional.linear(self.norm_f(hidden), self.head) * self.config.logit_scale


class _Key(nn.Identity):
    """Module that keys pass before the cache."""


class _Value(nn.Identity):
    """Module that values pass before the cache."""


class _QuantizedKey(_Key):
    def _setup(self) -> None:
        self.k_bmm_quantizer = mtq.nn.TensorQuantizer()

    def forward(self, values: Tensor) -> Tensor:
        return self.k_bmm_quantizer(values)


class _QuantizedValue(_Value):
    def _setup(self) -> None:
        self.v_bmm_quantizer = mtq.nn.TensorQuantizer()

    def forward(self, values: Tensor) -> Tensor:
        return self.v_bmm_quantizer(values)


mtq.register(original_cls=_Key, quantized_cls=_QuantizedKey)
mtq.register(original_cls=_Value, quantized_cls=_QuantizedValue)


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """ModelOpt writes the class that it makes of transformers' attention to a temporary file."""
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = usual
