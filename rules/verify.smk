"""From an engine directory to the result of its smoke test.

smoke_tests/{model}/{variant}/{tp}-gpu.json     text, speed, runtime, distance to the reference

Engines of variants with backend tensorrt_llm are tested by trtllm.smk.
"""


rule smoke_test:
    """Run an engine on a prompt and compare its logits with the float32 reference."""
    input:
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        checkpoint=of_job(plan.checkpoint_inputs),
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
        variant=plan.other_variants(),
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.smoke_test),
    params:
        **tool("steps/smoke_test.py"),
        preflight=unrecorded(launch.preflight_of_ranks),
        gpus=unrecorded(launch.gpus_of_ranks),
        launcher=unrecorded(launch.ranks),
        tokenizer=of_job(plan.tokenizer_option),
        tolerance=of_job(plan.tolerance_options),
        prompt=settings.smoke_test.prompt,
        max_new_tokens=settings.smoke_test.max_new_tokens,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.preflight:q}
        {params.gpus:q} {params.launcher:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.tokenizer:q} \
            {params.tolerance:q} \
            --prompt {params.prompt:q} \
            --max_new_tokens {params.max_new_tokens} \
            --output {output:q}
        """
