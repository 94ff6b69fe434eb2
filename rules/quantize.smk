"""From a model's checkpoint to calibration results.

inputs:
    the checkpoint in Hugging Face format, and calibration.text of config.yaml
outputs:
    quantized/{model}/{qformat}/mpt_tp1_rank0.npz    for engines of any number of ranks; qformat is
                                                     int4_awq, int4_awq-g64 and the like, fp8,
                                                     int8_sq or kv_cache
steps:
    quantize
"""


rule quantize:
    input:
        checkpoint=checkpoint_inputs,
        text=settings.calibration.text,
    output:
        f"quantized/{{model}}/{{qformat}}/{NPZ_NAME}",
    log:
        "logs/quantize/{model}/{qformat}.log",
    benchmark:
        "logs/quantize/{model}/{qformat}.tsv"
    conda:
        "../envs/base.yaml"
    threads: 2
    resources:
        mem_mb=calibration_mem_mb,
        runtime=calibration_runtime,
        gpu=asking(calibration_request, "gpu"),
        gpu_model=asking(calibration_request, "gpu_model"),
        gres=asking(calibration_request, "gres"),
    params:
        code=version_of("quantize.py"),
        slots=calibration_slots,
        folder=checkpoint_folder,
        tokenizer=tokenizer_option,
        qformat=calibration_options,
        num_samples=settings.calibration.num_samples,
        sequence_length=settings.calibration.sequence_length,
        device=settings.calibration.device,
    shell:
        r"""
        exec > >(tee {log:q}) 2>&1
        {params.slots:q} python workflow_scripts/quantize.py \
            --model_dir {params.folder:q} \
            {params.tokenizer:q} \
            {params.qformat:q} \
            --calib_text {input.text:q} \
            --calib_size {params.num_samples} \
            --calib_max_seq_length {params.sequence_length} \
            --device {params.device} \
            --export_path quantized/{wildcards.model:q}/{wildcards.qformat:q}
        """
