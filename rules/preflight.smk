"""Rule that shows this machine's equipment. It prints, and makes no file."""


# No benchmark, because with that file the rule would run only once.
rule preflight:
    """Show this machine's equipment, and the `targets` that it can build and run."""
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
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --needs {params.needs:q}
        """
