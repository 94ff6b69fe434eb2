"""Commands before a job's own: preflight, GPU assignment, and one process per rank."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from mpt_trt.engines import memory
from mpt_trt.engines.spec import TENSORRT_LLM
from mpt_trt.errors import MptTrtError
from mpt_trt.model import sharding
from mpt_trt.workflow import resources
from mpt_trt.workflow.job_resources import JobResources
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.preflight import Needs

ENGINE_TARGET = re.compile(
    r"(?:(?:build/)?(?:trt_engines|smoke_tests|quality|proofs|throughput|plans|networks|trtllm_ckpts))/(?P<model>[^/]+)/(?P<variant>[^/]+)/(?P<tp>[1-9]\d*)-gpu"
    r"(?:\.json|/rank\d+\.engine)?"
)
MAX_TARGETS = 200
"""A command line has room for about twice this number."""


@dataclass(frozen=True)
class Launcher:
    """Commands before a job's own, as lists of words, empty for none.

    preflight: shows the machine's equipment before its first GPU job. gpus: assigns GPUs. ranks:
    starts one process per rank.

    Snakemake records only parameters of built-in types, so it does not record these. Results do not
    depend on where a job runs, so another site does not repeat jobs.
    """

    preflight: list[str]
    gpus: list[str]
    ranks: list[str]


@dataclass(frozen=True, eq=False)
class Launch:
    """Launchers of jobs; public methods have the names of rules."""

    jobs: JobResources

    @property
    def _plan(self) -> Plan:
        return self.jobs.plan

    def quantize(self, target: Target) -> Launcher:
        return Launcher([], self._with_gpus(self.jobs.calibration_gpus), [])

    def build_rank(self, target: Target) -> Launcher:
        count = self.jobs.build_gpus(target)
        return Launcher(self._preflight(target), self._with_gpus(count), []) if count else NOTHING

    def smoke_test(self, target: Target) -> Launcher:
        if not self._plan.has_gpus:
            return Launcher([], self._with_gpus(0), self._ranks(target))
        on_this_node = target.tp // self.jobs.num_nodes(target)
        gpus = self._with_gpus(on_this_node)
        return Launcher(self._preflight(target), gpus, self._ranks(target))

    def run_trtllm(self, target: Target) -> Launcher:
        return Launcher([], [], self._ranks(target))

    def _with_gpus(self, count: int) -> list[str]:
        """Assigns `count` GPUs to a command, or hides all GPUs from it."""
        script = self._plan.script("steps/with_gpus.py")
        return ["python", str(script), f"--gpus={count}", "--"]

    def _ranks(self, target: Target) -> list[str]:
        if target.tp == 1:
            return []
        return [*shlex.split(self._plan.settings.site.mpi), "-n", str(target.tp)]

    def _preflight(self, target: Target) -> list[str]:
        engine = f"trt_engines/{target.model}/{target.variant}/{target.tp}-gpu"
        needs = json.dumps([asdict(self._needs(engine, target))])
        script = self._plan.script("preflight.py")
        return ["python", str(script), "--once=logs/preflight", f"--needs={needs}"]

    def needs_of_targets(self, _: Target) -> str:
        """Needs of the engines among the configuration's targets, as JSON."""
        return json.dumps([asdict(needs) for needs in islice(self._all_needs(), MAX_TARGETS)])

    def _all_needs(self) -> Iterator[Needs]:
        for name in self._plan.settings.targets:
            if match := ENGINE_TARGET.fullmatch(name):
                yield self._needs(name, Target.of(match.groupdict()))

    def needs(self, name: str) -> Needs:
        """Needs of an engine, by the name of a target of it.

        Raises MptTrtError for other names, and when the model cannot have that number of ranks.
        """
        if match := ENGINE_TARGET.fullmatch(name.rstrip("/")):
            target = Target.of(match.groupdict())
            if (config := self._plan.expected_config(target)) is not None:
                sharding.require_legal(config, target.tp)
            return self._needs(name, target)
        raise MptTrtError(
            f"{name}: not a target of one engine, such as trt_engines/mpt-7b/fp16/1-gpu"
        )

    def _needs(self, name: str, target: Target) -> Needs:
        variant, spec = self._plan.variant(target), self._plan.engine_spec(target)
        # TensorRT-LLM builds all ranks at the same time.
        builds = target.tp if variant.backend == TENSORRT_LLM else 1
        return Needs(
            target=name,
            builder=variant.builder,
            ranks=target.tp,
            gpu_memory=memory.gpu_memory(spec),
            build_memory=builds * resources.build_memory(spec),
            run_memory=resources.smoke_test_memory(spec),
            disk=resources.ft_checkpoint_disk(spec) + resources.engine_disk(spec),
            is_calibrated=bool(self._plan.calibration(target)),
        )


NOTHING = Launcher([], [], [])
