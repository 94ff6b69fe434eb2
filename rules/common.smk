"""Shared by all rules: the plan of this run, and functions that take values from it."""

from mpt_trt.system.process import prefer_this_python
from mpt_trt.workflow.config_sources import ConfigSources
from mpt_trt.workflow.job_options import JobOptions
from mpt_trt.workflow.job_resources import JobResources
from mpt_trt.workflow.launch import Launch
from mpt_trt.workflow.plan import Plan
from mpt_trt.workflow.proof_inputs import ProofInputs
from mpt_trt.workflow.rule_values import RuleValues
from mpt_trt.workflow.settings import parse_settings


wildcard_constraints:
    model="[^/]+",
    variant="[^/]+",
    storage="[^/]+",
    qformat="[^/]+",
    tp="[1-9][0-9]*",
    rank="0|[1-9][0-9]*",


prefer_this_python()
given = workflow.config_settings
own_configfiles = workflow.configfiles[len(given.configfiles) :]
sources = ConfigSources.of_run([*own_configfiles, *given.configfiles], given.config)
try:
    settings = parse_settings(config, sources)
except MptTrtError as error:
    last_words.refuse(str(error))
    raise WorkflowError(str(error)) from None

deploys_software = bool(workflow.deployment_settings.deployment_method)
plan = Plan(settings, REPOSITORY, deploys_software=deploys_software)
proofs = ProofInputs(plan)
options = JobOptions(plan)
jobs = JobResources(plan)
launch = Launch(jobs)

values = RuleValues(plan, WorkflowError, last_words)
of_job = values.of_job
require_possible = values.require_possible
resources_of = values.resources_of
tool = values.tool


# Snakemake chooses its executor after it has read the rules, so these functions are called for each job.
def is_on_this_machine():
    """Returns whether jobs run here, and this is not itself a job of a cluster."""
    return workflow.local_exec and workflow.is_main_process


def measuring_threads(wildcards):
    """All cores of this machine for a job that measures speed; 2 on a node of a cluster."""
    return (workflow.resource_settings.cores or 2) if is_on_this_machine() else 2


def measuring_units(wildcards):
    """Units of `measuring` that a job takes: this machine's only one, or 0 on a cluster."""
    return int(is_on_this_machine())


workflow.register_resource("measuring", 1)
