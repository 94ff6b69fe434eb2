"""What TensorRT-LLM's MPTForCausalLM calls the tensors that FT calls otherwise."""

from __future__ import annotations

EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
MODULES = {
    "attention.query_key_value": "attention.qkv",
    "attention.dense": "attention.dense",
    "mlp.dense_h_to_4h": "mlp.fc",
    "mlp.dense_4h_to_h": "mlp.proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
}


def module_name(ft_name: str) -> str:
    """`transformer.layers.0.mlp.fc` of `layers.0.mlp.dense_h_to_4h`; also of norms."""
    if ft_name == "final_layernorm":
        return "transformer.ln_f"
    _, layer, module = ft_name.split(".", 2)
    return f"transformer.layers.{layer}.{MODULES[module]}"
