"""mpt-trt: from Hugging Face MPT checkpoints to verified TensorRT engines.

Name a file or folder to make it and whatever it needs, for example

    snakemake -c2 trt_engines/mpt-7b/fp16/1-gpu

Without a name, the `targets` of config.yaml are made.
"""

from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


include: "rules/common.smk"
include: "rules/cluster.smk"


if settings.site.container:

    container: settings.site.container


include: "rules/checkpoint.smk"
include: "rules/quantize.smk"
include: "rules/engine.smk"
include: "rules/trtllm.smk"
include: "rules/verify.smk"
include: "rules/report.smk"
include: "rules/preflight.smk"


# Snakemake looks at a function's parameters whenever it calls it: half a second of a large plan.
for function in filter(inspect.isfunction, list(globals().values())):
    readable(function)


rule all:
    default_target: True
    input:
        settings.targets,
