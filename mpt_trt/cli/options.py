"""Command-line options that several tools share; their defaults are those of config.yaml."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mpt_trt.engines.compute_capabilities import DEFAULT, default_capabilities
from mpt_trt.engines.spec import RUNTIMES, BuilderChoice, BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.distance import Tolerance
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.quantization.schemes import Quantization, make_weight_quantization
from mpt_trt.workflow.settings import (
    TENSORRT_LLM,
    default_tolerance,
    quantization_choices,
    quantization_default,
    variant_choices,
    variant_default,
)


def add_known_model(group: argparse._MutuallyExclusiveGroup) -> None:
    """Add the name of a predefined model."""
    from mpt_trt.checkpoint.known_models import SHAPES  # needs libraries, whose lack is reported

    group.add_argument(
        "--like", choices=SHAPES, help="a predefined model; bench-*: a model of the benchmarks"
    )


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `limits` is read."""
    group = parser.add_argument_group("limits of the engine")
    helps = {
        "max_batch_size": "maximum batch size (prompts x beams)",
        "max_input_len": "maximum number of tokens per row and step",
        "max_output_len": "maximum number of new tokens per prompt",
    }
    for name, text in helps.items():
        group.add_argument(
            f"--{name}",
            type=int,
            default=variant_default(name),
            help=f"{text} (default: %(default)s)",
        )
    group.add_argument(
        "--gather_all_token_logits",
        action="store_true",
        help="return the logits of every token, not only of the last one per row",
    )


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `vocabulary` is read."""
    group = parser.add_argument_group("tensor parallelism")
    group.add_argument(
        "--shard_embedding",
        "--use_parallel_embedding",
        action=argparse.BooleanOptionalAction,
        default=variant_default("shard_embedding"),
        help="split the embedding over the ranks (default: %(default)s)",
    )
    group.add_argument(
        "--shard_head",
        action=argparse.BooleanOptionalAction,
        default=variant_default("shard_head"),
        help="split the computation of logits over the ranks (default: %(default)s)",
    )


def vocabulary(options: argparse.Namespace) -> VocabularySharding:
    """Returns the vocabulary's matrices that are split over the ranks."""
    return VocabularySharding(options.shard_embedding, options.shard_head)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `engine_requests.calibrated` is read."""
    group = parser.add_argument_group("quantization, as in config.yaml")
    group.add_argument(
        "--quantization",
        choices=quantization_choices("method"),
        default=quantization_default("method"),
        help="quantization of the linear layers (default: %(default)s)",
    )
    group.add_argument(
        "--group_size",
        type=int,
        choices=[size for size in quantization_choices("group_size") if size is not None],
        help="input features per scale, for int4_weight_only (default: all)",
    )
    group.add_argument(
        "--bits",
        type=float,
        default=quantization_default("bits"),
        help="bits per weight on average, for mixed",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=quantization_default("alpha"),
        help="migration strength of the checkpoint, for smoothquant (default: %(default)s)",
    )
    for name, text in (
        ("per_channel", "one weight scale per output feature"),
        ("per_token", "one activation scale per token, computed at run time"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=quantization_default(name),
            help=f"{text}, for smoothquant (default: %(default)s)",
        )
    group.add_argument(
        "--head",
        choices=quantization_choices("head"),
        default=quantization_default("head"),
        help="type of the head and the embedding (default: %(default)s)",
    )
    group.add_argument(
        "--kv_cache_dtype",
        choices=variant_choices("kv_cache_dtype"),
        default=variant_default("kv_cache_dtype"),
        help="data type of the KV cache (default: %(default)s)",
    )


def add_calibration_result(parser: argparse.ArgumentParser) -> None:
    """Add the option for the calibration that a quantization needs."""
    parser.add_argument("--calibration", type=Path, help="npz file that quantize.py wrote")


def quantization(options: argparse.Namespace) -> Quantization:
    """The quantization that these options name; raises MptTrtError for mixed without bits."""
    if options.quantization == "mixed" and options.bits is None:
        raise MptTrtError("--quantization = mixed: give its --bits per weight")
    scheme = make_weight_quantization(
        options.quantization,
        bits=options.bits,
        group_size=options.group_size,
        alpha=options.alpha,
        per_channel=options.per_channel,
        per_token=options.per_token,
    )
    return Quantization(scheme, options.kv_cache_dtype, options.head)


def add_builder(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `builder_choice` is read."""
    group = parser.add_argument_group("builder")
    group.add_argument(
        "--backend",
        # TensorRT-LLM builds from its own checkpoints; see build_trtllm.py.
        choices=[name for name in variant_choices("backend") if name != TENSORRT_LLM],
        default=variant_default("backend"),
        help="builder of the plan (default: %(default)s)",
    )
    group.add_argument(
        "--compute_capabilities",
        nargs="+",
        type=_compute_capability,
        default=variant_default("compute_capabilities"),
        metavar="X.Y",
        help="compute capabilities that tensorrt_rtx builds for (default: "
        f"{', '.join(DEFAULT)}, or those of them with fp8 for an engine that uses it)",
    )


def limits(options: argparse.Namespace) -> BuildLimits:
    """Returns the limits of the engine."""
    return BuildLimits(
        max_batch_size=options.max_batch_size,
        max_input_len=options.max_input_len,
        max_output_len=options.max_output_len,
        gather_all_token_logits=options.gather_all_token_logits,
    )


def builder_choice(options: argparse.Namespace, quantization: Quantization) -> BuilderChoice:
    """Returns the builder of an engine's plans, and the GPUs to build for."""
    given = options.compute_capabilities
    chosen = default_capabilities(quantization) if given is None else tuple(given)
    return BuilderChoice(options.backend, chosen)


def _compute_capability(text: str) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.9")
    return text


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Add the options from which `tolerance` is read."""
    group = parser.add_argument_group("tolerance, as in config.yaml")
    usual = default_tolerance()
    group.add_argument(
        "--error_factor",
        type=float,
        default=usual.error_factor,
        help="multiplies the error that is allowed for the engine's type and quantization "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--min_top1",
        type=float,
        default=usual.min_top1,
        help="minimum share of positions with the same most likely token (default: %(default)s)",
    )


def tolerance(options: argparse.Namespace) -> Tolerance:
    """Returns the allowed distance of the engine's logits from the reference."""
    return Tolerance(options.error_factor, options.min_top1)


def add_report_only(parser: argparse.ArgumentParser) -> None:
    """Add the option that accepts an engine that is too far from the reference."""
    parser.add_argument(
        "--report_only",
        action="store_true",
        help="only write the result; check_smoke_test.py prints and judges it later",
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose an engine's runtime, and whether its files are compared."""
    add_trust(parser)
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="auto",
        help="auto: TensorRT if it can run the engine, else ONNX Runtime (default: %(default)s)",
    )
    group.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads of ONNX Runtime; 0: one per core (default: %(default)s)",
    )
    group.add_argument(
        "--activations",
        choices=["exact", "int8"],
        default="exact",
        help="int8: ONNX Runtime on a CPU rounds the inputs of layers with 4- and 8-bit weights to "
        "8 bits, which is faster and less exact (default: %(default)s)",
    )


def add_total_threads(parser: argparse.ArgumentParser) -> None:
    """Add the option by which a measurement takes a known number of cores."""
    parser.add_argument(
        "--total_threads",
        type=int,
        default=0,
        help="CPU threads of all ranks together, if --num_threads is 0; 0: one per core "
        "(default: %(default)s)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option that skips comparing files with their recorded hashes."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="do not compare files with the hashes that were recorded when they were made",
    )
