"""Rules from engine directories to quality figures and a page that compares them.

quality/{model}/reference.safetensors       windows of held-out text, and the float32 reference on them
quality/{model}/{variant}/{tp}-gpu.json     perplexity, KL, top-1 agreement, size, speed
quality/{model}/llama_cpp.json              llama.cpp's quantizations, if its packages are installed
throughput/{model}/{variant}/{tp}-gpu.json  time to the first token, between tokens, tokens/s
reports/{model}.html                        the engines that `report` of the configuration names
reports/{model}/                            its table as CSV and its plots as SVG
"""


rule compute_reference:
    """Compute a model's float32 reference on windows of held-out text."""
    input:
        require_possible("compute_reference"),
        checkpoint=of_job(plan.checkpoint_inputs),
        text=of_job(plan.quality_text),
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
        **resources_of(jobs.compute_reference),
    params:
        **tool("steps/compute_reference.py"),
        options=of_job(options.reference),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model_dir {input.checkpoint[0]:q} \
            --text {input.text:q} \
            {params.options:q} \
            --output {output:q}
        """


rule measure_quality:
    """Measure an engine's quality on held-out text, its size and its speed."""
    input:
        require_possible("measure_quality"),
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        checkpoint=of_job(plan.checkpoint_inputs),
        reference="quality/{model}/reference.safetensors",
        tasks=of_job(plan.task_files),
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
    threads: measuring_threads
    resources:
        **resources_of(jobs.measure_quality),
        measuring=measuring_units,
    params:
        **tool("steps/measure_quality.py"),
        launch=of_job(launch.smoke_test),
        options=of_job(options.quality),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --model_dir {input.checkpoint[0]:q} \
            --reference {input.reference:q} \
            {params.options:q} \
            --total_threads {threads} \
            --output {output:q}
        """


rule measure_llama_cpp:
    """Measure llama.cpp's quantizations of a model; part of reports if its packages are installed."""
    input:
        require_possible("compute_reference"),
        checkpoint=of_job(plan.checkpoint_inputs),
        reference="quality/{model}/reference.safetensors",
    output:
        "quality/{model}/llama_cpp.json",
    log:
        "logs/measure_llama_cpp/{model}.log",
    benchmark:
        "logs/measure_llama_cpp/{model}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.measure_llama_cpp),
    params:
        **tool("steps/measure_llama_cpp.py"),
        options=of_job(options.llama_cpp),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model_dir {input.checkpoint[0]:q} \
            --reference {input.reference:q} \
            {params.options:q} \
            --output {output:q}
        """


rule measure_throughput:
    """Measure an engine's speed over batch sizes, prompt lengths and output lengths."""
    input:
        require_possible("measure_throughput"),
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
    output:
        "throughput/{model}/{variant}/{tp}-gpu.json",
    log:
        "logs/measure_throughput/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/measure_throughput/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    threads: measuring_threads
    resources:
        **resources_of(jobs.measure_throughput),
        measuring=1,
    params:
        **tool("benchmark_engine.py"),
        launch=of_job(launch.smoke_test),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --total_threads {threads} \
            --output {output:q}
        """


rule make_report:
    """Compare the engines of a model on a page, with a table and plots."""
    input:
        quality=of_job(plan.quality_of_report),
        smoke_tests=of_job(plan.smoke_tests_of_report),
        facts=of_job(proofs.facts_of_report),
        measured_facts=of_job(proofs.measurements_of_report),
        llama_cpp=of_job(plan.llama_cpp_of_report),
        throughput=of_job(plan.throughput_of_report),
        template=str(plan.shipped("mpt_trt/report/page.html.jinja")),
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
        frontier=report(
            "reports/{model}/frontier.svg",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "size against divergence"},
            caption="../report/frontier.rst",
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
        **tool("steps/make_report.py"),
        variants=of_job(plan.variants_of_report),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model {wildcards.model:q} \
            --variants {params.variants:q} \
            --quality {input.quality:q} \
            --smoke_tests {input.smoke_tests:q} \
            --facts {input.facts:q} \
            --measured_facts {input.measured_facts:q} \
            --llama_cpp {input.llama_cpp:q} \
            --throughput {input.throughput:q} \
            --template {input.template:q} \
            --output {output.page:q} \
            --items_dir "$(dirname {output.table:q})"
        """
