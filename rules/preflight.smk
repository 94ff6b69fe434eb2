"""What this machine has. It prints, and makes no file."""


# No benchmark: with that file, the rule would be done once and for all.
rule preflight:
    """Show what this machine has, and which `targets` of config.yaml it can build and run."""
    log:
        "logs/preflight.log",
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        tool=tool("preflight.py")["tool"],
        needs=of_job(launch.needs_of_targets),
    shell:
        r"""
        exec > >(tee {log:q} | sed --unbuffered "/^error/d") 2>&1
        python {params.tool:q} \
            --needs {params.needs:q}
        """
