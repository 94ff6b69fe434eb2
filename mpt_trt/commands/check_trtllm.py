"""Writes TensorRT-LLM's version as JSON, or ends where there is none that we can build with."""

from __future__ import annotations

import argparse

from mpt_trt.engines.trtllm.package import builder_path, require_tensorrt_llm
from mpt_trt.system.files import write_json


def run(options: argparse.Namespace) -> None:
    version = require_tensorrt_llm()
    write_json(options.output, {"tensorrt_llm": version, "builder": builder_path()})
