"""The second backend: TensorRT-LLM 0.20 to 1.2.1, in an environment or container of its own.

inputs:
    ft_ckpts/{model}/{storage}/{tp}-gpu
    quantized/{model}/{qformat}/mpt_tp1_rank0.npz         of variants that need calibration
outputs:
    trtllm_ckpts/{model}/{variant}/{tp}-gpu               its checkpoint, of any variant
    build/tensorrt_llm/version.json                       which TensorRT-LLM was found (temporary)
    trt_engines/{model}/{variant}/{tp}-gpu                of variants with backend tensorrt_llm alone
    build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz    tokens and logits of a generation (temporary)
    smoke_tests/{model}/{variant}/{tp}-gpu.json           of variants with backend tensorrt_llm alone
steps:
    convert_to_trtllm; check_trtllm -> build_trtllm_engine
    encode_prompt -> run_trtllm -> compare_trtllm
"""


rule convert_to_trtllm:
    input:
        intact("trtllm_ckpts/{model}/{variant}/{tp}-gpu"),
        what_trtllm_can,
        fitting_groups,
        calibration_for_trtllm,
        ft_checkpoint=ft_checkpoint_for_trtllm,
    output:
        directory("trtllm_ckpts/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/convert_to_trtllm/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/convert_to_trtllm/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        mem_mb=network_mem_mb,
    params:
        code=version_of("steps/convert_ft_to_trtllm.py"),
        vocabulary=vocabulary_options,
        quantization=quantization_options,
        calibration=calibration_option_for_trtllm,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/convert_ft_to_trtllm.py \
            --model_dir {input.ft_checkpoint:q} \
            {params.vocabulary:q} \
            {params.quantization:q} \
            {params.calibration:q} \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """


# First of all jobs, alone, and on no GPU: a missing or unfit TensorRT-LLM shall cost nobody's time.
rule check_trtllm:
    output:
        temp("build/tensorrt_llm/version.json"),
    log:
        "logs/check_trtllm.log",
    benchmark:
        "logs/check_trtllm.tsv"
    priority: 100
    localrule: True
    conda:
        "../envs/tensorrt_llm.yaml"
    container:
        TENSORRT_LLM_CONTAINER
    threads: ALL_CORES
    params:
        code=version_of("steps/check_trtllm.py"),
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/check_trtllm.py \
            --output {output:q}
        """


rule build_trtllm_engine:
    input:
        intact("trt_engines/{model}/{variant}/{tp}-gpu"),
        "build/tensorrt_llm/version.json",
        checkpoint="trtllm_ckpts/{model}/{variant}/{tp}-gpu",
    output:
        directory("trt_engines/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/build_trtllm_engine/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/build_trtllm_engine/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=only_variants(TENSORRT_LLM_VARIANTS),
    conda:
        "../envs/tensorrt_llm.yaml"
    container:
        TENSORRT_LLM_CONTAINER
    threads: 2
    resources:
        mem_mb=build_mem_mb,
        gpu=gpu_of_every_rank,
    params:
        code=version_of("steps/build_trtllm.py"),
        limits=limit_options,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/build_trtllm.py \
            --checkpoint_dir {input.checkpoint:q} \
            {params.limits:q} \
            --workers {wildcards.tp} \
            --output_dir {output:q}
        python workflow_scripts/steps/seal.py {output:q}
        """


rule encode_prompt:
    input:
        checkpoint=checkpoint_inputs,
    output:
        temp("build/trtllm_prompts/{model}.json"),
    log:
        "logs/encode_prompt/{model}.log",
    benchmark:
        "logs/encode_prompt/{model}.tsv"
    conda:
        "../envs/base.yaml"
    params:
        code=version_of("steps/encode_prompt.py"),
        folder=tokenizer_folder,
        prompt=settings.smoke_test.prompt,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/encode_prompt.py \
            --tokenizer_dir {params.folder:q} \
            --prompt {params.prompt:q} \
            --output {output:q}
        """


rule run_trtllm:
    input:
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        prompt="build/trtllm_prompts/{model}.json",
    output:
        temp("build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz"),
    log:
        "logs/run_trtllm/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/run_trtllm/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=only_variants(TENSORRT_LLM_VARIANTS),
    conda:
        "../envs/tensorrt_llm.yaml"
    container:
        TENSORRT_LLM_CONTAINER
    threads: 2
    resources:
        mem_mb=smoke_test_mem_mb,
        gpu=gpu_of_every_rank,
        mpi=mpi,
        nodes=nodes_of_ranks,
        tasks=tasks,
        tasks_per_node=tasks_per_node,
        tasks_per_gpu=tasks_per_gpu,
    params:
        code=version_of("steps/run_trtllm.py"),
        launcher=launcher,
        max_new_tokens=settings.smoke_test.max_new_tokens,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.launcher:q} python workflow_scripts/steps/run_trtllm.py \
            --engine_dir {input.engine:q} \
            --prompt {input.prompt:q} \
            --max_output_len {params.max_new_tokens} \
            --output {output:q}
        """


rule compare_trtllm:
    input:
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        generation="build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz",
        checkpoint=checkpoint_inputs,
    output:
        report(
            "smoke_tests/{model}/{variant}/{tp}-gpu.json",
            category="Engines of {model}",
            subcategory="Figures of one engine",
            labels={"variant": "{variant}", "ranks": "{tp}", "what": "smoke test"},
            caption="../report/smoke_test.rst",
        ),
    log:
        "logs/compare_trtllm/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/compare_trtllm/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=only_variants(TENSORRT_LLM_VARIANTS),
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        mem_mb=smoke_test_mem_mb,
    params:
        code=version_of("steps/compare_trtllm.py"),
        folder=checkpoint_folder,
        tokenizer=tokenizer_option,
        tolerance=tolerance_options,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/compare_trtllm.py \
            --engine_dir {input.engine:q} \
            --generation {input.generation:q} \
            --model_dir {params.folder:q} \
            {params.tokenizer:q} \
            {params.tolerance:q} \
            --output {output:q}
        """
