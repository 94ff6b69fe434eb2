"""Rules of the backend TensorRT-LLM 0.20 to 1.2.1, in a separate environment or container.

trtllm_ckpts/{model}/{variant}/{tp}-gpu                     its checkpoint, of any variant
trt_engines/{model}/{variant}/{tp}-gpu                      of variants with backend tensorrt_llm only
build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz     tokens and logits of a generation (temporary)
build/smoke_tests/{model}/{variant}/{tp}-gpu.json           of variants with backend tensorrt_llm only

A missing or unsupported TensorRT-LLM is reported early. Without --sdm, jobs run in the active
environment, which `require_possible` checks before any job runs. With --sdm, Snakemake makes the
pinned environment, or fetches the pinned container, before the first job, and the step checks again.
"""

TENSORRT_LLM_CONTAINER = "docker://nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


rule convert_to_trtllm:
    """Convert an FT checkpoint to a TensorRT-LLM checkpoint of any variant."""
    input:
        require_possible("convert_to_trtllm"),
        of_job(plan.calibration_for_trtllm),
        ft_checkpoint=of_job(plan.ft_checkpoint_for_trtllm),
    output:
        directory("trtllm_ckpts/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/convert_to_trtllm/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/convert_to_trtllm/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    resources:
        **resources_of(jobs.convert_to_trtllm),
    params:
        **tool("steps/convert_ft_to_trtllm.py"),
        options=of_job(options.trtllm_checkpoint),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model_dir {input.ft_checkpoint:q} \
            {params.options:q} \
            --output_dir {output:q}
        """


rule build_trtllm_engine:
    """Build an engine directory with TensorRT-LLM's trtllm-build."""
    input:
        require_possible("build_trtllm_engine"),
        checkpoint="trtllm_ckpts/{model}/{variant}/{tp}-gpu",
    output:
        directory("trt_engines/{model}/{variant}/{tp}-gpu"),
    log:
        "logs/build_trtllm_engine/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/build_trtllm_engine/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=plan.variants_of_trtllm(),
    conda:
        "../envs/tensorrt_llm.yaml"
    container:
        TENSORRT_LLM_CONTAINER
    threads: 2
    resources:
        **resources_of(jobs.build_trtllm_engine),
    params:
        **tool("steps/build_trtllm.py"),
        options=of_job(options.limits),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --checkpoint_dir {input.checkpoint:q} \
            {params.options:q} \
            --workers {wildcards.tp} \
            --output_dir {output:q}
        """


rule encode_prompt:
    """Turn the smoke test's prompt into tokens, for TensorRT-LLM's environment."""
    input:
        require_possible("encode_prompt"),
        checkpoint=of_job(plan.checkpoint_inputs),
    output:
        temp("build/trtllm_prompts/{model}.json"),
    log:
        "logs/encode_prompt/{model}.log",
    benchmark:
        "logs/encode_prompt/{model}.tsv"
    conda:
        "../envs/base.yaml"
    params:
        **tool("steps/encode_prompt.py"),
        options=of_job(options.tokenizer),
        prompt=of_job(options.prompt),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.options:q} \
            --prompt {params.prompt:q} \
            --output {output:q}
        """


rule run_trtllm:
    """Continue the smoke test's prompt with TensorRT-LLM's runtime."""
    input:
        require_possible("run_trtllm"),
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        prompt="build/trtllm_prompts/{model}.json",
    output:
        temp("build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz"),
    log:
        "logs/run_trtllm/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/run_trtllm/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=plan.variants_of_trtllm(),
    conda:
        "../envs/tensorrt_llm.yaml"
    container:
        TENSORRT_LLM_CONTAINER
    threads: 2
    resources:
        **resources_of(jobs.run_trtllm),
    params:
        **tool("steps/run_trtllm.py"),
        launch=of_job(launch.run_trtllm),
        max_new_tokens=settings.smoke_test.max_new_tokens,
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --prompt {input.prompt:q} \
            --max_output_len {params.max_new_tokens} \
            --output {output:q}
        """


rule compare_trtllm:
    """Smoke test of a TensorRT-LLM engine: compare its generation with the float32 reference."""
    input:
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        generation="build/trtllm_generations/{model}/{variant}/{tp}-gpu.npz",
        checkpoint=of_job(plan.checkpoint_inputs),
    output:
        report(
            "build/smoke_tests/{model}/{variant}/{tp}-gpu.json",
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
        variant=plan.variants_of_trtllm(),
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.compare_trtllm),
    params:
        **tool("steps/compare_trtllm.py"),
        options=of_job(options.trtllm_comparison),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --generation {input.generation:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.options:q} \
            --report_only \
            --output {output:q}
        """
