"""Rules from engine directories to a comparison with published facts about the model.

build/proofs/{model}/{variant}/{tp}-gpu.json    what an engine gave for the facts about its kind
proofs/{model}.json                             every fact: passed, failed or not checked
"""


rule measure_facts:
    """Measure on an engine what published facts about its model say."""
    input:
        require_possible("measure_facts"),
        engine="trt_engines/{model}/{variant}/{tp}-gpu",
        facts=of_job(proofs.facts),
        named=of_job(proofs.named_files),
    output:
        "build/proofs/{model}/{variant}/{tp}-gpu.json",
    log:
        "logs/measure_facts/{model}/{variant}/{tp}-gpu.log",
    benchmark:
        "logs/measure_facts/{model}/{variant}/{tp}-gpu.tsv"
    conda:
        "../envs/base.yaml"
    threads: measuring_threads
    resources:
        **resources_of(jobs.measure_facts),
    params:
        **tool("steps/measure_facts.py"),
        launch=of_job(launch.smoke_test),
        options=of_job(options.tokenizer),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.preflight:q}
        {params.launch.gpus:q} {params.launch.ranks:q} python {params.tool:q} \
            --engine_dir {input.engine:q} \
            --facts {input.facts:q} \
            {params.options:q} \
            --total_threads {threads} \
            --report_only \
            --output {output:q}
        """


rule check_facts:
    """Compare a model's engines with published facts about the model; fail if one differs."""
    input:
        facts=of_job(proofs.facts),
        measured=of_job(proofs.measurements),
    output:
        report(
            "proofs/{model}.json",
            category="Engines of {model}",
            subcategory="Side by side",
            labels={"what": "comparison with published facts"},
            caption="../report/proof.rst",
        ),
    log:
        "logs/check_facts/{model}.log",
    benchmark:
        "logs/check_facts/{model}.tsv"
    localrule: True
    conda:
        "../envs/base.yaml"
    params:
        **tool("steps/check_facts.py"),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        python {params.tool:q} \
            --model {wildcards.model:q} \
            --facts {input.facts:q} \
            --measured {input.measured:q} \
            --output {output:q}
        """
