"""Rules from a model's source to FT checkpoints.

revisions/{model}/revision.json     the commit of the revision when it was first resolved
checkpoints/{model}                 a hub model's files (links into the hub's cache)
ft_ckpts/{model}/{storage}/{tp}-gpu the FT checkpoint; storage is fp32, fp16, bf16 or, for
                                    SmoothQuant, sq, sq-0.8, sq-bf16 and the like
"""


# The version of the code is not a parameter, so that a recorded commit stays.
rule resolve_revision:
    """Record the commit of a hub model's revision; that commit is used from then on."""
    output:
        "revisions/{model}/revision.json",
    log:
        "logs/resolve_revision/{model}.log",
    benchmark:
        "logs/resolve_revision/{model}.tsv"
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        tool=tool("steps/fetch_checkpoint.py")["tool"],
        source=of_job(plan.source),
        revision=of_job(plan.revision),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} resolve \
            --source {params.source:q} \
            --revision {params.revision:q} \
            --output {output:q}
        """


rule fetch_checkpoint:
    """Download the files of a hub model's recorded commit."""
    input:
        revision="revisions/{model}/revision.json",
    output:
        directory("checkpoints/{model}"),
    log:
        "logs/fetch_checkpoint/{model}.log",
    benchmark:
        "logs/fetch_checkpoint/{model}.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        **resources_of(jobs.fetch_checkpoint),
    params:
        **tool("steps/fetch_checkpoint.py"),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} fetch \
            --revision_file {input.revision:q} \
            --output_dir {output:q}
        """


rule convert_checkpoint:
    """Convert a model to an FT checkpoint (fp32, fp16 or bf16) for `tp` ranks."""
    input:
        require_possible("convert_checkpoint"),
        checkpoint=of_job(plan.checkpoint_inputs),
    output:
        directory("ft_ckpts/{model}/{storage}/{tp}-gpu"),
    log:
        "logs/convert_checkpoint/{model}/{storage}/{tp}-gpu.log",
    benchmark:
        "logs/convert_checkpoint/{model}/{storage}/{tp}-gpu.tsv"
    wildcard_constraints:
        storage="(?!sq)[^/]+",
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.convert_checkpoint),
    params:
        **tool("convert_hf_mpt_to_ft.py"),
        options=of_job(options.conversion),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --in_file {input.checkpoint[0]:q} \
            --out_dir "$(dirname {output:q})" \
            --tensor_parallelism {wildcards.tp} \
            {params.options:q} \
            --processes {threads}
        """


rule convert_smoothquant_checkpoint:
    """Convert a model to a SmoothQuant FT checkpoint (sq, sq-0.8, sq-bf16, ...) for `tp` ranks."""
    input:
        require_possible("convert_smoothquant_checkpoint"),
        checkpoint=of_job(plan.checkpoint_inputs),
        text=of_job(plan.calibration_text),
    output:
        directory("ft_ckpts/{model}/{storage}/{tp}-gpu"),
    log:
        "logs/convert_smoothquant_checkpoint/{model}/{storage}/{tp}-gpu.log",
    benchmark:
        "logs/convert_smoothquant_checkpoint/{model}/{storage}/{tp}-gpu.tsv"
    wildcard_constraints:
        storage="sq[^/]*",
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.convert_smoothquant_checkpoint),
    params:
        **tool("convert_hf_mpt_to_ft.py"),
        options=of_job(options.smoothquant),
        text_version=of_job(options.shipped_text_version),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --in_file {input.checkpoint[0]:q} \
            --out_dir "$(dirname {output:q})" \
            --tensor_parallelism {wildcards.tp} \
            {params.options:q} \
            --processes {threads}
        """
