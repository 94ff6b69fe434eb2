"""Names of the tensors of TensorRT-LLM's MPTForCausalLM."""

from __future__ import annotations

from mpt_trt.model.tensors import BlockMatrix

EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
MODULES = {
    BlockMatrix.QKV: "attention.qkv",
    BlockMatrix.OUTPUT: "attention.dense",
    BlockMatrix.UP: "mlp.fc",
    BlockMatrix.DOWN: "mlp.proj",
    BlockMatrix.QKV.norm: "input_layernorm",
    BlockMatrix.UP.norm: "post_layernorm",
}


def module_name(ft_name: str) -> str:
    """Name of the module of an FT layer or norm.

    For example, `layers.0.mlp.dense_h_to_4h` is `transformer.layers.0.mlp.fc`.
    """
    if ft_name == "final_layernorm":
        return "transformer.ln_f"
    _, layer, module = ft_name.split(".", 2)
    return f"transformer.layers.{layer}.{MODULES[module]}"
