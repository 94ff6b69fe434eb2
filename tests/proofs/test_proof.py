"""The demo model's engines against its facts, which transformers computed, and wrong engines."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mpt_trt.calibration.calibrated_quantization import CalibratedQuantization
from mpt_trt.cli.output_options import input_paths
from mpt_trt.engines.build.rank_network import NetworkInputs
from mpt_trt.engines.rank_descriptions import network_name
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.ft.checkpoint import read_ft_checkpoint
from mpt_trt.model.sharding import VocabularySharding
from mpt_trt.proofs.compare import _compare, compare
from mpt_trt.proofs.facts import (
    EngineKind,
    Fact,
    GreedyTokens,
    RankWeights,
    Score,
    ScoreDifference,
    fact_hash,
    read_facts,
)
from mpt_trt.proofs.result import (
    FactMeasurements,
    Measured,
    ProofResult,
    read_measurements,
    read_proof,
    require_proved,
)
from mpt_trt.quantization.schemes import Quantization, WeightOnly
from support.demo import MODEL
from support.engines import call_tool
from support.simulated.install import build_simulated

FACTS = MODEL / "facts.json"
LIMITS = BuildLimits(max_batch_size=4, max_input_len=512, max_output_len=64)
# The beginning of the text, so that the test takes seconds.
SHORT = 6_000
INT8 = Quantization(WeightOnly(8), "auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FT checkpoints and networks of the demo model, and its facts without those about texts."""
    folder = tmp_path_factory.mktemp("proof")
    for storage in ("float32", "float16"):
        call_tool("convert_hf_mpt_to_ft.py", "-i", MODEL, "-o", folder / storage, "-t", storage)
    content = json.loads(FACTS.read_text())
    content["facts"] = [fact for fact in content["facts"] if not fact["kind"].startswith("score")]
    (folder / "facts.json").write_text(json.dumps(content))
    return folder


def build(folder: Path, storage: str, name: str, quantization: Quantization) -> Path:
    checkpoint = read_ft_checkpoint(folder / storage / "1-gpu")
    calibrated = CalibratedQuantization(quantization, None)
    inputs = NetworkInputs(checkpoint, LIMITS, VocabularySharding(), calibrated)
    return build_simulated(inputs, folder / name)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Path:
    return build(folder, "float32", "fp32", Quantization(None, "auto"))


@pytest.fixture(scope="module")
def int8_engine(folder: Path) -> Path:
    return build(folder, "float16", "int8", INT8)


def measure(engine: Path, facts: Path, output: Path, *options: str) -> FactMeasurements:
    call_tool(
        "steps/measure_facts.py", "--engine_dir", engine, "--facts", facts, "--output", output,
        "--runtime=onnxruntime", "--num_threads=1", *options,
    )  # fmt: skip
    [result] = read_measurements([output])
    return result


def test_an_engine_passes(engine: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    measured = measure(engine, folder / "facts.json", folder / "measured.json")
    printed = capsys.readouterr().out
    assert "log-probabilities, float32  passed: deviation " in printed
    assert "4 passed, 0 failed, 0 not checked" in printed
    gap = measured.measured["greedy tokens, float32"]
    assert gap.numbers == (0.0,) * 16 and len(gap.tokens) == 16


def scaled(engine: Path, target: Path, name: str, factor: float) -> Path:
    """A copy of an engine in which one initializer, stored in a file, has another scale."""
    shutil.copytree(engine, target)
    network = onnx.load(target / network_name(0), load_external_data=False)
    [tensor] = [each for each in network.graph.initializer if each.name == name]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:
        path = target / place["location"]
        values = np.fromfile(path, dtype)
        path.unlink()  # it may be a link to the checkpoint's file
        start = int(place.get("offset", 0)) // dtype.itemsize
        stop = start + int(np.prod(tensor.dims))
        values[start:stop] = (values[start:stop].astype(np.float64) * factor).astype(dtype)
        values.tofile(path)
    else:
        changed = (numpy_helper.to_array(tensor).astype(np.float64) * factor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(changed, name))
        onnx.save(network, target / network_name(0))
    return target


@pytest.mark.parametrize("matrix", ["layers.3.mlp.dense_4h_to_h", "layers.6.attention.dense"])
def test_one_matrix_scaled_by_two_percent_fails(
    matrix: str, engine: Path, folder: Path, tmp_path: Path
) -> None:
    wrong = scaled(engine, tmp_path / "wrong", f"{matrix}.weight", 1.02)
    with pytest.raises(MptTrtError, match=r"differs from \d published fact.*log-probabilities"):
        measure(wrong, folder / "facts.json", tmp_path / "measured.json", "--trust")


def short_text_facts(folder: Path, target: Path) -> Path:
    """The fact about 8-bit weights, of the beginning of the text, computed as for the whole."""
    import torch
    from transformers import AutoTokenizer, MptForCausalLM

    from tools.demo_facts import rounded_to_int8, text_scores

    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[:SHORT]
    (target / "heldout.txt").write_text(text, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    model = MptForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()
    with torch.inference_mode():
        plain = text_scores(model, tokenizer, text)["bits_per_byte"]
        with rounded_to_int8(model):
            rounded = text_scores(model, tokenizer, text)["bits_per_byte"]
    content = json.loads(FACTS.read_text())
    about_int8 = [fact for fact in content["facts"] if "method" in fact["engine"]]
    [difference] = [fact for fact in about_int8 if fact["kind"] == "score_difference"]
    difference["value"] = rounded - plain
    path = target / "facts.json"
    path.write_text(json.dumps({"facts": about_int8}))
    return path


def test_differences_between_engines(
    int8_engine: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    facts = short_text_facts(folder, tmp_path)
    base = build(folder, "float16", "fp16", Quantization(None, "auto"))
    matrix = "layers.3.mlp.dense_4h_to_h.weight"
    wrong = scaled(int8_engine, tmp_path / "wrong", f"{matrix}.scale", 1.02)
    files = {}
    for name, built in (("int8", int8_engine), ("fp16", base), ("wrong", wrong)):
        files[name] = tmp_path / f"{name}.json"
        measure(built, facts, files[name], "--report_only", "--trust")

    def check(*names: str) -> ProofResult:
        output = tmp_path / "proof.json"
        output.unlink(missing_ok=True)
        call_tool(
            "steps/check_facts.py", "--model=mpt-demo", "--facts", facts, "--output", output,
            "--measured", *(files[name] for name in names),
        )  # fmt: skip
        return read_proof(output)

    assert [each.status for each in check("int8", "fp16").verdicts] == ["passed"] * 2
    with pytest.raises(MptTrtError, match=r"differs from 1 published fact.*log-probabilities, 8"):
        check("wrong", "fp16")
    assert not (tmp_path / "proof.json").exists()
    capsys.readouterr()
    assert [each.status for each in check("int8").verdicts] == ["passed", "not checked"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "not checked: there is no engine in float16, 1 rank" in printed


# --- verdicts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(engine: Path, folder: Path) -> FactMeasurements:
    return measure(engine, folder / "facts.json", folder / "again.json", "--report_only")


def verdict_of(
    facts: list[Fact], measured: FactMeasurements, name: str, change: Callable[[Measured], Measured]
) -> str:
    changed = measured.measured | {name: change(measured.measured[name])}
    result = compare("toy", facts, [replace(measured, measured=changed)])
    [verdict] = [each for each in result.verdicts if each.name == name]
    return verdict.status


def nudge(by: float) -> Callable[[Measured], Measured]:
    return lambda one: replace(one, numbers=(one.numbers[0] + by, *one.numbers[1:]))


def swapped(one: Measured, count: int) -> Measured:
    """Other tokens in the first places, as likely as the published ones."""
    return replace(one, tokens=(*(token + 1 for token in one.tokens[:count]), *one.tokens[count:]))


@pytest.mark.parametrize(
    ("name", "change", "status"),
    [
        ("log-probabilities, float32", nudge(9e-5), "passed"),
        ("log-probabilities, float32", nudge(2e-4), "failed"),
        ("log-probabilities, float32", nudge(float("nan")), "failed"),
        ("log-probabilities, float32", lambda one: replace(one, numbers=()), "failed"),
        ("greedy tokens, float32", nudge(9e-5), "passed"),
        ("greedy tokens, float32", nudge(2e-4), "failed"),
        ("greedy tokens, float32", lambda one: swapped(one, 2), "passed"),
        ("greedy tokens, float32", lambda one: swapped(one, 3), "failed"),
        ("greedy tokens, float32", lambda one: Measured(), "failed"),
        ("token ids of the prompt", lambda one: replace(one, tokens=one.tokens[1:]), "failed"),
        ("token ids of the prompt", lambda one: replace(one, tokens=(*one.tokens, 1)), "failed"),
        ("greedy text", lambda one: replace(one, text=f"{one.text}x"), "passed"),
        ("greedy text", lambda one: replace(one, text=f" {one.text}"), "failed"),
        ("greedy text", lambda one: Measured(problem="no tokenizer"), "not checked"),
    ],
)
def test_verdicts(
    measured: FactMeasurements,
    folder: Path,
    name: str,
    change: Callable[[Measured], Measured],
    status: str,
) -> None:
    facts = list(read_facts(folder / "facts.json").facts)
    assert verdict_of(facts, measured, name, change) == status


def test_facts_of_other_engines_are_not_checked(measured: FactMeasurements, folder: Path) -> None:
    result = compare("toy", read_facts(folder / "facts.json").facts, [measured])
    assert [each.problem for each in result.of_status("not checked")] == [
        "there is no engine in float16, 1 rank"
    ] * 2 + ["there is no engine in float16, int8_weight_only, 1 rank"]
    assert result.summary == "4 passed, 0 failed, 3 not checked"
    require_proved(result)
    other = replace(measured, kv_cache="int8")
    result = compare("toy", read_facts(folder / "facts.json").facts, [other])
    assert len(result.of_status("not checked")) == 7


def test_weights_are_of_the_same_number_of_ranks(measured: FactMeasurements) -> None:
    content = {
        "kind": "rank_weights", "name": "weights", "source": "me", "tolerance": 10, "reason": "-",
        "engine": {"dtype": "float32", "tp_size": 2}, "bytes": 1000,
    }  # fmt: skip
    path = Path(measured.engine_dir).parent / "weights.json"
    path.write_text(json.dumps({"facts": [content]}))
    facts = read_facts(path).facts
    given = replace(
        measured,
        measured={"weights": Measured(numbers=(1000.0, 1010.0))},
        hashes={fact.name: fact_hash(fact) for fact in facts},
    )
    assert compare("toy", facts, [given]).summary == "0 passed, 0 failed, 1 not checked"
    assert compare("toy", facts, [replace(given, ranks=2)]).of_status("passed")
    more = Measured(numbers=(1000.0, 1011.0))
    wrong = replace(given, ranks=2, measured={"weights": more})
    assert compare("toy", facts, [wrong]).of_status("failed")


def test_the_worst_engine_of_a_kind_counts(measured: FactMeasurements, folder: Path) -> None:
    facts = read_facts(folder / "facts.json").facts
    name = "log-probabilities, float32"
    wrong = nudge(2e-4)(measured.measured[name])
    other = replace(measured, ranks=2, measured=measured.measured | {name: wrong})
    lacking = replace(measured, ranks=4, measured={name: Measured(problem="no room")})
    for given in ([measured, other, lacking], [lacking, other, measured]):
        result = compare("toy", facts, given)
        assert [each.name for each in result.of_status("failed")] == [name]
    [*_, passed] = compare("toy", facts, [lacking, measured]).of_status("passed")
    assert passed.name == name


def test_measurements_of_other_facts_and_models_are_rejected(
    measured: FactMeasurements, folder: Path
) -> None:
    facts = read_facts(folder / "facts.json").facts
    changed = [replace(facts[0], tolerance=1), *facts[1:]]
    with pytest.raises(MptTrtError, match="the measurement of fact 'token ids of the prompt' is "):
        compare("toy", changed, [measured])
    with pytest.raises(MptTrtError, match=r"of the model mine, and .*give measurements of one mod"):
        compare("toy", facts, [measured, replace(measured, model_name="mine")])


@pytest.mark.parametrize(
    "quantization",
    [{}, {"method": "x"}, {"method": ["x"]}],
)
def test_damaged_measurements_are_one_sentence(
    quantization: dict, measured: FactMeasurements, folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "again.json").read_text()) | {"quantization": quantization}
    (tmp_path / "damaged.json").write_text(json.dumps(content))
    with pytest.raises(
        MptTrtError, match=r"damaged \(quantization = .*no quantization of an engin"
    ):
        read_measurements([tmp_path / "damaged.json"])


def common(kind: str, name: str) -> dict:
    return {
        "kind": kind, "name": name, "source": "me", "engine": {"dtype": "float32"},
        "tolerance": 0.1, "reason": "-",
    }  # fmt: skip


def score(name: str, text: str, metric: str = "bits_per_byte") -> dict:
    return common("score", name) | {"text": text, "metric": metric, "value": 1.0}


def test_facts_that_cannot_be_measured_leave_the_others(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff")
    (tmp_path / "word.txt").write_text("abcdefgh" * 200)
    os.mkfifo(tmp_path / "pipe")
    tokens = {"prompt_tokens": [1, 99_999], "tokens": [1]}
    none = {"prompt_log_probs": [], "log_probs": [-1.0]}
    facts = [
        score("empty", "empty.txt"),
        score("binary", "binary.txt"),
        score("pipe", "pipe"),
        score("missing", "missing.txt"),
        score("long", "x" * 300),
        score("word", "word.txt", "word_perplexity"),
        common("greedy_tokens", "beyond") | tokens,
        common("log_probs", "beyond too") | tokens | none,
        common("prompt_tokens", "prompt") | {"prompt": "def", "tokens": [1]},
    ]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"facts": facts}))
    result = measure(engine, path, tmp_path / "measured.json", "--report_only")
    problems = {name: str(each.problem) for name, each in result.measured.items()}
    assert problems["empty"].endswith("empty.txt: the text is empty")
    assert "binary.txt: cannot be read as UTF-8 text: " in problems["binary"]
    assert problems["pipe"].endswith("pipe: not a file")
    assert problems["missing"].endswith("missing.txt: no such file")
    assert problems["beyond"] == problems["beyond too"]
    assert problems["beyond"].startswith("token 99999 is beyond the engine's vocabulary of ")
    assert result.measured["prompt"].tokens
    # A perplexity beyond the largest float is no number, and fails.
    assert result.measured["word"] == Measured()
    verdicts = compare("toy", read_facts(path).facts, [result]).verdicts
    assert {each.status for each in verdicts if each.name == "word"} == {"failed"}


def test_a_flat_engine_fails() -> None:
    fact = GreedyTokens(
        name="flat", source="me", engine=EngineKind("float32"), tolerance=0.1, reason="-",
        prompt_tokens=(1,), tokens=(5, 6, 7),
    )  # fmt: skip
    assert fact.most_ties == 1
    flat = _compare(fact, [Measured(numbers=(0.0,) * 3, tokens=(0, 0, 0))])
    assert flat.deviation > fact.tolerance
    assert flat.found == "0 0 0 (3 of 3 tokens differ, and 1 may)"


@pytest.mark.parametrize("given", [(), (1.0, 2.0)])
def test_numbers_of_a_wrong_count_fail(given: tuple[float, ...]) -> None:
    keys = {"source": "me", "tolerance": 0.1, "reason": "-", "metric": "acc", "value": 1.0}
    plain, half = EngineKind("float32"), EngineKind("float16")
    single = Score(name="one", engine=plain, task="t", **keys)
    double = ScoreDifference(name="two", engine=plain, base=half, task="t", **keys)
    weights = RankWeights(name="three", engine=plain, source="me", tolerance=1, reason="-", bytes=5)
    for fact in (single, double, weights):
        found = _compare(fact, [Measured(numbers=given)] * 2)
        assert not found.deviation <= 0.1 or (isinstance(fact, RankWeights) and given)


def test_files_that_facts_name_are_not_replaced(engine: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "a.yaml").write_text("mine")
    (tmp_path / "text.txt").write_text("mine")
    task = common("score", "t") | {"task": "a", "task_dir": "tasks", "metric": "acc", "value": 1}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"facts": [score("text", "text.txt"), task]}))
    for output in (tmp_path / "text.txt", tasks / "a.yaml", path):
        with pytest.raises(MptTrtError, match="not replaced, because it is read from"):
            measure(engine, path, output)
        with pytest.raises(MptTrtError, match="not replaced, because it is read from"):
            call_tool(
                "steps/check_facts.py", "--model=m", "--facts", path, "--output", output,
                "--measured",
            )  # fmt: skip
        assert "mine" in output.read_text() or output == path


def test_a_folder_of_tasks_is_an_input() -> None:
    folder = Path("tasks")
    assert input_paths(Namespace(task_dir=folder, engine_dir=None)) == [folder]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_are_not_checked_without_lm_eval(engine: Path, tmp_path: Path) -> None:
    content = json.loads(FACTS.read_text())
    content["facts"] = [fact for fact in content["facts"] if "task" in fact]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(content))
    result = measure(engine, path, tmp_path / "measured.json", "--report_only")
    problems = {each.problem for each in result.measured.values()}
    assert len(result.measured) == 5
    assert problems == {"lm_eval is not installed; install it: pip install lm_eval"}


def test_windows_that_do_not_fit_are_not_checked(demo_engine: Path, tmp_path: Path) -> None:
    content = json.loads(FACTS.read_text())
    content["facts"] = [fact for fact in content["facts"] if fact.get("text") == "heldout.txt"]
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(content))
    result = measure(demo_engine, path, tmp_path / "measured.json", "--report_only")
    assert len(result.measured) == 2
    assert {each.problem for each in result.measured.values()} == {
        "the source read 512 tokens at a time, and the engine's cache holds 96; raise "
        "max_input_len or max_output_len of the variant"
    }
