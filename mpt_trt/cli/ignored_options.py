"""Options of NVIDIA's MPT example that have no effect, without imports of libraries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

# Options of TensorRT-LLM's plugins, scheduler and cache. Here, attention, matrix products, padding
# and the cache are parts of the network.
OF_BUILD = (
    "use_gpt_attention_plugin",
    "use_gemm_plugin",
    "use_layernorm_plugin",
    "use_rmsnorm_plugin",
    "use_lookup_plugin",
    "use_lora_plugin",
    "use_weight_only_quant_matmul_plugin",
    "use_smooth_quant_gemm_plugin",
    "strongly_typed",
    "enable_context_fmha",
    "enable_context_fmha_fp32_acc",
    "use_paged_context_fmha",
    "use_context_fmha_for_generation",
    "multi_block_mode",
    "remove_input_padding",
    "use_inflight_batching",
    "paged_kv_cache",
    "tokens_per_block",
    "max_num_tokens",
    # Beams are rows and count in --max_batch_size.
    "max_beam_width",
    "gpus_per_node",
    "use_custom_all_reduce",
    "use_embedding_sharing",
    "embedding_sharding_dim",
    "builder_opt",
    "timing_cache",
    "profiling_verbosity",
    "random_seed",
    "visualize",
    "enable_debug_output",
)
OF_CONVERSION = ("dataset_cache_dir", "load_model_on_cpu", "convert_model_on_cpu")
OF_QUANTIZATION = ("seed",)
OF_RUN = (
    "use_py_session",
    "streaming_interval",
    "run_profiling",
    "debug_mode",
    "no_prompt_template",
)


def add_ignored(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add options, with or without a value, that `report_ignored` reports if they are given."""
    group = parser.add_argument_group("accepted, without effect")
    for name in names:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        group.add_argument(*spellings, dest=name, nargs="?", const=True, help=argparse.SUPPRESS)
    group.description = " ".join(f"--{name}" for name in names)
    parser.set_defaults(without_effect=tuple(names))


def report_ignored(options: argparse.Namespace) -> None:
    """Print the given options without effect, in one line on stderr."""
    names = getattr(options, "without_effect", ())
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        listed = " ".join(f"--{name}" for name in given)
        print(f"Without effect here: {listed}", file=sys.stderr)
