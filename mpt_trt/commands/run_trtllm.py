"""Continue a prompt with TensorRT-LLM's runtime, and record tokens, logits and times."""

from __future__ import annotations

import argparse

from mpt_trt.engines.trtllm.generation_run import record_trtllm_generation
from mpt_trt.engines.trtllm.package import require_tensorrt_llm
from mpt_trt.evaluation.prompt_file import read_prompt
from mpt_trt.system.replace import require_writable


def run(options: argparse.Namespace) -> None:
    version = require_tensorrt_llm()

    require_writable(options.output, [options.prompt, options.engine_dir])
    prompt = list(read_prompt(options.prompt).tokens)
    record_trtllm_generation(
        options.engine_dir, prompt, options.max_output_len, version, options.output
    )
