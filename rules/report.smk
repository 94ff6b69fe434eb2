"""From engine directories to figures of their quality, and a page that shows them side by side.

inputs:
    trt_engines/{model}/{variant}/{tp}-gpu, the checkpoint that it was made from, its smoke test
    quality.text of config.yaml: held-out text
outputs:
    quality/{model}/reference.safetensors       windows of the text, and the float32 reference on them
    quality/{model}/{variant}/{tp}-gpu.json     perplexity, KL, top-1 agreement, size, speed
    reports/{model}.html                        the engines that `report` of config.yaml names
    reports/{model}/                            its table as CSV and its plots as SVG
steps:
    compute_reference -> measure_quality (a job an engine) -> make_report
"""


rule compute_reference:
    input:
        checkpoint=checkpoint_inputs,
        text=settings.quality.text,
    output:
        "quality/{model}/reference.safetensors",
    log:
        "logs/compute_reference/{model}.log",
    benchmark:
        "logs/compute_reference/{model}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        mem_mb=reference_mem_mb,
        runtime=reference_runtime,
    params:
        code=version_of("steps/compute_reference.py"),
        folder=checkpoint_folder,
        tokenizer=tokenizer_option,
        num_windows=settings.quality.num_windows,
        window_length=settings.quality.window_length,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/compute_reference.py \
            --model_dir {params.folder:q} \
            {params.tokenizer:q} \
            --text {input.text:q} \
            --num_windows {params.num_windows} \
            --window_length {params.window_length} \
            --output {output:q}
        """


rule measure_quality:
    input:
        measurable_variant,
        fitting_window,
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        checkpoint=checkpoint_inputs,
        reference="quality/{model}/reference.safetensors",
    output:
        report(
            "quality/{model}/{variant}/{tp}-gpu.json",
            category="Engines of {model}",
            subcategory="Figures of one engine",
            labels={"variant": "{variant}", "ranks": "{tp}", "what": "quality"},
            caption="../report/quality.rst",
        ),
    log:
        "logs/measure_quality/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/measure_quality/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        mem_mb=quality_mem_mb,
        runtime=quality_runtime,
        gpu=asking(ranks_request, "gpu"),
        gpu_model=asking(ranks_request, "gpu_model"),
        gres=asking(ranks_request, "gres"),
        nodes=nodes_of_ranks,
        tasks=tasks,
        tasks_per_node=tasks_per_node,
        tasks_per_gpu=tasks_per_gpu,
        mpi=mpi,
    params:
        code=version_of("steps/measure_quality.py"),
        preflight=preflight_for_ranks,
        slots=slots_of_ranks,
        launcher=launcher,
        folder=checkpoint_folder,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.preflight:q}
        {params.slots:q} {params.launcher:q} python workflow_scripts/steps/measure_quality.py \
            --engine_dir {input.engine:q} \
            --model_dir {params.folder:q} \
            --reference {input.reference:q} \
            --output {output:q}
        """


rule make_report:
    input:
        quality=results_of_report("quality"),
        smoke_tests=results_of_report("smoke_tests"),
        template="mpt_trt/report/page.html.jinja",
    output:
        page=report(
            "reports/{model}.html",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "page"},
            caption="../report/page.rst",
        ),
        table=report(
            "reports/{model}/table.csv",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "table"},
            caption="../report/table.rst",
        ),
        size=report(
            "reports/{model}/size.svg",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "size against quality"},
            caption="../report/size.rst",
        ),
        divergence=report(
            "reports/{model}/divergence.svg",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "distance from the reference"},
            caption="../report/divergence.rst",
        ),
        speed=report(
            "reports/{model}/speed.svg",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "speed"},
            caption="../report/speed.rst",
        ),
    log:
        "logs/make_report/{model}.log",
    benchmark:
        "logs/make_report/{model}.tsv"
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        code=version_of("steps/make_report.py"),
        variants=variants_of_report,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        python workflow_scripts/steps/make_report.py \
            --model {wildcards.model:q} \
            --variants {params.variants:q} \
            --quality {input.quality:q} \
            --smoke_tests {input.smoke_tests:q} \
            --template {input.template:q} \
            --output {output.page:q} \
            --items_dir reports/{wildcards.model:q}
        """
