"""Use of TensorRT-LLM, which is not installed here: command lines, versions, rules.

A stand-in on the path records how `trtllm-build` is called; what TensorRT-LLM makes of the call is
not known here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mpt_trt.engines.spec import BuildLimits
from mpt_trt.engines.trtllm import package
from mpt_trt.engines.trtllm.build_command import build_command
from mpt_trt.engines.trtllm.buildable import require_buildable
from mpt_trt.engines.trtllm.generation_run import record_trtllm_generation
from mpt_trt.engines.trtllm.recorded_generation import read_trtllm_generation
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.reference import reference_logits
from mpt_trt.system.files import read_json
from mpt_trt.workflow.settings import parse_settings
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import call_tool, one_line_error, run_tool
from support.workflow import REPOSITORY, SPEC, Workflow

# The flags of trtllm-build, 0.20 to 1.2.1, that we use, and what they may be.
SWITCH = {"enable", "disable"}
TYPES = {"auto", "float16", "float32", "bfloat16", "disable"}
KNOWN_FLAGS: dict[str, set[str] | type] = {
    "checkpoint_dir": str,
    "output_dir": str,
    "max_batch_size": int,
    "max_input_len": int,
    "max_seq_len": int,
    "max_beam_width": int,
    "max_num_tokens": int,
    "gpt_attention_plugin": TYPES | {"int32"},
    "gemm_plugin": TYPES | {"int32", "fp8", "nvfp4"},
    "context_fmha": SWITCH,
    "remove_input_padding": SWITCH,
    "kv_cache_type": {"paged", "continuous", "disabled"},
    "workers": int,
}
LIMITS = BuildLimits(max_batch_size=8, max_input_len=512, max_output_len=64)


def described(
    folder: Path,
    dtype: str = "float16",
    algorithm: str | None = None,
    cache: str | None = None,
    head_size: int = 64,
) -> Path:
    """A checkpoint of which there is only what the command line depends on."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {"quant_algo": algorithm, "kv_cache_quant_algo": cache}
    content = {"dtype": dtype, "head_size": head_size, "quantization": quantization}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def parsed(command: list[str]) -> dict[str, str]:
    return dict(option.removeprefix("--").split("=", 1) for option in command if "=" in option)


def test_the_whole_command_line(tmp_path):
    checkpoint = described(tmp_path / "ckpt")
    assert build_command("trtllm-build", checkpoint, LIMITS, 4, Path("engine")) == [
        "trtllm-build",
        f"--checkpoint_dir={checkpoint}",
        "--output_dir=engine",
        "--max_batch_size=8",
        "--max_input_len=512",
        "--max_seq_len=576",
        "--max_beam_width=1",
        "--max_num_tokens=4096",
        "--gpt_attention_plugin=float16",
        "--gemm_plugin=float16",
        "--context_fmha=enable",
        "--remove_input_padding=enable",
        "--kv_cache_type=paged",
        "--workers=4",
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "algorithm", [None, "W8A16", "W4A16", "W4A16_AWQ", "FP8", "W8A8_SQ_PER_CHANNEL"]
)
def test_every_flag_is_known_and_has_a_legal_value(algorithm, dtype, tmp_path):
    checkpoint = described(tmp_path, dtype, algorithm)
    options = parsed(build_command("trtllm-build", checkpoint, LIMITS, 1, Path("engine")))
    assert options.keys() == KNOWN_FLAGS.keys()
    for name, value in options.items():
        legal = KNOWN_FLAGS[name]
        assert int(value) >= 1 if legal is int else legal is str or value in legal, name
    assert options["gemm_plugin"] == ("disable" if algorithm == "FP8" else dtype)
    assert options["context_fmha"] == ("disable" if dtype == "float32" else "enable")
    assert options["gpt_attention_plugin"] == dtype


@pytest.mark.parametrize(
    ("algorithm", "cache", "expected"),
    [
        (None, None, None),
        ("W8A16", None, None),
        ("FP8", None, None),
        ("FP8", "FP8", None),
        ("FP8", "INT8", "disable"),
        (None, "FP8", "disable"),
        ("W4A16_AWQ", "FP8", "disable"),
        (None, "INT8", "disable"),
    ],
)
def test_paged_context_attention_is_off_for_caches_that_it_cannot_read(
    algorithm, cache, expected, tmp_path
):
    checkpoint = described(tmp_path, "float16", algorithm, cache)
    options = parsed(build_command("trtllm-build", checkpoint, LIMITS, 1, Path("engine")))
    assert options.get("use_paged_context_fmha") == expected


@pytest.mark.parametrize("capability", ["10.0", "10.3", "11.0"])
@pytest.mark.parametrize(
    ("algorithm", "cache"),
    [
        ("W8A16", None),
        ("W4A16", None),
        ("W4A16_AWQ", None),
        ("W8A8_SQ_PER_CHANNEL", None),
        ("W8A8_SQ_PER_TENSOR_PLUGIN", None),
        (None, "INT8"),
        ("FP8", "INT8"),
    ],
)
def test_integers_are_rejected_for_gpus_without_their_kernels(
    algorithm, cache, capability, tmp_path
):
    config = json.loads(
        (described(tmp_path, "float16", algorithm, cache) / "config.json").read_text()
    )
    with pytest.raises(MptTrtError, match=rf"quant_algo = .* {capability}"):
        require_buildable(config, ["9.0", capability])
    require_buildable(config, ["8.0", "9.0", "12.0"])
    require_buildable(config | {"quantization": {"quant_algo": "FP8"}}, [capability])
    require_buildable(config | {"quantization": {"quant_algo": None}}, [capability])


def test_head_sizes_without_kernels_are_rejected(tmp_path):
    """PhoGPT-4B's 128 is built; 40 is not, though a multiple of 8."""
    for size, is_built in ((128, True), (96, True), (40, False), (16, False), (512, False)):
        config = read_json(described(tmp_path, head_size=size) / "config.json")
        if is_built:
            require_buildable(config, [])
        else:
            with pytest.raises(MptTrtError, match=rf"head size = {size} \(d_model / n_heads\)"):
                require_buildable(config, [])


def test_logits_of_every_token_are_a_flag(tmp_path):
    limits = BuildLimits(2, 16, 4, gather_all_token_logits=True)
    command = build_command("trtllm-build", described(tmp_path), limits, 1, Path("engine"))
    assert command[-1] == "--gather_context_logits"


# --- versions of TensorRT-LLM --------------------------------------------------------------------


@dataclass(frozen=True)
class Installation:
    """A stand-in for an installed TensorRT-LLM: its version, and a program that records calls."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, version: str, status: int = 0) -> Installation:
        metadata = folder / f"tensorrt_llm-{version}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Name: tensorrt_llm\nVersion: {version}\n")
        program = folder / "trtllm-build"
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, pathlib, sys\n"
            "target = next(a.split('=', 1)[1] for a in sys.argv if a.startswith('--output_dir'))\n"
            "pathlib.Path(target, 'config.json').write_text(json.dumps(sys.argv[1:]))\n"
            "print('the program itself speaks')\n"
            f"sys.exit({status})\n"
        )
        program.chmod(0o755)
        return cls(folder)

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder), os.environ["PATH"]])
        return os.environ | {"PYTHONPATH": str(self.folder), "PATH": path}


REQUIRED = ("--max_batch_size=8", "--max_input_len=512", "--max_output_len=64")


def build(tmp_path: Path, environment: dict | None = None, *options: str):
    return run_tool(
        "build_trtllm.py",
        f"--checkpoint_dir={described(tmp_path / 'ckpt')}",
        f"--output_dir={tmp_path / 'engine'}",
        *REQUIRED,
        *options,
        env=environment,
    )


@pytest.mark.parametrize("version", ["0.20.0", "0.21.0rc1", "1.0.0", "1.2.1"])
def test_versions_with_the_backend_are_taken(version, tmp_path):
    installed = Installation.create(tmp_path / "site", version)
    result = build(tmp_path, installed.environment, "--workers=2")
    assert result.returncode == 0, result.stderr
    called = json.loads((tmp_path / "engine" / "config.json").read_text())
    options = parsed(called)
    assert options.pop("output_dir").startswith(f"{tmp_path}/.engine.partial-")
    shown = build(tmp_path, None, "--workers=2", "--show").stdout.split()
    expected = parsed(shown)
    assert expected.pop("output_dir") == str(tmp_path / "engine")
    assert options == expected


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.19.2", "TensorRT-LLM 0.19.2 is older than 0.20"),
        ("1.3.0", "the TensorRT backend was removed; use backend tensorrt"),
        ("1.3.0rc5", "the TensorRT backend was removed; use backend tensorrt"),
        ("2.0", "the TensorRT backend was removed; use backend tensorrt"),
        ("main", "TensorRT-LLM main is not a known version"),
    ],
)
def test_other_versions_are_refused(version, message, monkeypatch):
    monkeypatch.setattr(package.metadata, "version", lambda _: version)
    with pytest.raises(MptTrtError, match=message):
        package.require_tensorrt_llm()


@pytest.mark.parametrize("version", [None, "0.19.0", "1.3.0"])
def test_a_refusal_is_one_line_before_any_work(version, tmp_path):
    environment = None
    if version is not None:
        environment = Installation.create(tmp_path / "site", version).environment
    result = build(tmp_path, environment)
    message = one_line_error(result)
    assert "backend = tensorrt_llm: TensorRT-LLM" in message and "tensorrt" in message
    assert "the program itself speaks" not in result.stdout
    assert not (tmp_path / "engine").exists()


def test_a_missing_program_is_named(tmp_path):
    installed = Installation.create(tmp_path / "site", "1.2.1")
    (installed.folder / "trtllm-build").unlink()
    message = one_line_error(build(tmp_path, installed.environment))
    assert "trtllm-build: not found, although TensorRT-LLM is installed" in message


def test_records_travel_from_the_checkpoint_to_the_engine(tmp_path):
    checkpoint = described(tmp_path / "ckpt")
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer/tokenizer.json").write_text("{}")
    manifest = {"end_ids": [7, 9], "files": {"tokenizer/tokenizer.json": "xxh3:0"}}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    environment = Installation.create(tmp_path / "site", "1.2.1").environment
    assert build(tmp_path, environment).returncode == 0
    engine = tmp_path / "engine"
    assert json.loads((engine / "manifest.json").read_text()) == manifest
    assert (engine / "tokenizer/tokenizer.json").read_text() == "{}"
    manifest["files"] = {"../secret": "xxh3:0"}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    result = build(tmp_path, environment, "--force")
    assert "manifest.json: '../secret' is not the name" in one_line_error(result)
    assert (engine / "tokenizer/tokenizer.json").exists()


def test_a_failed_build_leaves_nothing(tmp_path):
    installed = Installation.create(tmp_path / "site", "1.2.1", status=3)
    result = build(tmp_path, installed.environment)
    assert "trtllm-build ended with status 3" in one_line_error(result)
    assert "the program itself speaks" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "site"]


def test_nothing_heavy_is_imported_where_tensorrt_llm_runs() -> None:
    """TensorRT-LLM's environment has its own packages, rich and xxhash, but not mpt-trt's."""
    code = (
        "import sys, mpt_trt.cli.console, "
        "mpt_trt.commands.build_trtllm, mpt_trt.commands.run_trtllm; "
        "sys.exit(bool({'onnx', 'onnxruntime', 'ml_dtypes', 'jsonschema', 'torch', 'mpi4py'} "
        "& sys.modules.keys()))"
    )
    folder = REPOSITORY
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode == 0


# --- results of its runtime ----------------------------------------------------------------------


@pytest.fixture
def generation(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and the generation of a runtime that computes as the reference does."""
    spec = CheckpointSpec(num_heads=6, seed=2)
    folder = write_checkpoint(tmp_path / "hf", spec)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, 9).tolist()
    logits = reference_logits(folder, tokens[:-1]).numpy()
    write_recorded_generation(tmp_path / "generation.npz", tokens, logits[3:])
    (tmp_path / "engine").mkdir()
    for rank in range(2):
        (tmp_path / "engine" / f"rank{rank}.engine").touch()
    return folder, tmp_path


def write_recorded_generation(path: Path, tokens: list[int], logits: np.ndarray) -> None:
    """Four tokens of prompt."""
    np.savez(
        path,
        tokens=tokens,
        prompt_len=4,
        logits=logits,
        version="1.2.1",
        compute_capability="9.0",
        prefill_tokens_per_s=10.0,
        decode_tokens_per_s=20.0,
    )


def judge(folder: Path, tmp_path: Path) -> dict:
    call_tool(
        "compare_trtllm.py",
        *("--engine_dir", tmp_path / "engine", "--generation", tmp_path / "generation.npz"),
        *("--model_dir", folder, "--output", tmp_path / "result.json"),
    )
    return json.loads((tmp_path / "result.json").read_text())


def test_generated_tokens_are_held_against_the_reference(generation):
    folder, tmp_path = generation
    result = judge(folder, tmp_path)
    assert result["passed"] and result["runtime"] == "tensorrt_llm"
    assert result["distance"]["positions"] == 5 and result["distance"]["max_abs"] < 1e-5
    assert result["builder"]["version"] == "1.2.1"
    assert (result["ranks"], result["engines"]) == (2, ["rank0.engine", "rank1.engine"])
    call_tool("show_smoke_test.py", tmp_path / "result.json")


def test_a_wrong_generation_is_rejected(generation):
    folder, tmp_path = generation
    stored = dict(np.load(tmp_path / "generation.npz"))
    write_recorded_generation(tmp_path / "generation.npz", stored["tokens"], stored["logits"][::-1])
    with pytest.raises(MptTrtError, match="too far from the float32 reference"):
        judge(folder, tmp_path)
    assert not json.loads((tmp_path / "result.json").read_text())["passed"]


def test_a_damaged_trial_is_named(generation):
    folder, tmp_path = generation
    (tmp_path / "generation.npz").write_bytes(b"nothing")
    with pytest.raises(MptTrtError, match=r"n\.npz: cannot be read .* with run_trtllm\.py"):
        judge(folder, tmp_path)


class StandInRunner:
    """Answers with ModelRunnerCpp's signature; the real one's results are not known here."""

    rank = 0

    @classmethod
    def from_dir(cls, engine_dir: str, *, rank: int, gather_generation_logits: bool):
        assert rank == cls.rank and gather_generation_logits
        return cls()

    def generate(self, batch_input_ids: list, *, max_new_tokens: int, end_id: int, **options):
        assert options["top_k"] == 1 and options["return_dict"] and end_id == -1
        if self.rank != 0:
            return []  # as for ranks that enqueue no requests
        prompt = batch_input_ids[0].tolist()
        tokens = prompt + [len(prompt) + i for i in range(max_new_tokens)]
        logits = torch.arange(max_new_tokens * 5).reshape(1, 1, max_new_tokens, 5)
        return {
            "output_ids": torch.tensor([[[*tokens, 0, 0]]], dtype=torch.int32),
            "sequence_lengths": torch.tensor([[len(tokens)]]),
            "generation_logits": logits.half(),
        }


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_first_rank_records_is_read(rank, tmp_path, monkeypatch):
    library, runtime = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm.runtime")
    library.mpi_rank = lambda: rank
    runtime.ModelRunnerCpp = StandInRunner
    monkeypatch.setattr(StandInRunner, "rank", rank)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", library)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.runtime", runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    record_trtllm_generation(tmp_path, [7, 8, 9], 4, "1.2.1", tmp_path / "generation.npz")
    if rank != 0:
        assert not (tmp_path / "generation.npz").exists()
        return
    found = read_trtllm_generation(tmp_path / "generation.npz")
    assert (found.tokens, found.prompt_len) == ([7, 8, 9, 3, 4, 5, 6], 3)
    assert (found.version, found.compute_capability) == ("1.2.1", "9.0")
    assert found.logits.dtype == np.float32
    np.testing.assert_array_equal(found.logits, np.arange(20).reshape(4, 5))
    assert found.prefill_tokens_per_s > 0 and found.decode_tokens_per_s > 0


def test_the_prompt_is_written_as_tokens(tmp_path):
    folder = write_checkpoint(tmp_path / "hf", CheckpointSpec())
    output = tmp_path / "prompt.json"
    call_tool("encode_prompt.py", f"--model_dir={folder}", "--prompt=hello", f"--output={output}")
    found = json.loads(output.read_text())
    assert found["prompt"] == "hello" and len(found["tokens"]) == 5


def test_a_tokenizer_of_another_model_is_rejected(tmp_path):
    folder = write_checkpoint(tmp_path / "hf", CheckpointSpec(vocab_size=9))
    other = write_checkpoint(tmp_path / "other", CheckpointSpec())
    with pytest.raises(MptTrtError, match="does not fit the model"):
        call_tool(
            "encode_prompt.py",
            f"--model_dir={folder}",
            f"--tokenizer_dir={other}",
            "--prompt=hello",
            f"--output={tmp_path / 'prompt.json'}",
        )
    np.savez(tmp_path / "generation.npz", tokens=[1, 2])
    with pytest.raises(MptTrtError, match="does not fit the model"):
        call_tool(
            "compare_trtllm.py",
            *("--engine_dir", tmp_path, "--generation", tmp_path / "generation.npz"),
            *("--model_dir", folder, "--tokenizer_dir", other, "--output", tmp_path / "o.json"),
        )


# --- rules ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workflow(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A workflow with variants of this backend, and a model whose vocabulary two ranks divide."""
    made = Workflow.create(tmp_path_factory.mktemp("trtllm") / "project")
    limits = {"max_batch_size": 4, "max_input_len": 24, "max_output_len": 16}
    backend = {"backend": "tensorrt_llm", **limits}
    made.configure(
        llm=backend,
        llm_sq=backend | {"quantization": {"method": "smoothquant"}},
        llm_static=backend | {"quantization": {"method": "smoothquant", "per_token": False}},
        llm_int8=backend | {"quantization": {"method": "int8_weight_only"}},
        odd={"shard_head": False, **limits},
    )
    # Heads of 48 features, for which TensorRT-LLM has kernels.
    spec = replace(SPEC, hidden_size=96, num_heads=2)
    shutil.rmtree(made.folder / "model")
    write_checkpoint(made.folder / "model", spec)
    write_checkpoint(made.folder / "even", replace(spec, vocab_size=132))
    config = made.folder / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["models"]["even"] = {"source": "even"}
    config.write_text(yaml.safe_dump(content))
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which TensorRT-LLM is installed."""
    return Installation.create(tmp_path_factory.mktemp("installed") / "site", "1.2.1").environment


CHECKPOINT = "trtllm_ckpts/toy/{}/1-gpu"
ENGINE = "trt_engines/toy/{}/1-gpu"


def test_the_backend_decides_about_the_rules(workflow, installed):
    rules = ("convert_checkpoint", "make_networks", "build_rank", "assemble_engine")
    own = {f"{rule} fp16" for rule in rules}
    assert set(workflow.planned(ENGINE.format("fp16"))) == own
    llm = {"convert_checkpoint fp16", "convert_to_trtllm llm", "build_trtllm_engine llm"}
    assert set(workflow.planned(ENGINE.format("llm"), **installed)) == llm
    tried = set(workflow.planned("smoke_tests/toy/llm/1-gpu.json", **installed))
    more = {"encode_prompt", "run_trtllm llm", "compare_trtllm llm", "check_smoke_test llm"}
    assert tried == llm | more
    assert "smoke_test fp16" in workflow.planned("smoke_tests/toy/fp16/1-gpu.json")


def test_checkpoints_are_made_of_any_variant(workflow):
    for variant in ("fp16", "llm"):
        assert set(workflow.planned(CHECKPOINT.format(variant))) == {
            "convert_checkpoint fp16",
            f"convert_to_trtllm {variant}",
        }


def test_smoothquant_needs_what_its_form_is_made_from(workflow):
    assert set(workflow.planned(CHECKPOINT.format("llm_sq"))) == {
        "convert_smoothquant_checkpoint sq",
        "convert_to_trtllm llm_sq",
    }
    assert set(workflow.planned(CHECKPOINT.format("llm_static"))) == {
        "convert_checkpoint fp16",
        "quantize int8_sq",
        "convert_to_trtllm llm_static",
    }


def test_dry_runs_show_the_commands(workflow, installed):
    result = workflow.run("-n", "-p", "smoke_tests/even/llm/2-gpu.json", **installed)
    text = re.sub(r"\s*\\\n\s*", " ", result.stdout + result.stderr)
    assert (
        "python workflow_scripts/steps/build_trtllm.py "
        "--checkpoint_dir trtllm_ckpts/even/llm/2-gpu "
        "--max_batch_size=4 --max_input_len=24 --max_output_len=16 "
        "--workers 2 "
        "--output_dir trt_engines/even/llm/2-gpu"
    ) in text
    assert (
        "mpirun --oversubscribe --bind-to none --allow-run-as-root -n 2 "
        "python workflow_scripts/steps/run_trtllm.py "
        "--engine_dir trt_engines/even/llm/2-gpu "
    ) in text


def test_an_engine_ends_in_the_clear_message_before_it_is_converted(workflow):
    result = workflow.run(ENGINE.format("llm"))
    text = result.stdout + result.stderr
    assert result.returncode != 0
    assert "backend = tensorrt_llm: TensorRT-LLM is not installed" in text
    assert not (workflow.folder / "trtllm_ckpts").exists()
    assert not (workflow.folder / "ft_ckpts").exists(), "something else was started, too"


def test_the_whole_way_to_the_call_of_trtllm_build(workflow, installed):
    result = workflow.run(ENGINE.format("llm"), **installed)
    assert result.returncode == 0, result.stdout + result.stderr
    called = json.loads((workflow.folder / ENGINE.format("llm") / "config.json").read_text())
    assert parsed(called)["checkpoint_dir"] == CHECKPOINT.format("llm")
    assert workflow.planned(ENGINE.format("llm")) == []


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            CHECKPOINT.format("llm_int8"),
            "shape = .96, 288.*backend tensorrt_llm does not support it",
        ),
        ("trtllm_ckpts/toy/odd/2-gpu", "shard_head = False: backend tensorrt_llm"),
        ("trtllm_ckpts/toy/llm/2-gpu", "vocab_size = 131: backend tensorrt_llm"),
        ("quality/toy/llm/1-gpu.json", "backend tensorrt_llm has only smoke tests"),
        (
            "build/plans/toy/llm/1-gpu/rank0.engine",
            "backend = tensorrt_llm: it builds whole engines",
        ),
        (CHECKPOINT.format("lllm"), "no variant named 'lllm'; did you mean 'llm'"),
        (ENGINE.format("lllm"), "no variant named 'lllm'; did you mean 'llm'"),
    ],
)
def test_refusals_when_planning(target, message, workflow):
    result = workflow.run("-n", target)
    assert result.returncode != 0
    assert re.search(message, result.stdout + result.stderr)


def test_reports_leave_the_backend_out() -> None:
    content = {"models": {}, "variants": {"a": {}, "b": {"backend": "tensorrt_llm"}}}
    assert parse_settings(content).engines_of_report() == [("a", 1)]
    for report in ({"variants": ["b"]}, {"more_tp_sizes": {"b": [2]}}):
        with pytest.raises(MptTrtError, match="report: b has backend tensorrt_llm"):
            parse_settings(content | {"report": report}).engines_of_report()


def test_our_own_tools_do_not_offer_the_backend(tmp_path):
    result = run_tool("build_rank.py", "--backend=tensorrt_llm")
    assert result.returncode == 2 and "invalid choice: 'tensorrt_llm'" in result.stderr


# --- the environment -----------------------------------------------------------------------------


def test_its_environment_belongs_to_its_rules_alone() -> None:
    users = {}
    for module in sorted((REPOSITORY / "rules").glob("*.smk")):
        for name, body in re.findall(
            r"^rule (\w+):\n(.*?)(?=^\S|\Z)", module.read_text(), re.M | re.S
        ):
            assert ("tensorrt_llm.yaml" in body) == ("TENSORRT_LLM_CONTAINER" in body), name
            users[name] = "tensorrt_llm.yaml" in body
    assert {name for name, is_user in users.items() if is_user} == {
        "build_trtllm_engine",
        "run_trtllm",
    }


def test_pins_are_those_of_the_last_version_with_the_backend() -> None:
    content = yaml.safe_load((REPOSITORY / "envs/tensorrt_llm.yaml").read_text())
    (packages,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert {
        "tensorrt_llm==1.2.1",
        "tensorrt==10.14.*",
        "torch==2.9.*",
        "transformers==4.57.3",
        "nvidia-modelopt==0.37.*",
        "numpy<2",
    } <= set(packages)
    for name in ("requirements.txt", "requirements-dev.txt", "envs/base.yaml"):
        assert "tensorrt_llm" not in (REPOSITORY / name).read_text()
