"""Convert an FT checkpoint to a checkpoint of TensorRT-LLM 0.20 to 1.2.1."""

from __future__ import annotations

import argparse

from mpt_trt.cli import engine_requests
from mpt_trt.cli import options as cli_options
from mpt_trt.engines.trtllm.checkpoint import TrtllmConversion, write_trtllm_checkpoint
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.system.process_pool import MOST_PROCESSES


def run(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise MptTrtError(f"--workers = {options.workers}: at least 1 is required")
    if options.workers > MOST_PROCESSES:
        raise MptTrtError(f"--workers = {options.workers}: at most {MOST_PROCESSES} are possible")
    checkpoint = read_ft_checkpoint(options.model_dir, options.trust)
    conversion = TrtllmConversion(
        checkpoint, engine_requests.calibrated(options, checkpoint), cli_options.vocabulary(options)
    )
    write_trtllm_checkpoint(conversion, options.output_dir, options.workers, options.force)
    size = sum(path.stat().st_size for path in options.output_dir.iterdir() if path.is_file())
    print(f"{options.output_dir}: {checkpoint.tp_size} ranks, {size / 1e9:.2f} GB")
