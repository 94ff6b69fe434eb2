"""Checks of jobs before any job runs: whether a rule can make a target.

For a model that is not fetched yet, the step itself checks the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpt_trt.engines.backend_support import require_supported
from mpt_trt.engines.spec import TENSORRT_LLM
from mpt_trt.engines.trtllm.buildable import require_head_size
from mpt_trt.engines.trtllm.package import require_tensorrt_llm
from mpt_trt.errors import MptTrtError
from mpt_trt.harness.tasks import require_lm_eval
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.quantization.mixed import require_budget
from mpt_trt.quantization.schemes import (
    GROUPED,
    Awq,
    Gptq,
    WeightOnly,
    default_group_size,
    group_size_of,
    require_fitting_groups,
)
from mpt_trt.workflow import key_checks, target_names
from mpt_trt.workflow.plan import Plan, Target


@dataclass(frozen=True)
class _Job:
    """A target of a plan. config: the model's architecture; None until it is on disk."""

    plan: Plan
    target: Target
    config: MptConfig | None


def require_possible(plan: Plan, rule: str, target: Target) -> None:
    """Raises MptTrtError when the rule cannot make the target."""
    CHECKS[rule](_Job(plan, target, plan.stored_config(target)))


def _convert_checkpoint(job: _Job) -> None:
    job.plan.storage_type(job.target)
    if job.config is not None:
        sharding.require_legal(job.config, job.target.tp)


def _convert_smoothquant_checkpoint(job: _Job) -> None:
    _convert_checkpoint(job)
    _require_calibration(job)


def _quantize(job: _Job) -> None:
    name = target_names.calibration_name(job.target.qformat)
    if job.config is not None and name.bits is not None:
        require_budget(job.config, name.bits)
    if job.config is not None and name.quantization_format in GROUPED:
        require_fitting_groups(job.config, 1, name.group_size or default_group_size(job.config))
    _require_calibration(job)


def _make_networks(job: _Job) -> None:
    _require_fitting_groups(job)
    if job.config is not None:
        name, variant = job.target.variant, job.plan.variant(job.target)
        key_checks.require_enough_bits(name, variant, job.config)
        key_checks.require_cache_fits(name, variant, job.config)


def _build_rank(job: _Job) -> None:
    plan, target = job.plan, job.target
    if target.rank >= target.tp:
        raise MptTrtError(
            f"rank{target.rank}.engine of {target.tp} rank(s): the last one is "
            f"rank{target.tp - 1}.engine"
        )
    key_checks.require_capable_gpus(target.variant, plan.variant(target), plan.builder(target))


def _smoke_test(job: _Job) -> None:
    _require_tokenizer(job)
    name, variant = job.target.variant, job.plan.variant(job.target)
    key_checks.require_smoke_test_fits(job.plan.settings, name, variant)


def _compute_reference(job: _Job) -> None:
    _require_tokenizer(job)
    quality = job.plan.settings.quality
    job.plan.require_text("quality.text", quality.text)
    if job.config is not None:
        length = quality.window_length
        key_checks.require_length_fits("quality.window_length", length, job.config)


def _convert_to_trtllm(job: _Job) -> None:
    if job.config is not None:
        variant = job.plan.variant(job.target)
        require_supported(variant.spec(job.config, job.target.tp), TENSORRT_LLM)
    _require_fitting_groups(job)


def _build_trtllm_engine(job: _Job) -> None:
    if job.config is not None:
        require_head_size(job.config.head_dim)
    if _is_made_here(job, "trt_engines/{model}/{variant}/{tp}-gpu"):
        require_tensorrt_llm()


def _run_trtllm(job: _Job) -> None:
    if _is_made_here(job, "build/smoke_tests/{model}/{variant}/{tp}-gpu.json"):
        require_tensorrt_llm()


def _measure_quality(job: _Job) -> None:
    _require_other_backend(job, "quality")
    quality = job.plan.settings.quality
    job.plan.engine_spec(job.target).limits.require_window(quality.window_length)
    if quality.tasks and _is_made_here(job, "quality/{model}/{variant}/{tp}-gpu.json"):
        try:
            require_lm_eval()
        except MptTrtError as error:
            raise MptTrtError(f"quality.tasks: {error}, or remove the key") from None


def _measure_facts(job: _Job) -> None:
    _require_other_backend(job, "build/proofs")


def _measure_throughput(job: _Job) -> None:
    _require_other_backend(job, "throughput")


# --- parts of several checks ---------------------------------------------------------------------


def _require_tokenizer(job: _Job) -> None:
    given = job.plan.settings.model(job.target.model).tokenizer
    folder = job.plan.working_directory / job.plan.tokenizer_folder(job.target)
    key_checks.require_tokenizer(job.target.model, given, folder)


def _require_calibration(job: _Job) -> None:
    """Requires what a model needs to read the calibration text."""
    calibration = job.plan.settings.calibration
    _require_tokenizer(job)
    if calibration.text is not None:
        job.plan.require_text("calibration.text", calibration.text)
    if job.config is not None:
        length = calibration.sequence_length
        key_checks.require_length_fits("calibration.sequence_length", length, job.config)


def _require_fitting_groups(job: _Job) -> None:
    if job.config is None:
        return
    match job.plan.variant(job.target).quantization:
        case WeightOnly(group_size=int(group_size)):
            require_fitting_groups(job.config, job.target.tp, group_size)
        case Awq() | Gptq() as scheme:
            require_fitting_groups(job.config, job.target.tp, group_size_of(scheme, job.config))


def _is_made_here(job: _Job, result: str) -> bool:
    """Returns whether the result is missing and a job in this environment makes it."""
    path = job.plan.working_directory / result.format(**vars(job.target))
    return not job.plan.deploys_software and not path.exists()


def _require_other_backend(job: _Job, result: str) -> None:
    if job.plan.variant(job.target).backend == TENSORRT_LLM:
        raise MptTrtError(
            f"{result} of {job.target.variant}: backend {TENSORRT_LLM} has only smoke tests; "
            "measure a variant with another backend"
        )


CHECKS: dict[str, Callable[[_Job], None]] = {
    "convert_checkpoint": _convert_checkpoint,
    "convert_smoothquant_checkpoint": _convert_smoothquant_checkpoint,
    "quantize": _quantize,
    "make_networks": _make_networks,
    "build_rank": _build_rank,
    "smoke_test": _smoke_test,
    "encode_prompt": _require_tokenizer,
    "compute_reference": _compute_reference,
    "convert_to_trtllm": _convert_to_trtllm,
    "build_trtllm_engine": _build_trtllm_engine,
    "run_trtllm": _run_trtllm,
    "measure_quality": _measure_quality,
    "measure_facts": _measure_facts,
    "measure_throughput": _measure_throughput,
}
"""The check of each rule."""
