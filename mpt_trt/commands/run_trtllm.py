"""Continue a prompt with TensorRT-LLM's runtime, and record tokens, logits and times."""

from __future__ import annotations

import argparse

from mpt_trt.engines.trtllm.generation_run import record_trtllm_generation
from mpt_trt.engines.trtllm.package import require_tensorrt_llm
from mpt_trt.system.files import read_json


def run(options: argparse.Namespace) -> None:
    version = require_tensorrt_llm()

    prompt = read_json(options.prompt)["tokens"]
    record_trtllm_generation(
        options.engine_dir, prompt, options.max_output_len, version, options.output
    )
