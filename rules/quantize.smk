"""Rule from a model's checkpoint to calibration results, for any tensor-parallel size.

quantized/{model}/{qformat}/mpt_tp1_rank0.npz    qformat is int4_awq, int4_gptq, int4_awq-g64, fp8,
                                                 int8_sq or kv_cache
"""


rule quantize:
    """Calibrate a model: run it on the calibration text and store scales of its activations."""
    input:
        require_possible("quantize"),
        checkpoint=of_job(plan.checkpoint_inputs),
        text=of_job(plan.calibration_text),
    output:
        "quantized/{model}/{qformat}/mpt_tp1_rank0.npz",
    log:
        "logs/quantize/{model}/{qformat}.log",
    benchmark:
        "logs/quantize/{model}/{qformat}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        **resources_of(jobs.quantize),
    params:
        **tool("quantize.py"),
        launch=of_job(launch.quantize),
        options=of_job(options.quantize),
        text_version=of_job(options.shipped_text_version),
    shell:
        r"""
        exec > >(tee {log:q} | grep --line-buffered --invert-match ^error) 2>&1
        {params.launch.gpus:q} python {params.tool:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.options:q} \
            --export_path "$(dirname {output:q})"
        """
