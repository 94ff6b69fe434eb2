"""The quantization commands of NVIDIA's MPT example, in its own spelling, on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpt_trt.engines.manifest import read_manifest
from mpt_trt.errors import MptTrtError
from mpt_trt.quantization.schemes import Awq, Fp8, Quantization, SmoothQuant, WeightOnly
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import call_tool

SPEC = CheckpointSpec(hidden_size=32, num_heads=2, num_layers=1, vocab_size=131)
PLUGINS = ("--use_gpt_attention_plugin", "--use_gemm_plugin")
LIMITS = ("--max_batch_size=2", "--max_input_len=16", "--max_output_len=8")
CALIBRATION = ("--calib_size=2", "--calib_max_seq_length=16")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and calibration results as the example's commands make them."""
    folder = tmp_path_factory.mktemp("commands")
    model = write_checkpoint(folder / "model", SPEC)
    text = folder / "text.txt"
    text.write_text("what the model reads; it is short. " * 20)
    convert = "convert_hf_mpt_to_ft.py"
    call_tool(convert, "-i", model, "-o", folder / "ft" / "fp16", "-t", "float16")
    smooth = ("-sq", "0.5", f"--calib_text={text}", *CALIBRATION)
    call_tool(convert, "-i", model, "-o", folder / "ft" / "sq", *smooth)
    for qformat in ("int4_awq", "fp8"):
        call_tool(
            "quantize.py",
            f"--model_dir={folder / 'ft/fp16/1-gpu'}",
            f"--qformat={qformat}",
            "--dtype=float16",
            f"--calib_text={text}",
            *CALIBRATION,
            f"--tokenizer_dir={model}",
            f"--export_path={folder / qformat}",
        )
    return folder


def build(made: Path, target: Path, *arguments: object) -> Quantization:
    """Builds an engine; returns the quantization that its directory records."""
    filled = [str(argument).replace("MADE", str(made)) for argument in arguments]
    capable = "--compute_capabilities=8.9"
    call_tool("build.py", *filled, *PLUGINS, *LIMITS, capable, f"--output_dir={target}")
    return read_manifest(target).spec.quantization


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model_dir=MADE/ft/fp16/1-gpu", "--use_weight_only"], Quantization(WeightOnly(8))),
        (
            ["--model_dir=MADE/ft/fp16/1-gpu", "--use_weight_only", "--weight_only_precision=int4"],
            Quantization(WeightOnly(4)),
        ),
        (
            [
                "--model_dir=MADE/ft/fp16/1-gpu",
                *("--use_weight_only", "--weight_only_precision=int4"),
                *("--use_weight_only", "--weight_only_precision=int4_awq"),
                "--per_group",
                "--quant_ckpt_path=MADE/int4_awq/mpt_tp1_rank0.npz",
            ],
            Quantization(Awq()),
        ),
        (
            [
                "--model_dir=MADE/ft/sq/1-gpu",
                *("--remove_input_padding", "--enable_context_fmha"),
                *("--use_smooth_quant", "--per_channel", "--per_token"),
            ],
            Quantization(SmoothQuant()),
        ),
        (
            ["--model_dir=MADE/ft/sq/1-gpu", "--use_smooth_quant"],
            Quantization(SmoothQuant(per_channel=False, per_token=False)),
        ),
        (
            [
                "--model_dir=MADE/ft/fp16",
                "--quantized_fp8_model_path=MADE/fp8/mpt_tp1_rank0.npz",
                *("--remove_input_padding", "--enable_fp8", "--fp8_kv_cache"),
            ],
            Quantization(Fp8(), "fp8"),
        ),
        (
            [
                "--model_dir=MADE/ft/fp16/1-gpu",
                "--int8_kv_cache",
                "--quant_ckpt_path=MADE/fp8/mpt_tp1_rank0.npz",
            ],
            Quantization(None, "int8"),
        ),
        (
            [
                "--model_dir=MADE/ft/fp16/1-gpu",
                *("--use_weight_only", "--weight_only_precision=int4", "--per_group"),
                "--group_size=16",
            ],
            Quantization(WeightOnly(4, 16)),
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value),
)
def test_commands_of_the_example(made, arguments, expected, tmp_path):
    assert build(made, tmp_path / "engine", *arguments) == expected


FP16, INT = "--model_dir=MADE/ft/fp16/1-gpu", "--use_weight_only"
INT4 = [INT, "--weight_only_precision=int4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([FP16, "--use_weight_only", "--enable_fp8"], "exclude each other; choose one"),
        ([FP16, "--per_token"], "--per_token belongs to --use_smooth_quant"),
        ([FP16, "--weight_only_precision=int4"], "--weight_only_precision belongs to --use_weight"),
        ([FP16, "--enable_fp8", "--per_group"], "--per_group belongs to --use_weight_only; add"),
        ([FP16, "--group_size=64"], "--group_size belongs to --use_weight_only; add that"),
        ([FP16, INT, "--per_group"], "--per_group belongs to --weight_only_precision int4; add"),
        ([FP16, INT, "--bits=5.5"], "--bits belongs to --weight_only_precision mixed; add"),
        ([FP16, *INT4, "--bits=0"], "--bits belongs to .* mixed; add that, or leave --bits out"),
        ([FP16, *INT4, "--group_size=64"], "--group_size belongs to .* int4 --per_group; add"),
        (
            [FP16, INT, "--weight_only_precision=int4_awq", "--per_group", "--group_size=64"],
            "--group_size belongs to --weight_only_precision int4 --per_group; add",
        ),
        (
            [FP16, "--enable_fp8", "--quant_ckpt_path=MADE/int4_awq"],
            "int4_awq: a folder; name the file mpt_tp1_rank0.npz in it$",
        ),
        (
            [FP16, "--quant_ckpt_path=MADE/int4_awq/mpt_tp1_rank0.npz"],
            "quantization none does not use; .* --weight_only_precision int4_awq",
        ),
        ([FP16, "--enable_fp8"], "fp8 needs a calibration result: .* --qformat fp8"),
        ([FP16, "--int8_kv_cache"], "a KV cache of int8 needs a calibration result"),
        (
            [FP16, "--enable_fp8", "--quant_ckpt_path=MADE/int4_awq/mpt_tp1_rank0.npz"],
            "a calibration result of int4_awq, but fp8 needs one of fp8",
        ),
        ([FP16, "--use_smooth_quant"], "smoothquant = None, but 0.5 is needed"),
        (["--model_dir=MADE/ft/sq/1-gpu"], "not a full-precision checkpoint"),
        ([FP16, "--enable_fp8", "--quant_ckpt_path=MADE/none.npz"], "no such file"),
    ],
    ids=lambda value: "" if isinstance(value, list) else value,
)
def test_what_does_not_belong_together(made, arguments, message, tmp_path):
    with pytest.raises(MptTrtError, match=message):
        build(made, tmp_path / "engine", *arguments)
    assert not (tmp_path / "engine").exists()


def test_both_caches_are_refused(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        build(made, tmp_path / "engine", FP16, "--int8_kv_cache", "--fp8_kv_cache")
    assert "not allowed with argument" in capsys.readouterr().err
