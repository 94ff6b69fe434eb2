"""From an FT checkpoint, and a calibration result where one is needed, to an engine directory.

inputs:
    ft_ckpts/{model}/{storage}/{tp}-gpu
    quantized/{model}/{qformat}/mpt_tp1_rank0.npz           of variants that need calibration
    Engines of variants with backend tensorrt_llm are made by trtllm.smk.
outputs:
    build/networks/{model}/{variant}/{tp}-gpu               the networks of all ranks
    build/plans/{model}/{variant}/{tp}-gpu                  the TensorRT plans of all ranks
    trt_engines/{model}/{variant}/{tp}-gpu                  both together, and config.json
steps:
    make_networks -> build_plans -> assemble_engine
"""


rule make_networks:
    input:
        intact("build/networks/{model}/{variant}/{tp}-gpu"),
        fitting_groups,
        calibration_of_variant,
        ft_checkpoint=ft_checkpoint_of_variant,
    output:
        directory("build/networks/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/make_networks/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/make_networks/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        mem_mb=network_mem_mb,
        runtime=network_runtime,
    params:
        code=version_of("steps/make_networks.py"),
        limits=limit_options,
        vocabulary=vocabulary_options,
        quantization=quantization_options,
        calibration=calibration_option,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/make_networks.py \
            --model_dir {input.ft_checkpoint:q} \
            {params.limits:q} \
            {params.vocabulary:q} \
            {params.quantization:q} \
            {params.calibration:q} \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """


rule build_plans:
    input:
        intact("build/plans/{model}/{variant}/{tp}-gpu"),
        networks="build/networks/{model}/{variant}/{tp}-gpu",
    output:
        directory("build/plans/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/build_plans/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/build_plans/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    threads: build_threads
    resources:
        mem_mb=build_mem_mb,
        runtime=build_runtime,
        gpu=asking(build_request, "gpu"),
        gpu_model=asking(build_request, "gpu_model"),
        gres=asking(build_request, "gres"),
        nodes=1,
    params:
        code=version_of("steps/build_plans.py", "steps/build_rank.py"),
        backend=backend,
        backend_version=backend_version,
        preflight=preflight_for_build,
        slots=build_slots,
        at_once=plans_at_once,
        compute_capabilities=compute_capabilities,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.preflight:q}
        {params.slots:q} python workflow_scripts/steps/build_plans.py \
            --network_dir {input.networks:q} \
            --at_once {params.at_once} \
            --backend {params.backend} \
            --compute_capabilities {params.compute_capabilities} \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """


rule assemble_engine:
    input:
        intact("trt_engines/{model}/{variant}/{tp}-gpu"),
        networks="build/networks/{model}/{variant}/{tp}-gpu",
        plans="build/plans/{model}/{variant}/{tp}-gpu",
    output:
        directory("trt_engines/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/assemble_engine/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/assemble_engine/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=other_variants(TENSORRT_LLM_VARIANTS),
    conda:
        "../envs/base.yaml"
    resources:
        mem_mb=linking_mem_mb,
        runtime=collect_runtime,
    params:
        code=version_of("steps/assemble_engine.py"),
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/assemble_engine.py \
            --network_dir {input.networks:q} \
            --plan_dir {input.plans:q} \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """
