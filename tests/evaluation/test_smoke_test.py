"""The distance to the reference, the reference itself, and the smoke test that uses both."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from transformers import MptForCausalLM

from mpt_trt.engines.interface import GreedyModel
from mpt_trt.engines.load import LoadedEngine, load_engine
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.comparison import measure_distance
from mpt_trt.evaluation.distance import Distance, Tolerance, violations
from mpt_trt.evaluation.logits import all_logits
from mpt_trt.evaluation.recorded_generation import record_generation
from mpt_trt.evaluation.reference import reference_logits, reference_name
from mpt_trt.evaluation.simulated_rounding import ExpectedLogits
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.generation.logits import log_softmax
from mpt_trt.quantization.schemes import Awq, Fp8, Quantization, SmoothQuant, WeightOnly
from mpt_trt.system import gpus
from support.built import Built
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import (
    FEATURES,
    LIMITS,
    build,
    call_tool,
    convert,
    deviation,
    make_ft_checkpoint,
    one_line_error,
    random_ids,
    reference,
    run_tool,
    tree,
)
from support.paths import REPOSITORY

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Simulates a machine without a GPU, so that ONNX Runtime runs everything."""
    monkeypatch.setattr(gpus, "compute_capabilities", lambda: ())


# --- distance ------------------------------------------------------------------------------------


def random_logits(seed: int, scale: float = 2.0, shape: tuple[int, int] = (7, 31)) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def compared(engine: np.ndarray, reference_: np.ndarray, *rounded: np.ndarray) -> Distance:
    """rounded: logits in the engine's dtype, and with its quantization; default: the reference."""
    expected = [reference_, *(rounded or (reference_, reference_))]
    return measure_distance(engine, ExpectedLogits(*map(torch.from_numpy, expected)))


@pytest.mark.parametrize("scale", [0.1, 2.0, 40.0, 3000.0])
@pytest.mark.parametrize("noise", [1e-3, 0.3, 5.0])
def test_distance_equals_pytorchs(scale, noise):
    expected = random_logits(0, scale)
    engine = expected + random_logits(1, noise)
    found = compared(engine, expected)
    log_q, log_p = (
        functional.log_softmax(torch.from_numpy(x).double(), dim=-1) for x in (engine, expected)
    )
    divergence = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert found.mean_kl == pytest.approx(divergence.item(), rel=1e-9, abs=1e-15)
    difference = torch.from_numpy(engine).double() - torch.from_numpy(expected).double()
    assert found.max_abs == pytest.approx(difference.abs().max().item(), rel=1e-12)
    spread = torch.from_numpy(expected).double().var(-1, correction=0).mean().sqrt()
    error = difference.square().mean().sqrt() / spread
    assert found.error == found.unexplained_error == pytest.approx(error.item(), rel=1e-12)
    assert found.positions == 7


def test_errors_are_told_apart():
    """Noise of the dtype, of the quantization, and of the engine itself; sums of squares."""
    reference_ = random_logits(0, 1.0, (50, 2000))
    noise = [random_logits(seed, scale, (50, 2000)) for seed, scale in ((1, 0.01), (2, 0.1))]
    in_dtype, quantized = reference_ + noise[0], reference_ + noise[0] + noise[1]
    own = random_logits(3, 0.2, (50, 2000))
    found = compared(quantized + own, reference_, in_dtype, quantized)
    assert found.rounding_error == pytest.approx(0.01, rel=0.01)
    assert found.expected_error == pytest.approx(math.hypot(0.01, 0.1), rel=0.01)
    assert found.unexplained_error == pytest.approx(0.2, rel=0.01)
    assert found.error == pytest.approx(math.hypot(0.01, 0.1, 0.2), rel=0.01)


def test_distance_by_hand():
    """Two tokens, probabilities 1/2, 1/2 against 4/5, 1/5: 1/2 ln(5/8) + 1/2 ln(5/2)."""
    even, uneven = np.zeros((1, 2), np.float32), np.log([[4.0, 1.0]]).astype(np.float32)
    found = compared(uneven, even)
    assert found.mean_kl == pytest.approx(0.5 * math.log(5 / 8) + 0.5 * math.log(5 / 2), rel=1e-6)
    assert found.max_abs == pytest.approx(math.log(4), rel=1e-6)
    turned = compared(even, uneven)
    assert turned.mean_kl == pytest.approx(0.8 * math.log(8 / 5) + 0.2 * math.log(2 / 5), rel=1e-6)
    # The spread is ln(4) / 2, the root mean square ln(4) / sqrt(2).
    assert turned.error == pytest.approx(math.sqrt(2), rel=1e-6)


def test_distance_of_equal_logits_is_zero():
    logits = random_logits(0)
    found = compared(logits, logits.copy())
    assert (found.error, found.max_abs, found.mean_kl, found.top1) == (0.0, 0.0, 0.0, 1.0)
    # Never 0: float32 sums in another order are as good.
    assert found.expected_error == found.rounding_error == 1e-5


def test_shift_of_all_logits_changes_no_probability():
    logits = random_logits(0)
    found = compared(logits + np.float32(8), logits)
    assert found.max_abs == pytest.approx(8, rel=1e-5)
    assert found.mean_kl == pytest.approx(0, abs=1e-10) and found.top1 == 1


def test_top1_is_the_share_of_positions_without_ties():
    reference_, engine = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.float32)
    reference_[:, 1] = 1
    engine[[0, 1, 2], 1] = 1
    engine[3, 2] = 1
    assert compared(engine, reference_).top1 == 0.75
    # Rounding of 1 % of the spread explains a difference of 0.005, but not of 0.5.
    for gap, expected in ((0.005, 1.0), (0.5, 0.75)):
        reference_[3, 2] = 1 - gap
        rounded = reference_ * np.float32(1.01)
        assert compared(engine, reference_, rounded, rounded).top1 == expected
    engine[0, 0] = np.nan
    assert compared(engine, reference_).top1 == 0.5


# --- tolerance -----------------------------------------------------------------------------------

INT8 = Quantization(WeightOnly(8))
# Allowed: 1.2 x 0.1 + 4 x 0.01 = 0.16, of which 0.25 x 0.1 + 4 x 0.01 = 0.065 unexplained.
ON_THE_EDGE = Distance(
    error=0.16,
    expected_error=0.1,
    rounding_error=0.01,
    unexplained_error=0.065,
    max_abs=1e9,
    mean_kl=1e9,
    top1=0.9,
    positions=10,
)
TOLERANCE = Tolerance(error_factor=1 + 1e-9, min_top1=0.9)


@pytest.mark.parametrize(
    ("changes", "quantization", "violations_"),
    [
        ({}, INT8, []),
        ({"error": 0.161}, INT8, ["error is 0.161 of the logits' spread (expected 0.1, allowed"]),
        (
            {"unexplained_error": 0.066},
            INT8,
            ["all but 0.066 of the logits' spread (al"],
        ),
        ({"unexplained_error": 0.066}, Quantization(Awq()), []),
        ({"unexplained_error": 0.066}, Quantization(WeightOnly(8), "int8"), []),
        ({"error": 0.19}, Quantization(Fp8()), []),
        ({"error": 0.191}, Quantization(Fp8()), ["error is 0.191"]),
        ({"error": 0.24}, Quantization(SmoothQuant()), []),
        ({"error": 0.54}, Quantization(SmoothQuant(per_token=False)), []),
        ({"top1": 0.89}, INT8, ["at 89.0% of the positions (allowed 90.0%)"]),
        ({"error": math.inf, "top1": 0.0}, INT8, ["error is inf", "at 0.0%"]),
        ({"error": math.nan}, INT8, ["error is nan"]),
        ({"unexplained_error": math.nan}, INT8, ["all but nan"]),
    ],
)
def test_violations_name_what_exceeds_the_tolerance(changes, quantization, violations_):
    found = violations(replace(ON_THE_EDGE, **changes), quantization, TOLERANCE)
    assert len(found) == len(violations_)
    assert all(part in each.text for part, each in zip(violations_, found, strict=True))
    keys = {"min_top1" if "positions" in each.text else "error_factor" for each in found}
    assert keys == {each.key for each in found}


def test_a_factor_allows_more():
    distance = replace(ON_THE_EDGE, error=0.3, unexplained_error=0.1)
    assert violations(distance, INT8, TOLERANCE)
    assert not violations(distance, INT8, replace(TOLERANCE, error_factor=2.0))


# --- the reference -------------------------------------------------------------------------------

OF_TRANSFORMERS = {
    "4 heads": CheckpointSpec(),
    "6 heads": CheckpointSpec(num_heads=6),
    "1 head": CheckpointSpec(num_heads=1),
    "clip_qkv": CheckpointSpec(clip_qkv=0.75),
    "softmax_scale": CheckpointSpec(softmax_scale=0.6),
    "epsilon": CheckpointSpec(layer_norm_epsilon=0.02),
    "untied head": CheckpointSpec(tie_word_embeddings=False),
    "vocabulary of 101": CheckpointSpec(vocab_size=101, num_layers=3),
}


def logits_of_transformers(folder: Path, tokens: list[int]) -> np.ndarray:
    model = MptForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_reference_equals_transformers(name, tmp_path):
    spec = OF_TRANSFORMERS[name]
    assert spec.runs_in_transformers
    tokens = random_ids(spec, 1, 17)[0].tolist()
    folder = write_checkpoint(tmp_path, spec)
    found = reference_logits(folder, tokens)
    assert found.dtype == torch.float32 and found.shape == (17, spec.vocab_size)
    np.testing.assert_allclose(found, logits_of_transformers(folder, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["safetensors", "sharded_safetensors", "bin", "sharded_bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_reads_every_kind_of_checkpoint(layout, dtype, tmp_path):
    spec = CheckpointSpec(num_heads=6)
    tokens = random_ids(spec, 1, 11)[0].tolist()
    folder = write_checkpoint(tmp_path, spec, layout=layout, dtype=dtype)
    found = reference_logits(folder, tokens).numpy()
    np.testing.assert_allclose(found, logits_of_transformers(folder, tokens), rtol=0, atol=1e-5)
    rounded = reference(spec, np.array([tokens]), str(dtype).removeprefix("torch."))[0]
    np.testing.assert_allclose(found, rounded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("style", "prefix"), [("native", True), ("hub", False)])
def test_reference_reads_native_configs_and_bare_names(style, prefix, tmp_path):
    spec = CheckpointSpec()
    ids = random_ids(spec, 1, 11)
    folder = write_checkpoint(tmp_path, spec, style=style, prefix=prefix)
    found = reference_logits(folder, ids[0].tolist()).numpy()
    np.testing.assert_allclose(found, reference(spec, ids)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_heads", [4, 6])
def test_reference_knows_alibi_bias_max(num_heads, tmp_path):
    """The model of transformers ignores it, its blocks take what they are given."""
    spec = CheckpointSpec(num_heads=num_heads, alibi_bias_max=16)
    ids = random_ids(spec, 1, 20)
    found = reference_logits(write_checkpoint(tmp_path, spec), ids[0].tolist()).numpy()
    np.testing.assert_allclose(found, reference(spec, ids)[0], rtol=0, atol=1e-5)


def test_reference_of_one_token(tmp_path):
    spec = CheckpointSpec()
    found = reference_logits(write_checkpoint(tmp_path, spec), [5]).numpy()
    np.testing.assert_allclose(found, reference(spec, np.array([[5]]))[0], rtol=0, atol=1e-5)


def test_reference_says_what_computed_it(tmp_path):
    folder = write_checkpoint(tmp_path, CheckpointSpec())
    assert reference_name(folder) == f"transformers {transformers.__version__}, float32"


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch
import transformers.models.mpt.modeling_mpt
from mpt_trt.evaluation.reference import reference_logits

def held():
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(map(int, re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+) kB", status)))

torch.set_num_threads(1)
reference_logits(Path(sys.argv[1]), [1, 2, 3])  # what PyTorch allocates once and for all
base, samples, done = held(), [], threading.Event()

def sample():
    while not done.wait(0.002):
        samples.append(held())

thread = threading.Thread(target=sample)
thread.start()
reference_logits(Path(sys.argv[2]), list(range(32)))
done.set()
thread.join()
print(max(samples) - base)
"""


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_reference_takes_the_memory_of_a_block_not_of_the_model(layout, tmp_path):
    """The block that runs and the embedding; 16 MiB for activations."""
    spec = CheckpointSpec(
        hidden_size=512, num_heads=8, num_layers=16, vocab_size=2048, max_seq_len=64
    )
    small = write_checkpoint(tmp_path / "small", CheckpointSpec())
    large = write_checkpoint(tmp_path / "large", spec, layout=layout, dtype=torch.float16)
    block, embedding = 4 * 12 * 512**2, 4 * 2048 * 512
    whole = 16 * block + embedding
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=REPOSITORY,
    )
    taken = int(result.stdout)
    assert block < taken < block + embedding + 16 * MIB < whole / 4


# --- trials --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(built: Built) -> LoadedEngine:
    return load_engine(built.engine, "onnxruntime", num_threads=1)


@pytest.mark.parametrize("max_logits", [None, 1, 3, 100])
@pytest.mark.parametrize("length", [1, 16, 30])
def test_all_logits_are_fed_in_pieces_that_the_engine_allows(built, engine, max_logits, length):
    ids = random_ids(built.spec, 1, length)
    limited = replace(engine, model=StepLengths(engine.model), max_logits=max_logits)
    found = all_logits(limited, ids[0].tolist())
    assert deviation(found, reference(built.spec, ids)[0]) < 2e-5
    allowed = min(LIMITS.max_input_len, max_logits or LIMITS.max_input_len)
    assert max(limited.model.lengths) <= allowed
    assert len(limited.model.lengths) == math.ceil(length / allowed)


class StepLengths:
    """Passes everything on to a model and notes how many tokens and logits each step has."""

    def __init__(self, model):
        self.model, self.lengths = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def step(self, input_ids, write_positions, logit_positions):
        assert len(logit_positions) == input_ids.shape[1]
        self.lengths.append(input_ids.shape[1])
        return self.model.step(input_ids, write_positions, logit_positions)


@pytest.mark.parametrize(("prompt_len", "new_tokens"), [(5, 6), (1, 1), (1, 8), (20, 3)])
def test_trial_continues_as_transformers_does_and_keeps_all_logits(
    built, engine, prompt_len, new_tokens
):
    """20 tokens are more than the engine takes in one step."""
    prompt = random_ids(built.spec, 1, prompt_len, seed=4)[0].tolist()
    generation = record_generation(engine, prompt, new_tokens)
    model = MptForCausalLM.from_pretrained(built.hf, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # a generation does not stop at the end token
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )
    assert generation.tokens == expected[0].tolist()
    assert generation.prompt_len == prompt_len
    seen = np.array([generation.tokens[:-1]])
    assert generation.logits.shape == (prompt_len + new_tokens - 1, built.spec.vocab_size)
    assert deviation(generation.logits, reference(built.spec, seen)[0]) < 2e-5
    assert generation.speed.prefill_tokens_per_s > 0
    assert (generation.speed.decode_tokens_per_s > 0) == (new_tokens > 1)


def test_a_model_that_chooses_itself_is_recorded_step_by_step(built, engine):
    """Only `step` returns the logits that are compared."""

    class Choosing:
        def __getattr__(self, name):
            return getattr(engine.model, name)

        def greedy_steps(self, tokens, write_positions, count):
            rows = np.arange(len(tokens))
            where = np.stack([rows, np.zeros_like(rows)], axis=1)
            for index in range(count):
                logits = self.step(tokens[:, None], write_positions + index, where)
                tokens = logits.argmax(axis=-1)
                yield tokens, log_softmax(logits)[rows, tokens]

    model = Choosing()
    assert isinstance(model, GreedyModel)
    prompt = random_ids(built.spec, 1, 5, seed=4)[0].tolist()
    generation = record_generation(replace(engine, model=model), prompt, 6)
    assert generation.tokens == record_generation(engine, prompt, 6).tokens
    assert len(generation.logits) == 10


# --- the smoke test ------------------------------------------------------------------------------

PROMPT = "to be or"


def smoke_test_arguments(hf: Path, engine: Path, output: Path) -> list[object]:
    folders = [f"--engine_dir={engine}", f"--model_dir={hf}", f"--output={output}"]
    return [*folders, f"--prompt={PROMPT}", "--max_new_tokens=12", "--num_threads=1"]


def smoke_test(hf: Path, engine: Path, output: Path, *flags: str) -> None:
    call_tool("smoke_test.py", *smoke_test_arguments(hf, engine, output), *flags)


def test_smoke_test_reports_text_speed_runtime_and_distance(built: Built, tmp_path, capsys):
    output = tmp_path / "results" / "1-gpu.json"
    smoke_test(built.hf, built.engine, output)
    result = json.loads(output.read_text())
    assert tree(output.parent) == ["1-gpu.json"]

    assert result["passed"] is True
    assert result["engine_dir"] == str(built.engine) and result["engines"] == ["rank0.engine"]
    assert result["builder"]["package"] == "tensorrt_rtx"
    assert result["runtime"].startswith("ONNX Runtime 1.")
    assert result["fallback_reason"].startswith("no NVIDIA GPU found")
    assert result["reference"] == reference_name(built.hf)
    assert result["tolerance"] == {"error_factor": 1.0, "min_top1": 0.95}
    assert (result["dtype"], result["quantization"]) == ("float32", {"method": "none"})
    speed = result["speed"]
    for name in ("prefill", "decode"):
        slowest, fastest = speed[f"{name}_range"]
        assert 0 < slowest <= speed[f"{name}_tokens_per_s"] <= fastest
    assert speed["rounds"] == 3

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(built.hf)
    tokens = result["tokens"]
    assert result["prompt"] == PROMPT
    assert tokens[: result["prompt_len"]] == tokenizer(PROMPT)["input_ids"]
    assert len(tokens) == len(PROMPT) + 12
    continuation = tokens[result["prompt_len"] :]
    assert result["text"] == tokenizer.decode(continuation, skip_special_tokens=True)
    assert result["distance"]["positions"] == len(tokens) - 1
    assert result["distance"]["top1"] == 1
    assert 0 < result["distance"]["max_abs"] < 1e-4 and result["distance"]["mean_kl"] < 1e-9
    assert 0 < result["distance"]["error"] < 1e-5 < result["allowed_error"] < 1e-4
    shown = capsys.readouterr().out
    assert result["text"].splitlines()[0] in shown and result["runtime"] in shown
    assert "Smoke test  passed" in shown and str(output) in shown


def with_altered_weights(built: Built, folder: Path) -> Path:
    """An engine whose weights were changed after it was built, in a file of the same size."""
    engine = Path(shutil.copytree(built.engine, folder / "engine"))
    path = engine / "weights" / "model.layers.1.attention.dense.weight.0.bin"
    values = np.fromfile(path, np.float32)
    path.unlink()
    values[::7] *= 1.5
    values.tofile(path)
    return engine


def with_other_slopes(built: Built, folder: Path) -> Path:
    """An engine from an FT checkpoint with alibi_bias_max = 16."""
    ft = Path(shutil.copytree(built.ft, folder / "1-gpu"))
    with (ft / "config.ini").open("a") as stream:
        stream.write("alibi_bias_max = 16\n")
    text = (ft / "config.ini").read_text()
    (ft / "config.ini").write_text(re.sub(r"\n\n+", "\n", text))
    return build(read_ft_checkpoint(ft), folder / "engine")


def of_another_checkpoint(built: Built, folder: Path) -> Path:
    """An engine of the same architecture with another seed."""
    return build(make_ft_checkpoint(folder, replace(built.spec, seed=99)), folder / "engine")


def rounded_to_bfloat16(built: Built, folder: Path) -> Path:
    return build(convert(built.hf, folder / "1-gpu", "bfloat16"), folder / "engine")


@pytest.mark.parametrize("wrong", [with_altered_weights, with_other_slopes, of_another_checkpoint])
def test_wrong_engine_is_rejected(built: Built, wrong, tmp_path, capsys):
    engine, output = wrong(built, tmp_path), tmp_path / "1-gpu.json"
    with pytest.raises(MptTrtError) as caught:
        smoke_test(built.hf, engine, output, "--trust")
    message = str(caught.value)
    assert message.startswith(f"{engine}: too far from the float32 reference: its error is ")
    assert "--error_factor allows more" in message and f"see {output}" in message
    assert json.loads(output.read_text())["passed"] is False
    assert "Smoke test  FAILED" in capsys.readouterr().out
    smoke_test(built.hf, engine, output, "--trust", "--report_only")


def test_rejection_as_a_command(built: Built, tmp_path):
    """Exit status 1 and one line."""
    engine = with_altered_weights(built, tmp_path)
    arguments = smoke_test_arguments(built.hf, engine, tmp_path / "1-gpu.json")
    result = run_tool("smoke_test.py", *arguments, "--trust")
    assert "too far from the float32 reference" in one_line_error(result)


def test_a_result_is_judged_later(built: Built, tmp_path, capsys):
    measured, output = tmp_path / "measured.json", tmp_path / "results" / "1-gpu.json"
    arguments = (f"--measured={measured}", f"--output={output}", "--variant=fp32")
    smoke_test(
        built.hf, with_altered_weights(built, tmp_path), measured, "--trust", "--report_only"
    )
    key = r"variants\.fp32\.tolerance\.error_factor allows more"
    with pytest.raises(MptTrtError, match=key):
        call_tool("check_smoke_test.py", *arguments)
    assert not output.exists()
    smoke_test(built.hf, built.engine, measured, "--report_only")
    assert "Smoke test  passed" not in capsys.readouterr().out
    call_tool("check_smoke_test.py", *arguments)
    assert "Smoke test  passed" in capsys.readouterr().out
    assert output.read_bytes() == measured.read_bytes()


@pytest.mark.parametrize("storage_type", ["float16", "bfloat16"])
def test_engines_of_fewer_bits_pass_their_default_tolerance(storage_type, tmp_path):
    """Chunked prefill too: the prompt is longer than what the engine takes in one step."""
    spec = CheckpointSpec(num_heads=6, seed=1)
    checkpoint = make_ft_checkpoint(tmp_path, spec, storage_type)
    engine = build(checkpoint, tmp_path / "engine", replace(LIMITS, max_input_len=5))
    smoke_test(tmp_path / "hf", engine, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["passed"]


def test_prompt_that_does_not_fit_is_refused(built: Built, tmp_path):
    with pytest.raises(MptTrtError, match=r"40 tokens.*a cache row holds 32"):
        smoke_test(built.hf, built.engine, tmp_path / "out.json", f"--prompt={'ab c' * 10}")
    assert tree(tmp_path) == []


def test_architecture_that_transformers_lacks(tmp_path):
    checkpoint = make_ft_checkpoint(tmp_path, FEATURES["multi-query"])
    engine = build(checkpoint, tmp_path / "engine")
    smoke_test(tmp_path / "hf", engine, tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["passed"] and result["reference"].startswith("plain PyTorch ")
