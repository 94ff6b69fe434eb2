"""Builds and runs one case in a separate process, because a fault of TensorRT may end it.

python -m first_contact.run_case NAME OUTPUT     OUTPUT: JSON file of the result
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from engines.test_quantized_engines import DEMO, Model
from first_contact.cases import Case, all_cases
from first_contact.checked import CheckedTensorRt
from mpt_trt.checkpoint.hf_config import read_hf_config
from mpt_trt.engines.build.build import build_engine
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.spec import BuilderChoice
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.logits import all_logits, mean_divergence
from mpt_trt.evaluation.recorded_generation import measure_speed
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.system import gpus
from support.checkpoints import write_checkpoint
from support.step_scenario import make_steps, require_same_text

# Sequence of which the logits are compared with the float32 reference, and its seed.
LENGTH, SEED = 24, 3
SPEED_PROMPT, SPEED_TOKENS, SPEED_ROUNDS = 100, 48, 3
# How much further from the reference TensorRT may be than ONNX Runtime: other rounding.
KL_FACTOR, KL_FLOOR = 2.0, 1e-4


@dataclass
class Result:
    """Result of a case. status: `ok`, `wrong` or `failed`.

    difference: the largest from ONNX Runtime in any step, as a multiple of the logits' standard
    deviation. kl: mean KL divergence from the float32 reference, in nats; kl_onnxruntime: ONNX
    Runtime's. broken: rules of TensorRT's documentation that our calls broke.
    """

    name: str
    kind: str
    status: str = "failed"
    message: str = ""
    runtime: str = ""
    difference: float | None = None
    kl: float | None = None
    kl_onnxruntime: float | None = None
    same_text: bool | None = None
    build_seconds: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    broken: list[str] = field(default_factory=list)


def run_case(case: Case, folder: Path) -> Result:
    """Builds the case's engine in `folder` and runs it; errors become a part of the result."""
    result = Result(case.name, case.kind)
    try:
        hf = _checkpoint(case, folder)
        started = time.perf_counter()
        engine_dir = _build(case, hf, folder)
        result.build_seconds = time.perf_counter() - started
        _run(case, hf, engine_dir, result)
    except (MptTrtError, ArithmeticError, RuntimeError, AssertionError) as error:
        result.message = f"{type(error).__name__}: {error}"[:500]
    return result


def _checkpoint(case: Case, folder: Path) -> Path:
    if case.kind == "demo":
        return DEMO
    if case.kind == "random":
        from tools import random_checkpoint

        options = argparse.Namespace(
            output_dir=folder / "hf", like=case.like, layers=None, dtype="float16", seed=0
        )
        options.force = False
        random_checkpoint.run(options)
        return folder / "hf"
    return write_checkpoint(folder / "hf", case.spec)


def _build(case: Case, hf: Path, folder: Path) -> Path:
    vocab_size = read_hf_config(hf).vocab_size
    generator = torch.Generator().manual_seed(1)
    samples = torch.randint(vocab_size, (2, 32), generator=generator)
    model = Model(hf, folder, samples, group_size=16 if hf != DEMO else 64)
    checkpoint = model.checkpoint(case.quantization, 1, case.dtype)
    calibrated = model.calibrated(case.quantization, checkpoint)
    inputs = NetworkInputs(checkpoint, case.limits, VocabularySharding(), calibrated)
    builder = BuilderChoice("auto", gpus.compute_capabilities()[:1])
    build_engine(inputs, builder, folder / "engine")
    return folder / "engine"


def _run(case: Case, hf: Path, engine_dir: Path, result: Result) -> None:
    package = read_manifest(engine_dir).builder.package
    with pytest.MonkeyPatch.context() as patch:
        module = CheckedTensorRt(importlib.import_module(package), result.broken)
        patch.setitem(sys.modules, package, module)  # type: ignore[arg-type]
        engine = load_engine(engine_dir, "tensorrt")
        result.runtime = engine.runtime
        vocab_size = engine.model.vocab_size
        if case.kind in ("demo", "random"):
            prompt = [index % vocab_size for index in range(SPEED_PROMPT)]
            speed = measure_speed(engine, prompt, SPEED_TOKENS, SPEED_ROUNDS)
            result.prefill_tokens_per_s = speed.prefill_tokens_per_s
            result.decode_tokens_per_s = speed.decode_tokens_per_s
        if case.kind == "random":
            result.status = "wrong" if result.broken else "ok"
            return
        fallback = load_engine(engine_dir, "onnxruntime")
        if case.kind != "demo":
            differences: list[float] = []
            make_steps(engine.model, fallback.model, vocab_size, lambda d, _: differences.append(d))
            result.difference = max(differences)
            result.same_text = _has_same_text(engine.model, fallback.model, vocab_size)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(vocab_size, (LENGTH,), generator=generator).tolist()
        expected = reference_logits(hf, tokens).numpy()
        result.kl, result.kl_onnxruntime = (
            mean_divergence(expected, all_logits(each, tokens)) for each in (engine, fallback)
        )
    result.status, result.message = _judge(case, result)


def _has_same_text(ours, theirs, vocab_size: int) -> bool:
    try:
        require_same_text(ours, theirs, vocab_size)
    except AssertionError:
        return False
    return True


def _judge(case: Case, result: Result) -> tuple[str, str]:
    """Status and message. Other kernels may choose another token where two are nearly alike."""
    assert result.kl is not None and result.kl_onnxruntime is not None
    complaints = []
    if result.difference is not None and not result.difference <= case.bound:
        complaints.append(f"difference {result.difference:.2g} > {case.bound}")
    allowed = KL_FACTOR * result.kl_onnxruntime + KL_FLOOR
    if not result.kl <= allowed:
        complaints.append(f"KL {result.kl:.2g} > {allowed:.2g}")
    if result.broken:
        complaints.append("broken rules")
    return ("wrong" if complaints else "ok"), "; ".join(complaints)


def main() -> None:
    name, output, capability, gpu_bytes, disk_bytes = sys.argv[1:]
    cases = all_cases(capability, int(gpu_bytes), int(disk_bytes))
    case = next(each for each in cases if each.name == name)
    with tempfile.TemporaryDirectory() as folder:
        result = run_case(case, Path(folder))
    Path(output).write_text(json.dumps(vars(result)))


if __name__ == "__main__":
    main()
