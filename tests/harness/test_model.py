"""Engines as models of lm-eval, against lm-eval's own `hf` model on the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mpt_trt.api.engine import Engine
from mpt_trt.errors import MptTrtError
from mpt_trt.harness import __main__ as command_line
from mpt_trt.harness.model import EngineModel
from mpt_trt.harness.tasks import TaskError, run_tasks
from support.demo import MODEL

TASKS = MODEL / "tasks"
MAX_LENGTH = 96
TEXT = (MODEL / "heldout.txt").read_text(encoding="utf-8")[:3000]
PAIRS = [
    ("import ", "os"),
    ("", "import os"),
    ("def read(self", ", size):\n    return self"),
    ("class A:\n    ", "pass"),
    (TEXT[:900], TEXT[900:1000]),
    ("x = ", "1"),
    ("x = ", "2"),
    ("def f(", "self"),
    ("<|endoftext|>import", " os"),
]


@pytest.fixture(scope="module")
def ours(demo_engine: Path) -> EngineModel:
    """The demo model in float32: 4 rows of 96 positions, so that longer texts need windows."""
    return EngineModel(Engine.load(demo_engine, "onnxruntime", num_threads=1))


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    # With its cache, it takes a text's logits for those of another that only begins alike.
    return HFLM(
        str(MODEL),
        dtype="float32",
        device="cpu",
        max_length=MAX_LENGTH,
        batch_size=4,
        logits_cache=False,
    )


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_log_likelihoods(ours: EngineModel, theirs: HFLM) -> None:
    made = requests("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(made), theirs.loglikelihood(made, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in expected], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert any(is_greedy for _, is_greedy in found)


def test_whole_texts(ours: EngineModel, theirs: HFLM) -> None:
    texts = [TEXT[:40], TEXT[:700], TEXT, "a"]
    made = requests("loglikelihood_rolling", [(text,) for text in texts])
    found = ours.loglikelihood_rolling(made)
    expected = theirs.loglikelihood_rolling(made, disable_tqdm=True)
    # A sum of a thousand logarithms, which lm-eval adds up in float32.
    counts = [len(ours.tok_encode(text)) for text in texts]
    for one, other, count in zip(found, expected, counts, strict=True):
        assert one == pytest.approx(other, abs=1e-4 * max(1, count / 100))


@pytest.mark.parametrize("settings", [{"until": ["\n"]}, {"until": [" = ", "("]}, {}])
def test_generated_texts(ours: EngineModel, theirs: HFLM, settings: dict) -> None:
    contexts = ["def fibonacci", "import os\n", TEXT[:800], "class Path", "x", "# A"]
    settings = settings | {"max_gen_toks": 20}
    made = requests("generate_until", [(context, settings) for context in contexts])
    assert ours.generate_until(made) == theirs.generate_until(made, disable_tqdm=True)


def test_tasks_of_all_kinds_have_the_same_scores(ours: EngineModel, theirs: HFLM) -> None:
    names = ["mpt_demo_text", "mpt_demo_choice", "mpt_demo_word"]
    found = run_tasks(ours, names, TASKS)
    expected = run_tasks(theirs, names, TASKS)
    assert set(found) == set(expected) == set(names)
    assert set(found["mpt_demo_text"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert 0 < found["mpt_demo_word"]["exact_match,first_word"] < 1
    assert found["mpt_demo_choice"]["acc"] > 0.4


def test_missing_data_are_named(ours: EngineModel, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="task no_such: not a task of lm-eval or "):
        run_tasks(ours, ["no_such"], TASKS)
    with pytest.raises(TaskError, match="task wikitext: its data are not on this machine"):
        run_tasks(ours, ["wikitext"], None)
    with pytest.raises(TaskError, match="nowhere: no such folder of tasks"):
        run_tasks(ours, ["wikitext"], tmp_path / "nowhere")


def write_task(folder: Path, name: str, **changes: str) -> Path:
    """A copy of the demo's task about texts, of one text, in which lines have other values."""
    (folder / "data.jsonl").write_text('{"text": "import os"}\n')
    lines = (TASKS / "mpt_demo_text.yaml").read_text().splitlines()
    given = {"task": name, "test": "data.jsonl"} | changes
    keys = [line.strip().partition(":")[0] for line in lines]
    changed = [
        f"{line.partition(key)[0]}{key}: {given[key]}" if key in given else line
        for key, line in zip(keys, lines, strict=True)
    ]
    (folder / f"{name}.yaml").write_text("\n".join(changed))
    return folder


def test_errors_of_tasks_are_named(
    ours: EngineModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path, "broken", output_type="no_such_type")
    with pytest.raises(TaskError, match=r"task broken: cannot be loaded \(\w+: .*no_such_type"):
        run_tasks(ours, ["broken"], tmp_path)
    write_task(tmp_path, "without_data", test="no_such.jsonl")
    with pytest.raises(TaskError, match="task without_data: its data are not on this machine"):
        run_tasks(ours, ["without_data"], tmp_path)
    (tmp_path / "torn.yaml").write_text("task: torn\n x: [")
    with pytest.raises(TaskError, match=r"task torn: .* valid YAML"):
        run_tasks(ours, ["torn"], tmp_path)
    write_task(tmp_path, "failing", doc_to_target='"{{nothing(text)}}"')
    with pytest.raises(TaskError, match=r"task failing: .*nothing"):
        run_tasks(ours, ["failing"], tmp_path)
    write_task(tmp_path, "good")

    def fail(*_: object) -> None:
        raise FloatingPointError("not finite")

    monkeypatch.setattr(EngineModel, "loglikelihood_rolling", fail)
    with pytest.raises(FloatingPointError, match="not finite"):
        run_tasks(ours, ["good"], tmp_path)

    def refuse(*_: object) -> None:
        raise MptTrtError("no room")

    monkeypatch.setattr(EngineModel, "loglikelihood_rolling", refuse)
    with pytest.raises(TaskError, match=r"task good: fails in lm-eval \(MptTrtError: no room\)"):
        run_tasks(ours, ["good"], tmp_path)


def test_arguments_are_checked(demo_engine: Path) -> None:
    folder = f"engine_dir={demo_engine},runtime=onnxruntime"
    with pytest.raises(MptTrtError, match="--model_args speed: no such argument"):
        EngineModel.create_from_arg_string(f"{folder},speed=1")
    with pytest.raises(MptTrtError, match="engine_dir is missing"):
        EngineModel.create_from_arg_string("runtime=auto", {"device": "cuda"})
    with pytest.raises(MptTrtError, match="max_length = 97: from 2 to the 96 positions"):
        EngineModel.create_from_arg_string(f"{folder},max_length=97")
    model = EngineModel.create_from_arg_string(f"{folder},max_length=64", {"batch_size": 3})
    assert model.max_length == 64


def test_unfit_generation_settings_are_refused(ours: EngineModel) -> None:
    with pytest.raises(MptTrtError, match="max_gen_toks = 96 leaves no room"):
        ours.generate_until(requests("generate_until", [("a", {"max_gen_toks": 96})]))
    with pytest.raises(MptTrtError, match="gen_kwargs num_beams: no such setting"):
        settings = {"num_beams": 2, "max_gen_toks": 8}
        ours.generate_until(requests("generate_until", [("a", settings)]))


def test_command_line_of_lm_eval(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(TASKS)
    arguments = [
        "lm-eval", "--model", "mpt_trt", "--tasks", "mpt_demo_text", "--include_path", ".",
        "--model_args", f"engine_dir={demo_engine},runtime=onnxruntime", "--limit", "2",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", arguments)
    command_line.main()
    assert "word_perplexity" in capsys.readouterr().out
