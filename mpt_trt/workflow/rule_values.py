"""Adapts functions of a plan to Snakemake's rules, as functions of a job's wildcards."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpt_trt.errors import MptTrtError
from mpt_trt.workflow.gpu_request import never_requested
from mpt_trt.workflow.job_checks import require_possible
from mpt_trt.workflow.last_words import LastWords
from mpt_trt.workflow.plan import Plan, Target


@dataclass(frozen=True)
class RuleValues:
    """Values for rules. error: Snakemake's exception for workflow errors. last_words: prints it."""

    plan: Plan
    error: type[Exception]
    last_words: LastWords

    def of_job(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Turns a function of a target into a function of a job's wildcards."""

        def value(wildcards: Any, **keywords: Any) -> Any:
            try:
                return function(Target.of(dict(wildcards.items())), **keywords)
            except MptTrtError as error:
                reason = str(error)
            except OSError as error:
                if error.filename is None:
                    raise
                reason = f"{error.filename}: {error.strerror}"
            self.last_words.refuse(reason)
            raise self.error(reason) from None

        # Snakemake passes further arguments, such as `threads`, by name. It reads the signature at
        # every call; this makes that quick.
        value.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        return value

    def require_possible(self, rule: str) -> Callable[..., Any]:
        """Makes an input function that only rejects targets that the rule cannot make."""

        def nothing(target: Target) -> list[str]:
            require_possible(self.plan, rule, target)
            return []

        return self.of_job(nothing)

    def resources_of(self, request_of: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Fields of the request that `request_of` makes for a job's target, by name.

        Fields that no job on this site has are left out, because Snakemake's evaluation of all
        resources is a third of the time that planning of new jobs takes.
        """
        # Snakemake requests the resources of a job one after the other.
        latest = functools.lru_cache(maxsize=1)(request_of)

        def field(name: str) -> Callable[..., Any]:
            @functools.wraps(request_of)
            def value(target: Target, **keywords: Any) -> Any:
                return getattr(latest(target, **keywords), name)

            return self.of_job(value)

        request = typing.get_type_hints(request_of)["return"]
        unused = never_requested(self.plan.settings.site)
        names = (each.name for each in dataclasses.fields(request))
        return {name: field(name) for name in names if name not in unused}

    def tool(self, script: str) -> dict[str, Any]:
        """Path and version of a script of workflow_scripts/, as parameters.

        Snakemake records only parameters of built-in types. The path is a Path, so a script in
        another place does not repeat jobs.
        """
        return {"tool": self.plan.script(script), "code": self.plan.code_version(script)}
