"""Inputs of proofs: facts about a model, and measurements of them on engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpt_trt.engines.spec import TENSORRT_LLM
from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.facts import (
    EngineKind,
    FactsFile,
    facts_of,
    read_all_facts,
    read_facts,
    shipped_facts,
)
from mpt_trt.workflow.plan import Plan, Target


@dataclass(frozen=True, eq=False)
class ProofInputs:
    """Inputs of jobs that measure facts, compare them, or report the comparison."""

    plan: Plan

    def facts(self, target: Target) -> list[str]:
        """Files of facts about the model: those that ship, unless an adapter changes it, and more.

        Raises MptTrtError when there is none.
        """
        model, paths = self.plan.settings.model(target.model), self._files_of_facts(target)
        if not paths:
            raise MptTrtError(
                f"proofs of {target.model}: mpt-trt has no published facts about {model.source}; "
                f"name a file of facts in models.{target.model}.facts (docs/proofs.md)"
            )
        return paths

    def _files_of_facts(self, target: Target) -> list[str]:
        model = self.plan.settings.model(target.model)
        shipped = [] if model.adapter else shipped_facts(model.source)
        for path in model.facts:
            self.plan.require_text(f"models.{target.model}.facts", path)
        return [*map(self._shipped_file, shipped), *map(self.plan.find, model.facts)]

    def named_files(self, target: Target) -> list[str]:
        """Existing texts and task files that the model's facts name, so that edits repeat checks.

        Raises MptTrtError for a folder of tasks around the working directory, whose files would
        include the workflow's own outputs.
        """
        found: dict[str, None] = {}
        for path in self.facts(target):
            for named in read_facts(self.plan.working_directory / path).named_paths:
                label = f"{path}: task_dir {named}"
                found |= dict.fromkeys(self.plan.inputs_in(named, label))
        return list(found)

    def _shipped_file(self, path: Path) -> str:
        return str(self.plan.shipped(f"mpt_trt/proofs/facts/{path.name}"))

    def measurements(self, target: Target) -> list[str]:
        """What each engine gave for the facts about engines of its kind."""
        return [_measurement(target, *engine) for engine in self.engines(target)]

    def engines(self, target: Target) -> list[tuple[str, int]]:
        """(variant, tp_size) of the engines that the model's facts are about.

        A kind of engine without a variant has none, and facts about it are not checked.
        """
        files = read_all_facts(self.plan.working_directory / path for path in self.facts(target))
        return list(dict.fromkeys(self._engines_of_facts(files)))

    def _engines_of_facts(self, files: list[FactsFile]) -> Iterator[tuple[str, int]]:
        chosen = self.plan.settings.proofs.tp_size
        for kind in (kind for fact in facts_of(files) for kind in fact.engines):
            if (variant := self._variant_of_kind(kind)) is not None:
                yield variant, kind.tp_size if chosen is None else chosen

    def _variant_of_kind(self, kind: EngineKind) -> str | None:
        settings = self.plan.settings
        names = settings.proofs.variants
        for name in settings.variants if names is None else names:
            variant = settings.variant(name)
            if variant.backend != TENSORRT_LLM and kind.is_of(variant.dtype, variant.quantized):
                return name
        return None

    def measurements_of_report(self, target: Target) -> list[str]:
        """Measurements of facts on the engines of a model's report."""
        if not self._files_of_facts(target):
            return []
        shown = set(self.plan.engines_of_report)
        proved = [engine for engine in self.engines(target) if engine in shown]
        return [_measurement(target, *engine) for engine in proved]

    def facts_of_report(self, target: Target) -> list[str]:
        """Files of facts that a model's report compares its engines with."""
        return self.facts(target) if self.measurements_of_report(target) else []


def _measurement(target: Target, variant: str, tp_size: int) -> str:
    return f"build/proofs/{target.model}/{variant}/{tp_size}-gpu.json"
