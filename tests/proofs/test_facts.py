"""Files of facts: those that ship, and messages about others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpt_trt.errors import MptTrtError
from mpt_trt.proofs.facts import (
    KINDS,
    SHIPPED,
    EngineKind,
    LogProbs,
    RankWeights,
    ScoreDifference,
    existing_files,
    fact_hash,
    read_all_facts,
    read_facts,
    shipped_facts,
)
from mpt_trt.quantization.schemes import Awq, Quantization
from support.demo import MODEL

FILES = [*sorted(SHIPPED.glob("*.json")), MODEL / "facts.json"]
FACT = {
    "kind": "rank_weights",
    "name": "weights",
    "source": "somebody",
    "engine": {"dtype": "float16", "tp_size": 2},
    "tolerance": 10,
    "reason": "rounding",
    "bytes": 1000,
}
SCORE = {key: value for key, value in FACT.items() if key != "bytes"} | {
    "kind": "score",
    "metric": "acc",
    "value": 0.5,
}

BASE = {key: value for key, value in FACT.items() if key != "bytes"}
TEXT = BASE | {"kind": "text", "prompt": "a", "text": "b", "max_new_tokens": 4}
GREEDY = BASE | {"kind": "greedy_tokens", "prompt_tokens": [1], "tokens": [2]}


def write(path: Path, *facts: dict) -> Path:
    path.write_text(json.dumps({"facts": facts}))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_facts_that_ship_are_valid(path: Path) -> None:
    file = read_facts(path)
    assert file.facts
    assert bool(file.models) == (path.parent == SHIPPED)
    for fact in file.facts:
        for name in (getattr(fact, "text", None), getattr(fact, "task_dir", None)):
            if type(fact).__name__.startswith("Score") and name is not None:
                assert file.find(name).exists()


def test_every_kind_of_fact_is_in_a_file_that_ships() -> None:
    found = {type(fact) for path in FILES for fact in read_facts(path).facts}
    assert found == set(KINDS.values())


def test_facts_are_found_by_the_id_of_their_model() -> None:
    [path] = shipped_facts("mosaicml/mpt-7b")
    [log_probs] = [fact for fact in read_facts(path).facts if isinstance(fact, LogProbs)]
    assert len(log_probs.prompt_log_probs) == 4 and len(log_probs.log_probs) == 17
    assert log_probs.engine == EngineKind("float16", tp_size=2)
    assert shipped_facts("mosaicml/mpt-7b-chat") == shipped_facts("/some/mosaicml/mpt-7b") == []
    [instruct] = shipped_facts("mosaicml/mpt-7b-instruct")
    [*_, difference] = read_facts(instruct).facts
    assert isinstance(difference, ScoreDifference)
    assert [kind.method for kind in difference.engines] == ["int4_awq", "none"]


def test_weights_of_replit_are_those_of_nvidias_log() -> None:
    [path] = shipped_facts("replit/replit-code-v1_5-3b")
    [weights] = [fact for fact in read_facts(path).facts if isinstance(fact, RankWeights)]
    assert f"{weights.bytes / 1e9:.2f}" == "3.52"


def test_kinds_of_engine() -> None:
    kind = EngineKind("float16", "int4_awq")
    assert kind.is_of("float16", Quantization(Awq(128), "auto"))
    assert not kind.is_of("bfloat16", Quantization(Awq(128), "auto"))
    assert not kind.is_of("float16", Quantization(Awq(128), "int8"))
    assert not kind.is_of("float16", Quantization(None, "auto"))
    assert kind.label == "float16, int4_awq, 1 rank"
    assert EngineKind("float32", tp_size=2).label == "float32, 2 ranks"


@pytest.mark.parametrize(
    ("fact", "message"),
    [
        ({**FACT, "kind": "colour"}, r"fact 'weights': kind = 'colour': one of prompt_tokens, "),
        ({**FACT, "bytes": "many"}, r"fact 'weights': bytes = 'many': an integer is expected"),
        ({**FACT, "tolerance": -1}, r"tolerance = -1: at least 0 is expected"),
        ({**FACT, "reason": " "}, "fact 'weights': reason is empty"),
        ({**FACT, "engine": {"dtype": "fp16"}}, "dtype = 'fp16': one of float32, "),
        ({**FACT, "engine": {"dtype": "float16", "method": "x"}}, "method = 'x': one of none, "),
        ({**FACT, "engine": {"dtype": "float16", "tp_size": 0}}, "tp_size = 0: at least 1"),
        ({"kind": "rank_weights"}, r"facts\[0\]: name is missing"),
        (SCORE, "either task or text is expected"),
        ({**SCORE, "task": "a", "text": "b"}, "either task or text is expected"),
        ({**SCORE, "text": ""}, "fact 'weights': text is empty"),
        ({**SCORE, "task": "a", "window_length": 1}, "window_length = 1: at least 2 is expected"),
        ({**SCORE, "task": "a", "task_dir": "a\0"}, r"task_dir = 'a\\x00': it has a NUL character"),
        ({**SCORE, "task": "\ud800"}, r"task = '\\ud800': it has half of a surrogate pair"),
        (
            {**SCORE, "kind": "score_difference", "task": "a", "base": SCORE["engine"]},
            "base = float16, 2 ranks: another type or quantization than the engine's is expected",
        ),
        ({**FACT, "kind": ["text"]}, r"kind = \['text'\]: one of prompt_tokens, "),
        ({**FACT, "tolerances": 1}, "'tolerances': no such key; did you mean tolerance?"),
        ({**FACT, "engine": {"dtype": "float16", "tp": 2}}, r"engine\.'tp': no such key; "),
        ({**FACT, "name": "a\x1b[2J"}, r"name = 'a\\x1b\[2J': it has control characters"),
        ({**FACT, "bytes": 0}, "bytes = 0: at least 1 is expected"),
        ({**TEXT, "prompt": ""}, "fact 'weights': prompt is empty"),
        ({**TEXT, "text": ""}, "fact 'weights': text is empty"),
        ({**TEXT, "max_new_tokens": 0}, "max_new_tokens = 0: at least 1 is expected"),
        ({**GREEDY, "tokens": [3, -1]}, "tokens = -1: at least 0 is expected"),
        ({**SCORE, "text": "b"}, "metric = 'acc': of a text, there are word_perplexity, "),
    ],
)
def test_wrong_facts_are_named(fact: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(MptTrtError, match=message) as caught:
        read_facts(write(tmp_path / "own.json", fact))
    assert str(caught.value).startswith(f"{tmp_path / 'own.json'}: ")
    assert str(caught.value).endswith("; docs/proofs.md describes the format")


def test_log_probabilities_belong_to_tokens(tmp_path: Path) -> None:
    base = {key: value for key, value in FACT.items() if key != "bytes"} | {"kind": "log_probs"}
    given = {"prompt_tokens": [1, 2], "tokens": [3], "prompt_log_probs": [], "log_probs": [-1.0]}
    assert read_facts(write(tmp_path / "a.json", base | given)).facts
    for wrong in ({"log_probs": []}, {"prompt_log_probs": [-1, -2]}, {"tokens": []}):
        with pytest.raises(MptTrtError, match=r"is expected|is empty"):
            read_facts(write(tmp_path / "a.json", base | given | wrong))


def test_names_of_facts_are_unique(tmp_path: Path) -> None:
    with pytest.raises(MptTrtError, match="two facts have the name 'weights'"):
        read_facts(write(tmp_path / "a.json", FACT, FACT))
    one, other = write(tmp_path / "a.json", FACT), write(tmp_path / "b.json", FACT)
    with pytest.raises(MptTrtError, match=r"b\.json: fact 'weights' is also in .*a\.json"):
        read_all_facts([one, other])


def test_files_have_few_keys_and_a_limited_number_of_facts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"fact": [], "facts": []}))
    with pytest.raises(MptTrtError, match=r"'fact': no such key; did you mean facts\?"):
        read_facts(tmp_path / "a.json")
    many = [FACT | {"name": str(index)} for index in range(10_001)]
    with pytest.raises(MptTrtError, match="10,001 facts: at most 10,000 are expected"):
        read_facts(write(tmp_path / "a.json", *many))


def test_hashes_tell_facts_apart(tmp_path: Path) -> None:
    other = FACT | {"name": "other", "bytes": 1001}
    [one, two] = read_facts(write(tmp_path / "a.json", FACT, other)).facts
    [again] = read_facts(write(tmp_path / "b.json", FACT)).facts
    assert fact_hash(one) == fact_hash(again) != fact_hash(two)


def test_existing_files(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    for name in ("a.yaml", "data/b.txt", ".hidden/c", "__pycache__/d.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    found = list(existing_files(folder))
    assert found == [folder / "a.yaml", folder / "data/b.txt"]
    assert list(existing_files(folder / "a.yaml")) == [folder / "a.yaml"]
    assert list(existing_files(tmp_path / ("x" * 300))) == []
    for index in range(1000):
        (folder / f"{index}").touch()
    with pytest.raises(MptTrtError, match="more than 1,000 files; task_dir must be a folder with"):
        list(existing_files(folder))
