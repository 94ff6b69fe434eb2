"""Rule from an engine directory to the result of its smoke test.

smoke_tests/{model}/{variant}/{tp}-gpu.json     text, speed, runtime, distance to the reference

trtllm.smk tests the engines of variants with backend tensorrt_llm.
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
        launch=of_job(launch.smoke_test),
        options=of_job(options.smoke_test),
    shell:
        r"""
        exec > >(tee {log:q} | sed --unbuffered "/^error/d") 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.options:q} \
            --output {output:q}
        """
