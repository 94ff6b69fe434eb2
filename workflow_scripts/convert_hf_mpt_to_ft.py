#!/usr/bin/env python3
"""Converts a Hugging Face MPT checkpoint to a FasterTransformer (FT) checkpoint.

Writes {out_dir}/{tensor_parallelism}-gpu. A folder of that name is replaced as a whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from mpt_trt.console import bytes_progress, run_cli


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
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from mpt_trt import ft_checkpoint, hub, sharding
    from mpt_trt.config import read_hf_config
    from mpt_trt.errors import MptTrtError
    from mpt_trt.hf_checkpoint import HfCheckpoint
    from mpt_trt.tokenizer import special_token_ids
    from mpt_trt.weight_map import weights

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
    settings = ft_checkpoint.ConversionSettings(
        storage_type=arguments.storage_type,
        tp_size=arguments.tensor_parallelism,
        workers=arguments.processes,
        model_name=arguments.in_file,
        source=source,
    )
    target = arguments.out_dir / f"{settings.tp_size}-gpu"
    checkpoint = HfCheckpoint(folder, weights(config))
    total = ft_checkpoint.total_bytes(config, settings.storage_type, settings.tp_size)
    with bytes_progress(f"Converting {arguments.in_file}", total) as advance:
        ft_checkpoint.write_ft_checkpoint(checkpoint, config, settings, target, advance)
    print(f"{target}: {total / 1e9:.2f} GB in {settings.storage_type}")


if __name__ == "__main__":
    run_cli(main)
