"""Options of each job's command, as lists of words, from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpt_trt.calibration.defaults import TEXT
from mpt_trt.quantization.schemes import as_mapping
from mpt_trt.system.files import content_hash
from mpt_trt.workflow import target_names
from mpt_trt.workflow.plan import Plan, Target

LIMITS = ("max_batch_size", "max_input_len", "max_output_len")


@dataclass(frozen=True, eq=False)
class JobOptions:
    """Public methods return values that a rule records; a changed value repeats the job.

    Rules have few of them, because Snakemake calls each for every job, even if it does not run.
    """

    plan: Plan

    # --- conversion and calibration ---------------------------------------------------------------

    def conversion(self, target: Target) -> list[str]:
        return [f"--storage_type={self.plan.storage_type(target)}", *self._model(target)]

    def quantize(self, target: Target) -> list[str]:
        """Options of quantize.py, which chooses a model's default group size itself."""
        name = target_names.calibration_name(target.qformat)
        size = [] if name.group_size is None else [f"--awq_block_size={name.group_size}"]
        qformat = f"--qformat={name.quantization_format}"
        size += [] if name.bits is None else [f"--bits={name.bits:g}"]
        scales = [] if name.scales == "amax" else [f"--scales={name.scales}"]
        return [qformat, *size, *scales, *self._model(target), *self._calibration(target)]

    def smoothquant(self, target: Target) -> list[str]:
        alpha = target_names.ft_storage(target.storage).alpha
        return [*self.conversion(target), f"--smoothquant={alpha}", *self._calibration(target)]

    def _calibration(self, target: Target) -> list[str]:
        calibration = self.plan.settings.calibration
        return [
            *(f"--calib_text={path}" for path in self.plan.calibration_text(target)),
            f"--calib_size={calibration.num_samples}",
            f"--calib_max_seq_length={calibration.sequence_length}",
            f"--device={calibration.device}",
        ]

    def shipped_text_version(self, target: Target) -> str | None:
        """Hash of the text that ships, if the job reads it, because it is not among the inputs."""
        is_read = self.plan.settings.calibration.text is None
        return content_hash(TEXT) if is_read else None

    # --- engines ----------------------------------------------------------------------------------

    def networks(self, target: Target) -> list[str]:
        return [
            *self.limits(target),
            *self._vocabulary(target),
            *self._quantization(target),
            *(f"--calibration={path}" for path in self.plan.calibration(target)),
        ]

    def trtllm_checkpoint(self, target: Target) -> list[str]:
        return [
            *self._vocabulary(target),
            *self._quantization(target),
            *(f"--calibration={path}" for path in self.plan.calibration_for_trtllm(target)),
        ]

    def builder(self, target: Target) -> dict[str, Any]:
        """Options, and the version of the package, so that an upgrade repeats builds."""
        package = self.plan.builder(target)
        capabilities = self.plan.variant(target).compute_capabilities
        options = [f"--backend={package.module}", "--compute_capabilities", *capabilities]
        return {"options": options, "version": package.version}

    def limits(self, target: Target) -> list[str]:
        variant = self.plan.variant(target)
        options = [f"--{name}={getattr(variant, name)}" for name in LIMITS]
        return options + ["--gather_all_token_logits"] * variant.gather_all_token_logits

    def _vocabulary(self, target: Target) -> list[str]:
        variant = self.plan.variant(target)
        return [
            _switch("shard_embedding", variant.shard_embedding),
            _switch("shard_head", variant.shard_head),
        ]

    def _quantization(self, target: Target) -> list[str]:
        variant = self.plan.variant(target)
        scheme = as_mapping(variant.quantization)
        options = [
            f"--quantization={scheme['method']}",
            f"--kv_cache_dtype={variant.kv_cache_dtype}",
        ]
        # int4_awq and int4_gptq have the groups of their calibration results.
        if scheme["method"] == "int4_weight_only" and scheme["group_size"] is not None:
            options.append(f"--group_size={scheme['group_size']}")
        if scheme["method"] == "mixed":
            options.append(f"--bits={scheme['bits']:g}")
        if scheme["method"] == "smoothquant":
            options.append(f"--alpha={scheme['alpha']}")
            options += [_switch(name, scheme[name]) for name in ("per_channel", "per_token")]
        return options + [f"--head={variant.head}"] * (variant.head != "auto")

    # --- measurements -----------------------------------------------------------------------------

    def prompt(self, _: Target) -> str:
        """The smoke test's prompt; Snakemake would fill in what stands in braces in a bare text."""
        return self.plan.settings.smoke_test.prompt

    def smoke_test(self, target: Target) -> list[str]:
        test = self.plan.settings.smoke_test
        return [
            *self.comparison(target),
            f"--prompt={test.prompt}",
            f"--max_new_tokens={test.max_new_tokens}",
        ]

    def comparison(self, target: Target) -> list[str]:
        tolerance = self.plan.variant(target).tolerance
        return [
            *self._model(target),
            f"--error_factor={tolerance.error_factor}",
            f"--min_top1={tolerance.min_top1}",
        ]

    def trtllm_comparison(self, target: Target) -> list[str]:
        """Options as above, and those that TensorRT-LLM's engine directory records differently."""
        dtype = self.plan.variant(target).dtype
        return [*self.comparison(target), f"--dtype={dtype}", *self._quantization(target)]

    def reference(self, target: Target) -> list[str]:
        quality = self.plan.settings.quality
        return [
            *self._model(target),
            f"--num_windows={quality.num_windows}",
            f"--window_length={quality.window_length}",
        ]

    def llama_cpp(self, target: Target) -> list[str]:
        return self._adapter(target)

    def quality(self, target: Target) -> list[str]:
        quality = self.plan.settings.quality
        return [
            *self._model(target),
            *[f"--text={self.plan.quality_text(target)}"] * quality.whole_text,
            *self._task_dir(),
            *(["--tasks", *quality.tasks] if quality.tasks else []),
        ]

    def _task_dir(self) -> list[str]:
        folder = self.plan.settings.quality.task_dir
        return [] if folder is None else [f"--task_dir={self.plan.find(folder)}"]

    def tokenizer(self, target: Target) -> list[str]:
        """Option for the tokenizer; [] for the model's own."""
        has_own = self.plan.settings.model(target.model).tokenizer is None
        return [] if has_own else [f"--tokenizer_dir={self.plan.tokenizer_folder(target)}"]

    def _model(self, target: Target) -> list[str]:
        """Options for the parts of a model outside its folder: tokenizer and adapter."""
        return [*self.tokenizer(target), *self._adapter(target)]

    def _adapter(self, target: Target) -> list[str]:
        folder = self.plan.adapter_folder(target)
        return [] if folder is None else [f"--adapter={folder}"]


def _switch(name: str, is_on: bool) -> str:
    return f"--{name}" if is_on else f"--no-{name}"
