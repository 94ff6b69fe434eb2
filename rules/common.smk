"""What all rules share: the plan of this run, and how rules take values from it."""

import dataclasses
import functools
import inspect
import sys
import typing

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(REPOSITORY))

from mpt_trt.errors import MptTrtError
from mpt_trt.system.process import prefer_this_python
from mpt_trt.workflow.config_sources import ConfigSources
from mpt_trt.workflow.job_options import JobOptions
from mpt_trt.workflow.job_resources import JobResources
from mpt_trt.workflow.launch import Launch
from mpt_trt.workflow.plan import Plan, Target
from mpt_trt.workflow.settings import parse_settings

TENSORRT_LLM_CONTAINER = "docker://nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


wildcard_constraints:
    model="[^/]+",
    variant="[^/]+",
    storage="[^/]+",
    qformat="[^/]+",
    tp="[1-9][0-9]*",
    rank="0|[1-9][0-9]*",


def checked(function, *arguments, **keywords):
    """Calls `function`; what it refuses becomes Snakemake's one-line error."""
    try:
        return function(*arguments, **keywords)
    except MptTrtError as error:
        raise WorkflowError(str(error)) from None


def of_job(function):
    """A function of a job's target, as rules take it: of the job's wildcards."""

    def value(wildcards, **keywords):
        return checked(function, Target.of(dict(wildcards.items())), **keywords)

    value.__signature__ = inspect.signature(function)
    return value


def require_possible(step):
    """An input function that adds no input, but refuses what the rule `step` cannot make."""

    def nothing(target):
        plan.require_possible(step, target)
        return []

    return of_job(nothing)


def resources_of(request_of):
    """The fields of the request that `request_of` makes for a job's target, as its resources."""
    latest = functools.lru_cache(maxsize=1)(request_of)

    def field(name):
        def value(target, **keywords):
            return getattr(latest(target, **keywords), name)

        return of_job(functools.wraps(request_of)(value))

    request = typing.get_type_hints(request_of)["return"]
    return {each.name: field(each.name) for each in dataclasses.fields(request)}


def tool(script):
    """Path and version of a script of workflow_scripts/, as parameters of the rule that runs it.

    Snakemake records parameters of built-in types only, so not the path, as a Path: the same script
    in another place repeats nothing.
    """
    return {"tool": plan.script(script), "code": plan.code_version(script)}


prefer_this_python()
given = workflow.config_settings
own_configfiles = workflow.configfiles[len(given.configfiles) :]
sources = ConfigSources.of_run([*own_configfiles, *given.configfiles], given.config)
settings = checked(parse_settings, config, sources)
deploys_software = bool(workflow.deployment_settings.deployment_method)
plan = Plan(settings, REPOSITORY, deploys_software=deploys_software)
options = JobOptions(plan)
jobs = JobResources(plan)
launch = Launch(jobs)
