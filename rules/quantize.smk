"""From a model's checkpoint to calibration results, for engines of any number of ranks.

quantized/{model}/{qformat}/mpt_tp1_rank0.npz    qformat is int4_awq, int4_awq-g64 and the like, fp8,
                                                 int8_sq or kv_cache
"""


rule quantize:
    """Calibrate a model: run it on the calibration text and keep what its activations need."""
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
        gpus=unrecorded(launch.calibration_gpus),
        tokenizer=of_job(plan.tokenizer_option),
        qformat=of_job(plan.calibration_format_options),
        text=of_job(plan.calibration_text_option),
        text_version=of_job(plan.calibration_text_version),
        num_samples=settings.calibration.num_samples,
        sequence_length=settings.calibration.sequence_length,
        device=settings.calibration.device,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.gpus:q} python {params.tool:q} \
            --model_dir {input.checkpoint[0]:q} \
            {params.tokenizer:q} \
            {params.qformat:q} \
            {params.text:q} \
            --calib_size {params.num_samples} \
            --calib_max_seq_length {params.sequence_length} \
            --device {params.device} \
            --export_path "$(dirname {output:q})"
        """
