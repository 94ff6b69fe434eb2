"""Convert a Hugging Face MPT checkpoint to a FasterTransformer (FT) checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.checkpoint.source import checkpoint_folder, tokenizer_folder
from mpt_trt.checkpoint.special_tokens import describe_conflict, read_special_tokens
from mpt_trt.checkpoint.tensors import HfCheckpoint
from mpt_trt.checkpoint.tokenizer_files import tokenizer_files
from mpt_trt.cli.calibration_options import fill_in
from mpt_trt.cli.ignored_options import report_ignored
from mpt_trt.cli.progress import bytes_progress, steps_progress
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.folder import FT_CHECKPOINT, content_of
from mpt_trt.ft.layout import total_bytes
from mpt_trt.ft.writer import ConversionSettings, write_ft_checkpoint
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.model.tensors import weights
from mpt_trt.system.files import content_hash
from mpt_trt.system.process_pool import MOST_PROCESSES
from mpt_trt.system.replace import require_replaceable

if TYPE_CHECKING:
    from mpt_trt.ft.int8 import Int8Conversion

log = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    report_ignored(options)
    if options.processes < 1:
        raise MptTrtError(f"--processes = {options.processes}: at least 1 is required")
    if options.processes > MOST_PROCESSES:
        raise MptTrtError(
            f"--processes = {options.processes}: at most {MOST_PROCESSES} are possible"
        )
    folder, provenance = checkpoint_folder(options.in_file, options.revision)
    target = options.out_dir / f"{options.tensor_parallelism}-gpu"
    require_replaceable(target, FT_CHECKPOINT, _inputs(options, folder), options.force)
    config = read_hf_config(folder)
    sharding.require_legal(config, options.tensor_parallelism)
    tokenizer = tokenizer_folder(options.tokenizer_dir) if options.tokenizer_dir else folder
    special = read_special_tokens(folder, tokenizer, config.vocab_size)
    if special.ignored_end_ids:
        log.warning("%s", describe_conflict(special.end_ids, special.ignored_end_ids))
    single = config.eos_token_id if config.eos_token_id in special.end_ids else None
    if single is None and special.end_ids:
        single = special.end_ids[0]
    config = dataclasses.replace(config, bos_token_id=special.bos_id, eos_token_id=single)
    checkpoint = HfCheckpoint(folder, weights(config), options.adapter)
    settings = ConversionSettings(
        storage_type=options.storage_type,
        tp_size=options.tensor_parallelism,
        workers=options.processes,
        model_name=options.in_file,
        provenance=provenance | checkpoint.adapter_provenance(),
        int8=_int8(options, folder, tokenizer, config),
        tokenizer=_tokenizer_files(options, tokenizer),
        end_ids=special.end_ids,
        ignored_end_ids=special.ignored_end_ids,
    )
    total = total_bytes(config, settings.storage_type, settings.tp_size, settings.int8_layers)
    replaced = content_of(target)
    with bytes_progress(f"Converting {options.in_file}", total) as advance:
        write_ft_checkpoint(checkpoint, config, settings, target, advance, options.force)
    if replaced not in (None, content_of(target)):
        print(f"{target}: replaced an FT checkpoint of {replaced}")
    print(f"{target}: {total / 1e9:.2f} GB in {settings.storage_type}")


def _inputs(options: argparse.Namespace, folder: Path) -> list[Path]:
    """Lists the inputs, which an output must not replace."""
    # Without the option, the text is not known yet.
    others = (options.tokenizer_dir, options.calib_text, options.adapter)
    return [folder, *(Path(path) for path in others if isinstance(path, str | Path))]


def _tokenizer_files(options: argparse.Namespace, folder: Path) -> tuple[Path, ...]:
    files = tuple(tokenizer_files(folder))
    if options.tokenizer_dir and not files:
        raise MptTrtError(f"--tokenizer_dir = {options.tokenizer_dir}: no tokenizer.json there")
    return files


def _int8(
    options: argparse.Namespace, folder: Path, tokenizer_dir: Path, config: MptConfig
) -> Int8Conversion | None:
    """Computes the inputs of int8 weights and scales; None if they are not requested."""
    alpha = options.smoothquant
    if alpha is None and not options.calibrate_kv_cache:
        return None
    # A plain conversion needs none of these, and some import PyTorch.
    from mpt_trt.calibration.block_stream import activation_amax
    from mpt_trt.checkpoint.tokenizer import read_tokenizer
    from mpt_trt.cli import calibration_requests
    from mpt_trt.ft.int8 import Int8Conversion, require_calibratable

    fill_in(options)
    require_calibratable(config, alpha)
    computation = calibration_requests.computation(options, options.storage_type)
    tokenizer = read_tokenizer(tokenizer_dir).require_fitting(config.vocab_size)
    samples = calibration_requests.calibration_samples(options, tokenizer)
    with steps_progress(f"Calibrating {options.in_file}", config.num_layers) as advance:
        ranges = activation_amax(folder, samples, computation, advance, options.adapter)
    provenance = {
        "text": options.calib_text.name,
        "text_hash": content_hash(options.calib_text),
        "num_samples": options.calib_size,
        "sequence_length": options.calib_max_seq_length,
        "computed_in": str(computation.dtype).removeprefix("torch."),
    }
    return Int8Conversion(ranges, alpha, provenance)
