"""mpt-trt: builds verified TensorRT engines from Hugging Face MPT checkpoints.

Name a file or folder to make it and every missing input, for example

    snakemake -c2 trt_engines/mpt-7b/fp16/1-gpu

`snakemake --list` explains the rules. Without a name, Snakemake makes the `targets` of config.yaml. The
configuration is config.yaml of the working directory or, if there is none, the one next to this file.
"""

from pathlib import Path

from snakemake.utils import min_version

min_version("9.0")

REPOSITORY = Path(workflow.current_basedir)
CONFIG = Path("config.yaml") if Path("config.yaml").exists() else REPOSITORY / "config.yaml"


include: "rules/start.smk"


configfile: CONFIG


report: "report/workflow.rst"


include: "rules/common.smk"


if settings.site.container:

    container: settings.site.container


include: "rules/checkpoint.smk"
include: "rules/quantize.smk"
include: "rules/engine.smk"
include: "rules/trtllm.smk"
include: "rules/verify.smk"
include: "rules/proof.smk"
include: "rules/report.smk"
include: "rules/preflight.smk"


rule all:
    """Make the `targets` of config.yaml."""
    default_target: True
    input:
        settings.targets,
