"""Rule from an engine directory to the result of its smoke test.

build/smoke_tests/{model}/{variant}/{tp}-gpu.json   text, speed, runtime, distance to the reference
smoke_tests/{model}/{variant}/{tp}-gpu.json         the same file, of an engine that passed

Reports read the former, so that they also show engines that failed. trtllm.smk tests the engines of
variants with backend tensorrt_llm.
"""


rule smoke_test:
    """Run an engine on a prompt and compare its logits with the float32 reference."""
    input:
        require_possible("smoke_test"),
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
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
        "logs/smoke_test/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/smoke_test/{model}/{variant}/{tp}-gpu.tsv"
    wildcard_constraints:
        variant=plan.other_variants(),
    conda:
        "../envs/base.yaml"
    threads: measuring_threads
    resources:
        **resources_of(jobs.smoke_test),
        measuring=measuring_units,
    params:
        **tool("steps/smoke_test.py"),
        launch=of_job(launch.smoke_test),
        options=of_job(options.smoke_test),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.options:q} \
            --total_threads {threads} \
            --report_only \
            --output {output:q}
        """


rule check_smoke_test:
    """Print the figures of a smoke test; fail if the engine is too far from the reference."""
    input:
        "build/smoke_tests/{model}/{variant}/{tp}-gpu.json",
    output:
        "smoke_tests/{model}/{variant}/{tp}-gpu.json",
    log:
        "logs/check_smoke_test/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/check_smoke_test/{model}/{variant}/{tp}-gpu.tsv"
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        **tool("steps/check_smoke_test.py"),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --measured {input:q} \
            --variant {wildcards.variant:q} \
            --output {output:q}
        """
