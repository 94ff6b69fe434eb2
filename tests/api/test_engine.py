"""The Python interface: texts, ids and chats in; texts, log-probabilities and streams out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpt_trt import Engine, MptTrtError
from mpt_trt.api.text import EngineText
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.generation.generate import generate
from support.generation import greedy
from support.paths import REPOSITORY

PROMPTS = ["def read(self", "import os\n\n\nclass Path", "The"]
CHAT_ML = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def engine(demo_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(CHAT_ML)
    return Engine.load(demo_engine, num_threads=1, chat_template=template)


def ids(engine: Engine, texts: list[str]) -> list[list[int]]:
    return [engine.text.encode(text) for text in texts]


def test_texts_give_the_tokens_of_generation(engine: Engine) -> None:
    found = engine.generate(PROMPTS, max_new_tokens=12)
    expected = generate(
        engine.loaded.model, ids(engine, PROMPTS), greedy(max_new_tokens=12, end_ids=(0,))
    )
    assert [[output.tokens] for output in found] == [[one.tokens for one in r] for r in expected]
    assert [list(output.prompt_tokens) for output in found] == ids(engine, PROMPTS)
    decode = engine.text.require_tokenizer().decode
    assert [output.text for output in found] == [decode(list(o.tokens)) for o in found]
    reasons = ["stop" if output.tokens[-1] == 0 else "length" for output in found]
    assert [output.completions[0].finish_reason for output in found] == reasons
    assert len(set(reasons)) == 2
    assert found[0].completions[0].log_probs == pytest.approx(expected[0][0].log_probs)


def test_ids_and_texts_are_the_same_prompts(engine: Engine) -> None:
    texts = engine.generate(PROMPTS, 6)
    rows = ids(engine, PROMPTS)
    assert engine.generate(rows, 6) == engine.generate([np.array(row) for row in rows], 6) == texts


def test_a_stream_gives_what_generate_gives(engine: Engine) -> None:
    options = {"top_k": 5, "random_seed": 3, "top_log_probs": 2}
    expected = engine.generate(PROMPTS, 10, **options)
    parts = list(engine.stream(PROMPTS, 10, **options))
    for index, output in enumerate(expected):
        own, completion = [part for part in parts if part.index == index], output.completions[0]
        assert tuple(part.token for part in own) == completion.tokens
        assert "".join(part.text for part in own) == completion.text
        assert tuple(part.log_prob for part in own) == completion.log_probs
        assert tuple(part.top_log_probs for part in own) == completion.top_log_probs
        reasons = [part.finish_reason for part in own]
        assert reasons == [None] * (len(own) - 1) + [completion.finish_reason]
        assert all(len(part.top_log_probs) == 2 for part in own)


def test_stop_strings_and_end_tokens_end_a_text(engine: Engine) -> None:
    (free,) = engine.generate(PROMPTS[:1], 16)
    stop = free.text[5:8]
    (stopped,) = engine.generate(PROMPTS[:1], 16, stop=[stop])
    assert stopped.text == free.text[: free.text.index(stop)]
    assert stopped.completions[0].finish_reason == "stop"
    assert "".join(p.text for p in engine.stream(PROMPTS[:1], 16, stop=stop)) == stopped.text
    (ended,) = engine.generate(PROMPTS[:1], 16, end_ids=[free.tokens[4], free.tokens[6]])
    assert ended.tokens == free.tokens[: free.tokens.index(free.tokens[4]) + 1]
    assert ended.completions[0].finish_reason == "stop"


def test_beams_come_best_first(engine: Engine) -> None:
    (output,) = engine.generate(PROMPTS[:1], 8, num_beams=3)
    scores = [completion.score for completion in output.completions]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    best = output.completions[0]
    assert best.cumulative_log_prob / len(best.tokens) == pytest.approx(scores[0], abs=1e-5)


def test_a_chat_is_a_prompt(engine: Engine) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = "system: Be brief.\nuser: Hello\n"
    assert engine.generate([messages], 5) == engine.generate([text], 5, add_special_tokens=False)


def test_one_call_at_a_time(engine: Engine) -> None:
    stream = engine.stream(PROMPTS, 5)
    next(stream)
    with pytest.raises(MptTrtError, match="finish or close the stream first"):
        engine.generate(PROMPTS, 5)
    stream.close()
    assert len(engine.generate(PROMPTS, 5)) == 3
    assert list(engine.stream([], 5)) == engine.generate([], 5) == []


def test_engines_share_a_process_and_end(demo_engine: Path, engine: Engine) -> None:
    with Engine.load(str(demo_engine), "onnxruntime", num_threads=1) as other:
        ours, theirs = engine.stream(PROMPTS, 5), other.stream(PROMPTS, 5)
        pairs = list(zip(ours, theirs, strict=True))
        assert all(one == two for one, two in pairs)
        assert other.runtime.startswith("ONNX Runtime") and other.fallback_reason
        assert repr(other) == f"<Engine: {other.runtime}>"
    assert repr(other) == "<Engine: closed>"
    with pytest.raises(MptTrtError, match="the engine was closed"):
        other.generate(PROMPTS, 5)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("The", {}, "give a list of prompts"),
        ([7], {}, "'7' is not a prompt"),
        ([[1.5]], {}, "is not a prompt"),
        ([""], {}, "a prompt is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([[{"role": "user"}]], {}, "is not a message"),
        (PROMPTS * 2, {}, "with num_beams 1 need 6 cache rows"),
        (PROMPTS, {"temperature": 0, "top_k": 0}, "temperature is 0"),
        (PROMPTS, {"temperature": "hot"}, "wrong type"),
        (PROMPTS, {"beams": 2}, "unknown option 'beams'; known are add_special_tokens, end_ids"),
        (PROMPTS, {"stop": [""]}, "an empty string"),
        (PROMPTS, {"num_beams": 2, "stop": ["a"]}, "stop strings need num_beams 1"),
        (PROMPTS, {"num_beams": 2, "top_log_probs": 1}, "top_log_probs is 1 with num_beams 2"),
    ],
)
def test_bad_requests_are_rejected(engine: Engine, prompts, options, message: str) -> None:
    with pytest.raises(MptTrtError, match=message):
        engine.generate(prompts, 4, **options)


@pytest.mark.parametrize(
    ("folder", "options", "message"),
    [
        (None, {"runtime": "cuda"}, "runtime = 'cuda': one of auto, tensorrt, onnxruntime is"),
        (None, {"activations": "int4"}, "activations = 'int4': one of exact, int8 is possible"),
        ("", {}, "the path of the engine is empty; give an engine directory"),
        ("nowhere", {}, "no such folder: nowhere; give an engine directory"),
        (__file__, {}, r"not a folder: .*test_engine\.py; give an engine directory"),
    ],
)
def test_what_cannot_be_loaded(demo_engine: Path, folder, options, message: str) -> None:
    with pytest.raises(MptTrtError, match=message):
        Engine.load(demo_engine if folder is None else folder, **options)


def test_failures_are_the_one_exception(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(engine.loaded.model, "step", fail)
        with pytest.raises(MptTrtError, match=r"the engine failed \(RuntimeError: out of luck\)"):
            engine.generate(PROMPTS, 4)
    assert engine.generate(PROMPTS, 4)


def test_without_a_tokenizer_prompts_are_ids(demo_engine: Path) -> None:
    text = EngineText(read_manifest(demo_engine), None, MptTrtError("the tokenizer is gone"))
    with Engine.load(demo_engine, num_threads=1, text=text) as engine:
        (output,) = engine.generate([[5, 6]], 3)
        assert output.text == " ".join(map(str, output.tokens))
        assert "".join(part.text for part in engine.stream([[5, 6]], 3)) == output.text
        with pytest.raises(MptTrtError, match="the tokenizer is gone"):
            engine.generate(["The"], 3)


def test_importing_the_package_is_light() -> None:
    code = "import mpt_trt, sys; assert 'numpy' not in sys.modules; print(mpt_trt.Engine.__name__)"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True, cwd=REPOSITORY) == "Engine\n"
    with pytest.raises(ImportError):
        from mpt_trt import Motor  # noqa: F401
