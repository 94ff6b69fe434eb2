"""Build an engine directory from a TensorRT-LLM checkpoint with TensorRT-LLM's trtllm-build."""

from __future__ import annotations

import argparse
import shlex
import subprocess
from pathlib import Path

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.trtllm import package
from mpt_trt.engines.trtllm.build_command import TRTLLM_ENGINE, build_command
from mpt_trt.engines.trtllm.buildable import require_buildable
from mpt_trt.engines.trtllm.records import link_records
from mpt_trt.errors import MptTrtError
from mpt_trt.system import gpus
from mpt_trt.system.files import read_json
from mpt_trt.system.replace import replace_directory


def run(options: argparse.Namespace) -> None:
    limits = BuildLimits(
        options.max_batch_size,
        options.max_input_len,
        options.max_output_len,
        options.gather_all_token_logits,
    )

    def command(builder: str, target: Path) -> list[str]:
        return build_command(builder, options.checkpoint_dir, limits, options.workers, target)

    if options.show:
        print(shlex.join(command(package.BUILDER, options.output_dir)))
        return
    package.require_tensorrt_llm()
    builder = package.builder_path()
    require_buildable(
        read_json(options.checkpoint_dir / "config.json"), gpus.compute_capabilities()
    )
    inputs = [options.checkpoint_dir]
    with replace_directory(options.output_dir, TRTLLM_ENGINE, inputs, options.force) as folder:
        status = subprocess.run(command(builder, folder), check=False).returncode
        if status:
            raise MptTrtError(
                f"{package.BUILDER} ended with status {status}; its own message is above"
            )
        link_records(options.checkpoint_dir, folder)
