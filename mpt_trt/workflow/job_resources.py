"""Resources that the job of each rule requests from this machine or a cluster's scheduler.

`site` of the configuration describes the GPUs (docs/clusters.md). Results of jobs do not depend on
this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpt_trt.engines import memory
from mpt_trt.model import sharding
from mpt_trt.model.config import MptConfig
from mpt_trt.quantization.schemes import QuantizationFormat
from mpt_trt.workflow import gpu_request, resources, target_names
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import Site

# Tokens per row that benchmark_engine.py computes by default: 6 rounds of 128 + 64.
THROUGHPUT_TOKENS = 6 * 192
# Passes over the text by measure_llama_cpp.py: one per type, and quantization.
LLAMA_CPP_PASSES = 12

# Fewer bytes per token than texts have.
BYTES_PER_TOKEN = 2
# Tokens that the tasks and texts of a model's facts may have; wikitext has 300,000.
PROOF_TOKENS = 1 << 19


@dataclass(frozen=True)
class HostRequest:
    """Snakemake's resources for a job on one node. mem_mb: 10^6 bytes. runtime: minutes."""

    mem_mb: int
    runtime: int


@dataclass(frozen=True)
class GpuJobRequest(HostRequest):
    """Resources of a job on one node that may use GPUs; see GpuRequest. None: not requested."""

    gpu: int | None = None
    gpu_model: str | None = None
    gres: str | None = None
    nodes: int = 1


@dataclass(frozen=True)
class RanksRequest(GpuJobRequest):
    """Resources of a job with one process per rank, on one or several nodes. mem_mb: per node.

    tasks: all processes. tasks_per_node, tasks_per_gpu: SLURM's options. mpi: command that starts
    them.
    """

    tasks: int | None = None
    tasks_per_node: int | None = None
    tasks_per_gpu: int | None = None
    mpi: str | None = None


@dataclass(frozen=True, eq=False)
class JobResources:
    """Public methods have the names of rules, and return the request of that rule's job.

    They raise MptTrtError when this machine or cluster lacks a resource.
    """

    plan: Plan

    @property
    def _site(self) -> Site:
        return self.plan.settings.site

    def _megabytes(self, size: int) -> int:
        """Converts the needs of a command in bytes to its job's `mem_mb`."""
        return -(-size // 10**6) + self._site.job_overhead_mb

    # --- checkpoints and calibration --------------------------------------------------------------

    def fetch_checkpoint(self, target: Target) -> HostRequest:
        runtime = resources.fetch_minutes(self.plan.planned_config(target))
        return HostRequest(self._megabytes(resources.linking_memory()), runtime)

    def convert_checkpoint(self, target: Target, threads: int) -> HostRequest:
        config = self.plan.planned_config(target)
        runtime = self._conversion_minutes(config, self.plan.storage_type(target), target)
        return HostRequest(self._megabytes(resources.conversion_memory(threads)), runtime)

    def _conversion_minutes(self, config: MptConfig, dtype: str, target: Target) -> int:
        tp_size = target.tp if sharding.is_legal(config, target.tp) else 1
        return resources.conversion_minutes(config, dtype, tp_size)

    def convert_smoothquant_checkpoint(self, target: Target) -> HostRequest:
        """Resources of calibration, without a GPU, and conversion."""
        config, settings = self.plan.planned_config(target), self.plan.settings
        calibration = resources.forward_minutes(config, settings.calibration.num_tokens)
        conversion = self._conversion_minutes(config, self.plan.storage_type(target), target)
        megabytes = self._megabytes(self._calibration_memory(target, "int8_sq"))
        return HostRequest(megabytes, calibration + conversion)

    def quantize(self, target: Target) -> GpuJobRequest:
        """Resources of calibration on one GPU, which replaces the CPU's memory."""
        config, calibration = self.plan.planned_config(target), self.plan.settings.calibration
        count = self.calibration_gpus
        form = target_names.calibration_name(target.qformat).quantization_format
        memory = self._calibration_memory(target, form)
        return GpuJobRequest(
            self._megabytes(memory),
            resources.calibration_minutes(config, form, calibration.num_tokens, bool(count)),
            **self._gpus(count, memory),
        )

    @property
    def calibration_gpus(self) -> int:
        device = self.plan.settings.calibration.device
        return int(device == "cuda" or (device == "auto" and self.plan.has_gpus))

    def _calibration_memory(self, target: Target, quantization_format: QuantizationFormat) -> int:
        config, calibration = self.plan.planned_config(target), self.plan.settings.calibration
        return resources.calibration_memory(
            config, quantization_format, calibration.num_samples, calibration.sequence_length
        )

    # --- engines ----------------------------------------------------------------------------------

    def make_networks(self, target: Target) -> HostRequest:
        spec = self.plan.engine_spec(target)
        megabytes = self._megabytes(resources.network_memory(spec))
        return HostRequest(megabytes, resources.network_minutes(spec))

    def build_rank(self, target: Target) -> GpuJobRequest:
        spec = self.plan.engine_spec(target)
        return GpuJobRequest(
            self._megabytes(resources.build_memory(spec)),
            resources.build_minutes(spec),
            **self._gpus(self.build_gpus(target), memory.gpu_memory(spec)),
        )

    def build_gpus(self, target: Target) -> int:
        """Number of GPUs of a build: 1 for `tensorrt`, which builds on it, 0 for `tensorrt_rtx`."""
        return int(self.plan.builder(target).module == "tensorrt")

    def assemble_engine(self, target: Target) -> HostRequest:
        runtime = resources.collect_minutes(self.plan.engine_spec(target))
        return HostRequest(self._megabytes(resources.linking_memory()), runtime)

    # --- TensorRT-LLM -----------------------------------------------------------------------------

    def convert_to_trtllm(self, target: Target) -> HostRequest:
        spec = self.plan.engine_spec(target)
        runtime = self._conversion_minutes(spec.config, spec.dtype, target)
        return HostRequest(self._megabytes(resources.network_memory(spec)), runtime)

    def build_trtllm_engine(self, target: Target) -> GpuJobRequest:
        """Resources with one GPU per rank, because trtllm-build builds all at the same time."""
        spec = self.plan.engine_spec(target)
        needed = self._megabytes(target.tp * resources.build_memory(spec))
        return GpuJobRequest(needed, resources.build_minutes(spec), gpu=target.tp)

    def run_trtllm(self, target: Target) -> RanksRequest:
        mem_mb, runtime = self._memory_and_time_of_smoke_test(target)
        ranks = self._ranks(target)
        return RanksRequest(mem_mb=mem_mb, runtime=runtime, gpu=target.tp, **ranks)

    def compare_trtllm(self, target: Target) -> HostRequest:
        return HostRequest(*self._memory_and_time_of_smoke_test(target))

    # --- measurements -----------------------------------------------------------------------------

    def smoke_test(self, target: Target) -> RanksRequest:
        mem_mb, runtime = self._memory_and_time_of_smoke_test(target)
        gpus_and_ranks = self._gpus_of_ranks(target) | self._ranks(target)
        return RanksRequest(mem_mb=mem_mb, runtime=runtime, **gpus_and_ranks)

    def _memory_and_time_of_smoke_test(self, target: Target) -> tuple[int, int]:
        spec, test = self.plan.engine_spec(target), self.plan.settings.smoke_test
        nodes = self.num_nodes(target) if spec.tp_size == target.tp else 1
        # A token of the prompt has at least one character, except for rare bytes.
        steps = len(test.prompt) + test.max_new_tokens
        return (
            self._megabytes(resources.smoke_test_memory(spec, nodes)),
            resources.smoke_test_minutes(spec, steps),
        )

    def compute_reference(self, target: Target) -> HostRequest:
        config, quality = self.plan.planned_config(target), self.plan.settings.quality
        needed = resources.reference_memory(config, quality.num_windows, quality.window_length)
        runtime = resources.forward_minutes(config, quality.num_tokens)
        return HostRequest(self._megabytes(needed), runtime)

    def measure_llama_cpp(self, target: Target) -> HostRequest:
        """The reference's resources; llama.cpp reads the text once per type."""
        reference = self.compute_reference(target)
        return HostRequest(reference.mem_mb, LLAMA_CPP_PASSES * reference.runtime)

    def measure_quality(self, target: Target) -> RanksRequest:
        spec, quality = self.plan.engine_spec(target), self.plan.settings.quality
        needed = resources.quality_memory(spec, quality.num_windows, quality.window_length)
        return RanksRequest(
            self._megabytes(needed),
            resources.quality_minutes(spec, quality.num_tokens + self._whole_text_tokens(target)),
            **self._ranks(target),
            **self._gpus_of_ranks(target),
        )

    def _whole_text_tokens(self, target: Target) -> int:
        return self.plan.size_of_whole_text(target) // BYTES_PER_TOKEN

    def measure_facts(self, target: Target) -> RanksRequest:
        """Resources for facts about prompts; tasks and texts may need more time."""
        spec = self.plan.engine_spec(target)
        return RanksRequest(
            self._megabytes(resources.quality_memory(spec, 0, 0)),
            resources.quality_minutes(spec, PROOF_TOKENS),
            **self._ranks(target),
            **self._gpus_of_ranks(target),
        )

    def measure_throughput(self, target: Target) -> RanksRequest:
        spec = self.plan.engine_spec(target)
        return RanksRequest(
            self._megabytes(resources.quality_memory(spec, 0, 0)),
            resources.quality_minutes(spec, THROUGHPUT_TOKENS * (1 + spec.limits.max_batch_size)),
            **self._ranks(target),
            **self._gpus_of_ranks(target),
        )

    # --- GPUs and nodes ---------------------------------------------------------------------------

    def _gpus(self, count: int, needed: int) -> dict[str, Any]:
        """Fields of GpuRequest for `count` GPUs with at least `needed` bytes each."""
        gpu_request.require_gpus(self._site, count)
        return vars(gpu_request.gpu_request(self._site, count, needed))

    def _gpus_of_ranks(self, target: Target) -> dict[str, Any]:
        needed = memory.gpu_memory(self.plan.engine_spec(target))
        return self._gpus(target.tp if self.plan.has_gpus else 0, needed)

    def num_nodes(self, target: Target) -> int:
        return gpu_request.num_nodes(self._site, target.tp)

    def _ranks(self, target: Target) -> dict[str, Any]:
        """Division of the ranks among nodes, and their launcher; a single rank needs no MPI.

        `tasks_per_node` must be more than one; with one rank per node, `tasks` is their number.
        `tasks_per_gpu` 0 keeps SLURM's plugin from using `tasks` as the tasks of one GPU.
        """
        ranks, nodes = target.tp, self.num_nodes(target)
        return {
            "nodes": nodes,
            "tasks": ranks if 1 < ranks == nodes else None,
            "tasks_per_node": ranks // nodes if ranks > nodes else None,
            "tasks_per_gpu": None if ranks == 1 else 0,
            "mpi": None if ranks == 1 else self._site.mpi,
        }
