"""What this machine has, and which of the targets of config.yaml can be built and run here.

inputs, outputs:
    none; it prints
steps:
    preflight
"""


# No benchmark: with that file, the rule would be done once and for all.
rule preflight:
    log:
        "logs/preflight.log",
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        needs=needs_of_targets,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/preflight.py \
            --needs {params.needs:q}
        """
