"""From a model's source to FT checkpoints.

inputs:
    models.{model}.source of config.yaml: a hub id, or a folder in Hugging Face format
    calibration.text of config.yaml: what a model reads before it is smoothed
outputs:
    revisions/{model}/revision.json                  the commit that the revision meant, once and for all
    checkpoints/{model}                              a hub model's files (links into the hub's cache)
    ft_ckpts/{model}/{storage}/{tp}-gpu              the FT checkpoint; storage is fp32, fp16, bf16, or
                                                     sq, sq-0.8, sq-bf16 and the like (SmoothQuant)
steps:
    resolve_revision -> fetch_checkpoint (hub models only) -> convert_checkpoint or convert_smoothquant_checkpoint
"""


# Not made anew when the code changes: the commit, once recorded, stays.
rule resolve_revision:
    output:
        directory("revisions/{model}"),
    log:
        "logs/resolve_revision/{model}.log",
    benchmark:
        "logs/resolve_revision/{model}.tsv"
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        source=hub_source,
        revision=hub_revision,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/fetch_checkpoint.py resolve \
            --source {params.source:q} \
            --revision {params.revision:q} \
            --output {output:q}/revision.json
        """


rule fetch_checkpoint:
    input:
        intact("checkpoints/{model}"),
        revision="revisions/{model}",
    output:
        directory("checkpoints/{model}"),
    log:
        "logs/fetch_checkpoint/{model}.log",
    benchmark:
        "logs/fetch_checkpoint/{model}.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        mem_mb=linking_mem_mb,
        runtime=fetch_runtime,
    params:
        code=version_of("steps/fetch_checkpoint.py"),
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/fetch_checkpoint.py fetch \
            --revision_file {input.revision:q}/revision.json \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """


rule convert_checkpoint:
    input:
        intact("ft_ckpts/{model}/{storage}/{tp}-gpu"),
        legal_tp,
        checkpoint=checkpoint_inputs,
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
        mem_mb=conversion_mem_mb,
        runtime=conversion_runtime,
    params:
        code=version_of("convert_hf_mpt_to_ft.py"),
        folder=checkpoint_folder,
        storage_type=storage_type,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/convert_hf_mpt_to_ft.py \
            --in_file {params.folder:q} \
            --out_dir ft_ckpts/{wildcards.model:q}/{wildcards.storage:q} \
            --tensor_parallelism {wildcards.tp} \
            --storage_type {params.storage_type} \
            --processes {threads}
        python workflow_scripts/steps/seal.py {output:q}
        """


# The same conversion, after the model has read the calibration text.
rule convert_smoothquant_checkpoint:
    input:
        intact("ft_ckpts/{model}/{storage}/{tp}-gpu"),
        legal_tp,
        checkpoint=checkpoint_inputs,
        text=settings.calibration.text,
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
        mem_mb=calibration_mem_mb,
    params:
        code=version_of("convert_hf_mpt_to_ft.py"),
        folder=checkpoint_folder,
        storage_type=storage_type,
        alpha=smoothing_alpha,
        tokenizer=tokenizer_option,
        num_samples=settings.calibration.num_samples,
        sequence_length=settings.calibration.sequence_length,
        device=settings.calibration.device,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/convert_hf_mpt_to_ft.py \
            --in_file {params.folder:q} \
            --out_dir ft_ckpts/{wildcards.model:q}/{wildcards.storage:q} \
            --tensor_parallelism {wildcards.tp} \
            --storage_type {params.storage_type} \
            --processes {threads} \
            --smoothquant {params.alpha} \
            --calib_text {input.text:q} \
            --calib_size {params.num_samples} \
            --calib_max_seq_length {params.sequence_length} \
            --device {params.device} \
            {params.tokenizer:q}
        python workflow_scripts/steps/seal.py {output:q}
        """
