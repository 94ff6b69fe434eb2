#!/usr/bin/env python3
"""Converts a Hugging Face MPT checkpoint to a FasterTransformer (FT) checkpoint.

Writes {out_dir}/{tensor_parallelism}-gpu. A folder of that name is replaced as a whole.

With -sq and -kv, the model reads pieces of a text first, one block at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpt_trt.cli import calibration_options as options
from mpt_trt.cli.console import bytes_progress, run_cli, steps_progress

if TYPE_CHECKING:
    from mpt_trt.ft.int8 import Int8Conversion
    from mpt_trt.model.config import MptConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "-i", "--in_file", "--in-file", required=True, help="hub id or folder of the checkpoint"
    )
    parser.add_argument(
        "-o", "--out_dir", "--out-dir", type=Path, required=True, help="folder of the result"
    )
    parser.add_argument(
        "-tp",
        "--tensor_parallelism",
        "--tensor-parallelism",
        type=int,
        default=1,
        help="number of ranks (default: %(default)s)",
    )
    parser.add_argument(
        "-t",
        "--storage_type",
        "--storage-type",
        choices=["float32", "float16", "bfloat16"],
        default="float16",
        help="type of the stored weights (default: %(default)s)",
    )
    parser.add_argument(
        "-p",
        "--processes",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="tensors converted at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--revision", default="main", help="revision on the hub (default: %(default)s)"
    )
    parser.add_argument(
        "-sq",
        "--smoothquant",
        type=float,
        metavar="ALPHA",
        help="write a SmoothQuant checkpoint: smoothed weights, int8 weights and scales; alpha, 0 "
        "to 1, says how much of the activations' range the weights take over (0.5 is a good start)",
    )
    parser.add_argument(
        "-kv",
        "--calibrate_kv_cache",
        "--calibrate-kv-cache",
        action="store_true",
        help="write the scale of an int8 KV cache, too, as FT's readers expect it (engines made by "
        "build.py take it from the result of quantize.py)",
    )
    options.add_calibration(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.hf_config import read_hf_config
    from mpt_trt.checkpoint.tensors import HfCheckpoint
    from mpt_trt.checkpoint.tokenizer import special_token_ids
    from mpt_trt.errors import MptTrtError
    from mpt_trt.ft.layout import total_bytes
    from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
    from mpt_trt.model import sharding
    from mpt_trt.model.tensors import weights

    if arguments.processes < 1:
        raise MptTrtError(f"--processes = {arguments.processes}: at least 1 is required")
    folder, source = hub.local_folder(arguments.in_file, arguments.revision)
    config = read_hf_config(folder)
    sharding.require_legal(config, arguments.tensor_parallelism)
    bos, eos = special_token_ids(folder)
    config = dataclasses.replace(
        config,
        bos_token_id=bos if config.bos_token_id is None else config.bos_token_id,
        eos_token_id=eos if config.eos_token_id is None else config.eos_token_id,
    )
    checkpoint = HfCheckpoint(folder, weights(config))
    settings = ConversionSettings(
        storage_type=arguments.storage_type,
        tp_size=arguments.tensor_parallelism,
        workers=arguments.processes,
        model_name=arguments.in_file,
        source=source,
        int8=_int8(arguments, folder, config),
    )
    target = arguments.out_dir / f"{settings.tp_size}-gpu"
    total = total_bytes(config, settings.storage_type, settings.tp_size, settings.int8_layers)
    with bytes_progress(f"Converting {arguments.in_file}", total) as advance:
        write_ft_checkpoint(checkpoint, config, settings, target, advance)
    print(f"{target}: {total / 1e9:.2f} GB in {settings.storage_type}")


def _int8(arguments: argparse.Namespace, folder: Path, config: MptConfig) -> Int8Conversion | None:
    """What int8 weights and scales are made from, where they are asked for."""
    alpha = arguments.smoothquant
    if alpha is None and not arguments.calibrate_kv_cache:
        return None
    options.fill_in(arguments)
    from mpt_trt.calibration.block_stream import activation_ranges
    from mpt_trt.checkpoint import hub
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.ft.int8 import Int8Conversion, require_calibratable
    from mpt_trt.system.files import content_hash

    require_calibratable(config, alpha)
    computation = options.computation(arguments, arguments.storage_type)
    tokenizer = read_tokenizer(hub.tokenizer_folder(arguments.tokenizer_dir or str(folder)))
    samples = options.calibration_samples(arguments, tokenizer)
    with steps_progress(f"Calibrating {arguments.in_file}", config.num_layers) as advance:
        ranges = activation_ranges(folder, samples, computation, advance)
    origin = {
        "text": arguments.calib_text.name,
        "text_hash": content_hash(arguments.calib_text),
        "num_samples": arguments.calib_size,
        "sequence_length": arguments.calib_max_seq_length,
        "computed_in": str(computation.dtype).removeprefix("torch."),
    }
    return Int8Conversion(ranges, alpha, origin)


if __name__ == "__main__":
    run_cli(main)
