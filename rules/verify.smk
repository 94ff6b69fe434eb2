"""From an engine directory to the proof that it works.

inputs:
    trt_engines/{model}/{variant}/{tp}-gpu, and the checkpoint that it was made from
    Engines of variants with backend tensorrt_llm are tried by trtllm.smk.
outputs:
    smoke_tests/{model}/{variant}/{tp}-gpu.json     text, speed, runtime, distance to the reference
steps:
    smoke_test
"""


rule smoke_test:
    input:
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
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
        "logs/smoke_test/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/smoke_test/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=other_variants(TENSORRT_LLM_VARIANTS),
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        mem_mb=smoke_test_mem_mb,
        runtime=smoke_test_runtime,
        gpu=asking(ranks_request, "gpu"),
        gpu_model=asking(ranks_request, "gpu_model"),
        gres=asking(ranks_request, "gres"),
        nodes=nodes_of_ranks,
        tasks=tasks,
        tasks_per_node=tasks_per_node,
        tasks_per_gpu=tasks_per_gpu,
        mpi=mpi,
    params:
        code=version_of("steps/smoke_test.py"),
        preflight=preflight_for_ranks,
        slots=slots_of_ranks,
        launcher=launcher,
        folder=checkpoint_folder,
        tokenizer=tokenizer_option,
        tolerance=tolerance_options,
        prompt=settings.smoke_test.prompt,
        max_new_tokens=settings.smoke_test.max_new_tokens,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.preflight:q}
        {params.slots:q} {params.launcher:q} python workflow_scripts/steps/smoke_test.py \
            --engine_dir {input.engine:q} \
            --model_dir {params.folder:q} \
            {params.tokenizer:q} \
            {params.tolerance:q} \
            --prompt {params.prompt:q} \
            --max_new_tokens {params.max_new_tokens} \
            --output {output:q}
        """
