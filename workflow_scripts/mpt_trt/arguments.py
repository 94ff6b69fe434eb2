"""Command-line options that several tools share; their defaults are those of config.yaml."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt.settings import (
    parse_settings,
    quantization_choices,
    quantization_default,
    variant_choices,
    variant_default,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mpt_trt.engines.building import BuildRequest
    from mpt_trt.engines.limits import EngineLimits
    from mpt_trt.ft_checkpoint import FtCheckpoint
    from mpt_trt.quantization.recipe import Recipe
    from mpt_trt.quantization.streaming import Computation
    from mpt_trt.sharding import VocabularySharding
    from mpt_trt.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `limits` is read."""
    group = parser.add_argument_group("limits of the engine")
    helps = {
        "max_batch_size": "most rows at a time (prompts times beams)",
        "max_input_len": "most tokens that a row takes in one step",
        "max_output_len": "cache positions that a row has beyond max_input_len",
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
        help="let a step return the logits of every token, not only of one a row",
    )


def add_vocabulary(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `vocabulary` is read."""
    group = parser.add_argument_group("several ranks")
    group.add_argument(
        "--shard_embedding",
        "--use_parallel_embedding",
        action=argparse.BooleanOptionalAction,
        default=variant_default("shard_embedding"),
        help="each rank holds a part of the embedding, not the whole (default: %(default)s)",
    )
    group.add_argument(
        "--shard_head",
        action=argparse.BooleanOptionalAction,
        default=variant_default("shard_head"),
        help="each rank computes a part of the logits, not all (default: %(default)s)",
    )


def vocabulary(arguments: argparse.Namespace) -> VocabularySharding:
    from mpt_trt.sharding import VocabularySharding

    return VocabularySharding(arguments.shard_embedding, arguments.shard_head)


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `recipe` is read."""
    group = parser.add_argument_group("quantization; see config.yaml")
    group.add_argument(
        "--quantization",
        choices=quantization_choices("method"),
        default=quantization_default("method"),
        help="how the matrices of the blocks are stored (default: %(default)s)",
    )
    group.add_argument(
        "--group_size",
        type=int,
        choices=[size for size in quantization_choices("group_size") if size is not None],
        help="input features that share a scale, for int4_weight_only (default: all)",
    )
    group.add_argument(
        "--alpha",
        type=float,
        default=quantization_default("alpha"),
        help="of the checkpoint, for smoothquant (default: %(default)s)",
    )
    for name, text in (
        ("per_channel", "a weight scale for every output feature"),
        ("per_token", "activation scales computed for every token"),
    ):
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=quantization_default(name),
            help=f"{text}, for smoothquant (default: %(default)s)",
        )
    group.add_argument(
        "--kv_cache_dtype",
        choices=variant_choices("kv_cache_dtype"),
        default=variant_default("kv_cache_dtype"),
        help="how keys and values are stored (default: %(default)s)",
    )
    group.add_argument("--calibration", type=Path, help="npz file that quantize.py made")


def recipe(arguments: argparse.Namespace, checkpoint: FtCheckpoint) -> Recipe:
    """The quantization asked for; the calibration is checked against the checkpoint."""
    from mpt_trt.quantization.npz import read_calibration
    from mpt_trt.quantization.recipe import Recipe
    from mpt_trt.quantization.scheme import Quantization, make_scheme

    scheme = make_scheme(
        arguments.quantization,
        group_size=arguments.group_size,
        alpha=arguments.alpha,
        per_channel=arguments.per_channel,
        per_token=arguments.per_token,
    )
    path = arguments.calibration
    calibration = None if path is None else read_calibration(path, checkpoint)
    return Recipe(Quantization(scheme, arguments.kv_cache_dtype), calibration)


def add_builder(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `build_request` is read, limits aside."""
    group = parser.add_argument_group("builder")
    group.add_argument(
        "--backend",
        choices=variant_choices("backend"),
        default=variant_default("backend"),
        help="what builds the engine (default: %(default)s)",
    )
    group.add_argument(
        "--compute_capabilities",
        nargs="+",
        type=_compute_capability,
        default=variant_default("compute_capabilities"),
        metavar="X.Y",
        help="GPUs that tensorrt_rtx builds for (default: %(default)s)",
    )


def limits(arguments: argparse.Namespace) -> EngineLimits:
    from mpt_trt.engines.limits import EngineLimits

    return EngineLimits(
        max_batch_size=arguments.max_batch_size,
        max_input_len=arguments.max_input_len,
        max_output_len=arguments.max_output_len,
        gather_all_token_logits=arguments.gather_all_token_logits,
    )


def build_request(arguments: argparse.Namespace, engine_limits: EngineLimits) -> BuildRequest:
    from mpt_trt.engines.building import BuildRequest

    return BuildRequest(
        limits=engine_limits,
        backend=arguments.backend,
        compute_capabilities=tuple(arguments.compute_capabilities),
    )


def _compute_capability(text: str) -> str:
    if not re.fullmatch(r"[0-9]+\.[0-9]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.9")
    return text


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose what runs an engine."""
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--runtime",
        choices=["auto", "tensorrt", "onnxruntime"],
        default="auto",
        help="auto: TensorRT where it can run the engine, else ONNX Runtime (default: %(default)s)",
    )
    group.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads of ONNX Runtime; 0 for one a core (default: %(default)s)",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Adds the options from which `computation` and `calibration_samples` are read."""
    usual = parse_settings({}).calibration
    group = parser.add_argument_group("calibration")
    add, default = group.add_argument, "(default: %(default)s)"
    add(
        "--calib_text",
        type=Path,
        default=REPOSITORY / usual.text,
        help=f"text that the model reads (default: {usual.text})",
    )
    add("--calib_size", type=int, default=usual.num_samples, help=f"pieces of it {default}")
    add(
        "--calib_max_seq_length",
        type=int,
        default=usual.sequence_length,
        help=f"tokens of a piece {default}",
    )
    add(
        "--batch_size",
        type=int,
        default=8,
        help="pieces read at a time, at most; less takes less memory, and more time on a GPU "
        f"{default}",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default=usual.device,
        help=f"what computes; auto: a GPU where PyTorch finds one {default}",
    )
    add(
        "--tokenizer_dir",
        help="hub id or folder of the tokenizer (default: that of the Hugging Face checkpoint)",
    )


def calibration_samples(arguments: argparse.Namespace, tokenizer: Tokenizer) -> Tensor:
    """Token ids, int64 `[calib_size, calib_max_seq_length]`."""
    from mpt_trt.quantization.samples import read_samples

    return read_samples(
        arguments.calib_text, tokenizer, arguments.calib_size, arguments.calib_max_seq_length
    )


def computation(arguments: argparse.Namespace, dtype: str) -> Computation:
    """How to calibrate. dtype: what a GPU computes in; a CPU computes in float32.

    Raises MptTrtError for a number below 1, and when there is no GPU but one is asked for.
    """
    import torch

    from mpt_trt.errors import MptTrtError
    from mpt_trt.quantization.streaming import Computation

    for name in ("calib_size", "calib_max_seq_length", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise MptTrtError(f"--{name} = {value}: at least 1 is required")
    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        raise MptTrtError("--device = cuda: PyTorch finds no GPU; take cpu, or auto")
    if arguments.device == "cpu" or not has_gpu:
        return Computation("cpu", torch.float32, arguments.batch_size)
    return Computation("cuda", getattr(torch, dtype), arguments.batch_size)
