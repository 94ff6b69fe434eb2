"""Rules from an FT checkpoint, and a calibration result if needed, to an engine directory.

build/networks/{model}/{variant}/{tp}-gpu                       the networks of all ranks
build/plans/{model}/{variant}/{tp}-gpu/rank{rank}.engine        the TensorRT plan of a rank
trt_engines/{model}/{variant}/{tp}-gpu                          all of them, and config.json

trtllm.smk makes the engines of variants with backend tensorrt_llm.
"""


rule make_networks:
    """Write the networks of all ranks of an engine: ONNX graphs, and links to their weights."""
    input:
        require_possible("make_networks"),
        of_job(plan.calibration),
        ft_checkpoint=of_job(plan.ft_checkpoint),
    output:
        directory("build/networks/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/make_networks/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/make_networks/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        **resources_of(jobs.make_networks),
    params:
        **tool("steps/make_networks.py"),
        options=of_job(options.networks),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model_dir {input.ft_checkpoint:q} \
            {params.options:q} \
            --output_dir {output:q}
        """


# Its description, rank{rank}.engine.json, is not an output here, because Snakemake would plan large
# runs a tenth slower; assemble_engine rejects a plan without it.
rule build_rank:
    """Build the TensorRT plan of one rank from its network."""
    input:
        require_possible("build_rank"),
        networks="build/networks/{model}/{variant}/{tp}-gpu",
    output:
        "build/plans/{model}/{variant}/{tp}-gpu/rank{rank}.engine",
    log:
        "logs/build_rank/{model}/{variant}/{tp}-gpu/rank{rank}.log",
    benchmark:
        "logs/build_rank/{model}/{variant}/{tp}-gpu/rank{rank}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.build_rank),
    params:
        **tool("steps/build_rank.py"),
        builder=of_job(options.builder),
        launch=of_job(launch.build_rank),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} python {params.tool:q} \
            --network_dir {input.networks:q} \
            --rank {wildcards.rank} \
            {params.builder[options]:q} \
            --output_dir "$(dirname {output:q})"
        """


rule assemble_engine:
    """Assemble an engine directory from the networks and plans of all ranks."""
    input:
        networks="build/networks/{model}/{variant}/{tp}-gpu",
        plans=of_job(plan.plans_of_ranks),
    output:
        directory("trt_engines/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/assemble_engine/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/assemble_engine/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=plan.other_variants(),
    conda:
        "../envs/base.yaml"
    resources:
        **resources_of(jobs.assemble_engine),
    params:
        **tool("steps/assemble_engine.py"),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --network_dir {input.networks:q} \
            --plan_dir "$(dirname {input.plans[0]:q})" \
            --output_dir {output:q}
        """
