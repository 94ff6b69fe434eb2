"""Maps the tensor names of different programs to MPT's own."""

from __future__ import annotations

# Names of wrappers: torch.compile, FSDP, activation checkpointing, DataParallel.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})
# Names of owners of the model: Composer and PEFT, then the causal language model.
OWNERS = frozenset({"base_model", "model", "transformer"})
# mosaic_gpt's and replit_lm's names of layers by those of MPT (llm-foundry's
# `scripts/misc/convert_examples_ckpt.py`).
LAYERS = {
    "ln_1": "norm_1",
    "ln_2": "norm_2",
    "ln_f": "norm_f",
    "mlp": "ffn",
    "mlp_up": "up_proj",
    "mlp_down": "down_proj",
}
# Ends of names: state of TransformerEngine for training in FP8; frequencies of rope, which follow
# from config.json.
OTHER_STATE = ("_extra_state", ".inv_freq")
USUAL_PREFIXES = ("transformer.", "")


def plain_name(stored: str) -> str:
    """Returns a tensor's name in llm-foundry's MPT without `transformer.`, e.g. `wte.weight`."""
    parts = [part for part in stored.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in OWNERS:
        parts.pop(0)
    return ".".join(LAYERS.get(part, part) for part in parts)


def is_weight(stored: str) -> bool:
    """Returns whether a stored tensor is a weight, not other state of a program."""
    return not stored.endswith(OTHER_STATE)
