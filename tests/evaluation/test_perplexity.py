"""Quality on held-out text: windows, the stored reference, and every figure against PyTorch's."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import MptForCausalLM

from mpt_trt.checkpoint.tokenizer import read_tokenizer
from mpt_trt.engines.load import load_engine
from mpt_trt.engines.manifest import read_manifest
from mpt_trt.engines.spec import BuildLimits
from mpt_trt.errors import MptTrtError
from mpt_trt.evaluation.heldout import HeldOut, read_heldout, read_text, windows, write_heldout
from mpt_trt.evaluation.logits import logits_in_pieces
from mpt_trt.evaluation.perplexity import engine_size, estimate, measure
from mpt_trt.evaluation.quality_result import Figures, read_quality
from mpt_trt.evaluation.reference import Head, read_head, reference_hidden
from mpt_trt.system import gpus
from support.built import Built
from support.checkpoints import CheckpointSpec, write_checkpoint
from support.engines import (
    FEATURES,
    build,
    call_tool,
    make_ft_checkpoint,
    one_line_error,
    random_ids,
    reference,
    run_tool,
)
from support.paths import REPOSITORY

DEMO = REPOSITORY / "resources" / "mpt-demo"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates a machine without a GPU, so that ONNX Runtime runs everything."""
    monkeypatch.setattr(gpus, "compute_capabilities", lambda: ())


def heldout_of(folder: Path, tokens: np.ndarray) -> HeldOut:
    hidden = reference_hidden(folder, tokens[:, :-1]).numpy()
    return HeldOut(tokens, hidden, "some text", "xxh3:0", "some reference")


# --- windows -------------------------------------------------------------------------------------


@given(st.integers(2, 400), st.integers(1, 20), st.integers(1, 40))
def test_windows_are_parts_of_the_text_that_do_not_overlap(size, number, length):
    tokens = list(range(size))
    if size <= length:
        with pytest.raises(MptTrtError, match=f"{size} tokens, but .* needs {length + 1}"):
            windows(tokens, number, length)
        return
    found = windows(tokens, number, length)
    assert found.shape == (min(number, (size - 1) // length), length + 1)
    for window in found:
        assert window.tolist() == list(range(window[0], window[0] + length + 1))
        assert window[0] % length == 0
    assert (np.diff(found[:, 0]) >= length).all()


def test_windows_are_spread_over_the_text():
    assert windows(list(range(101)), 3, 10)[:, 0].tolist() == [0, 40, 90]
    assert windows(list(range(101)), 1, 10)[:, 0].tolist() == [0]


def test_text_keeps_its_line_ends(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("a\r\nb\rc\u00e9\n".encode())
    assert read_text(path) == "a\r\nb\rc\u00e9\n"


@pytest.mark.parametrize("name", ["/dev/zero", "."])
def test_what_is_no_file_is_not_read(name):
    with pytest.raises(MptTrtError, match=r"as UTF-8 text: not a file; name a text file$"):
        read_text(Path(name))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n")
    assert read_text(path) == "a\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\xff", "as UTF-8 text: .*; convert it to UTF-8$"),
        ("ab".encode("utf-16-le"), r"contains NUL characters \(UTF-16\?\); convert it to UTF-8$"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MptTrtError, match=rf"text\.txt: .*{message}"):
        read_text(path)


# --- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["multi-head", "everything", "multi-query", "untied head"])
def test_head_makes_logits_of_what_is_stored(tmp_path, feature):
    spec = FEATURES[feature]
    folder = write_checkpoint(tmp_path / "hf", spec)
    ids = random_ids(spec, 3, 9)
    logits = read_head(folder).logits(reference_hidden(folder, ids)).numpy()
    expected = reference(spec, ids)
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_stored_reference_comes_back(tmp_path):
    tokens = np.arange(12).reshape(2, 6)
    hidden = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    stored = HeldOut(tokens, hidden, "text.txt", "xxh3:1", "somebody")
    write_heldout(stored, tmp_path / "reference.safetensors")
    found = read_heldout(tmp_path / "reference.safetensors")
    assert np.array_equal(found.tokens, tokens) and np.array_equal(found.hidden, hidden)
    assert (found.text, found.text_hash, found.reference) == ("text.txt", "xxh3:1", "somebody")
    assert found.inputs.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert found.targets.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 10, 11]]


def test_damaged_reference_is_refused(tmp_path):
    path = tmp_path / "reference.safetensors"
    with pytest.raises(MptTrtError, match=r"no such file; make it with compute_reference\.py"):
        read_heldout(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(MptTrtError, match="or damaged"):
        read_heldout(path)
    shutil.copyfile(DEMO / "model.safetensors", path)
    with pytest.raises(MptTrtError, match=r"not written by compute_reference\.py"):
        read_heldout(path)


def test_demo_model_has_the_loss_of_its_card():
    """`training.json` was measured by transformers on a GPU, on the first windows of 1024."""
    figures = json.loads((DEMO / "training.json").read_text())["quality"]["nats_per_token"]
    tokens = read_tokenizer(DEMO).encode(read_text(DEMO / "heldout.txt"))
    chosen = windows(tokens[: 4 * 1024 + 1], 4, 1024)
    logits = read_head(DEMO).logits(reference_hidden(DEMO, chosen[:, :-1]))
    loss = functional.cross_entropy(
        logits.double().flatten(0, 1), torch.tensor(chosen[:, 1:].ravel())
    )
    assert loss.item() == pytest.approx(figures["heldout_first_windows"], abs=2e-4)


# --- the engine's logits -------------------------------------------------------------------------


@pytest.mark.parametrize("max_logits", [None, 4, 5, 48])
@pytest.mark.parametrize("number", [1, 3, 7])
def test_pieces_cover_everything_within_the_limits(built: Built, number, max_logits):
    engine = load_engine(built.engine)
    limits = engine.manifest.spec.limits
    ids = random_ids(built.spec, number, 19)
    steps = []
    run = engine.model.step

    def step(input_ids, write_positions, logit_positions):
        steps.append((input_ids.shape, len(logit_positions)))
        return run(input_ids, write_positions, logit_positions)

    engine.model.step = step
    found = np.full((number, 19, built.spec.vocab_size), np.nan, np.float32)
    for piece in logits_in_pieces(replace(engine, max_logits=max_logits), ids):
        found[piece.sequences, piece.positions] = piece.logits
    expected = reference(built.spec, ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    for (rows, length), logits in steps:
        assert rows <= limits.max_batch_size and length <= limits.max_input_len
        assert logits <= (max_logits or math.inf)
    if max_logits == limits.max_batch_size:
        # As many sequences at a time as there are rows, token by token.
        assert len(steps) == 19 * math.ceil(number / 4) if number >= 4 else len(steps) <= 19


# --- figures -------------------------------------------------------------------------------------


def test_estimate_by_hand():
    values = np.array([[1.0, 3.0], [2.0, 4.0], [8.0, 6.0]])
    found = estimate(values)
    assert found.mean == 4
    assert found.standard_error == pytest.approx(statistics.stdev([2, 3, 7]) / math.sqrt(3))
    assert estimate(values[:1]).standard_error is None


def expected_figures(engine: np.ndarray, reference_: np.ndarray, targets: np.ndarray) -> dict:
    """Computes figures with PyTorch, from logits `[windows, length, vocab]`."""
    logits, base = torch.from_numpy(engine).double(), torch.from_numpy(reference_).double()
    wanted = torch.from_numpy(targets)

    def nats(values):
        return functional.cross_entropy(values.transpose(1, 2), wanted, reduction="none").mean(1)

    log_q, log_p = logits.log_softmax(-1), base.log_softmax(-1)
    kl = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean(1)
    same = (logits.argmax(-1) == base.argmax(-1)).double().mean(1)
    by_window = {
        "nats_per_token": nats(logits),
        "reference_nats_per_token": nats(base),
        "excess": nats(logits) - nats(base),
        "kl": kl,
        "top1": same,
    }
    return {
        name: (v.mean().item(), (v.std() / len(v) ** 0.5).item()) for name, v in by_window.items()
    }


def assert_figures(found: Figures, expected: dict) -> None:
    for name, (mean, error) in expected.items():
        assert getattr(found, name).mean == pytest.approx(mean, rel=1e-6, abs=1e-7), name
        assert getattr(found, name).standard_error == pytest.approx(error, rel=1e-5, abs=1e-7), name
    assert found.perplexity == pytest.approx(math.exp(expected["nats_per_token"][0]))
    assert found.reference_perplexity == pytest.approx(
        math.exp(expected["reference_nats_per_token"][0])
    )


@pytest.mark.parametrize("noise", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("max_logits", [None, 4])
def test_figures_equal_pytorchs(built: Built, monkeypatch, noise, max_logits):
    """An engine whose logits are wrong by `noise`, against the formulas of PyTorch."""
    monkeypatch.setattr("mpt_trt.evaluation.perplexity.CHUNK_VALUES", 5 * built.spec.vocab_size)
    tokens = random_ids(built.spec, 6, 20)
    heldout, head = heldout_of(built.hf, tokens), read_head(built.hf)
    engine = replace(load_engine(built.engine), max_logits=max_logits)
    run = engine.model.step
    # Independent noise for every token of the vocabulary.
    error = noise * np.random.default_rng(1).normal(size=built.spec.vocab_size).astype(np.float32)
    engine.model.step = lambda *feeds: run(*feeds) + error
    found = measure(engine, heldout, head)
    base = head.logits(torch.from_numpy(heldout.hidden)).numpy()
    clean = replace(load_engine(built.engine), max_logits=max_logits)
    logits = np.empty((*heldout.inputs.shape, built.spec.vocab_size), np.float32)
    for piece in logits_in_pieces(clean, heldout.inputs):
        logits[piece.sequences, piece.positions] = piece.logits + error
    expected = expected_figures(logits, base, heldout.targets)
    if noise == 0:
        # Pure rounding cannot be compared digit by digit.
        assert abs(found.excess.mean) < 1e-5 and 0 <= found.kl.mean < 1e-9
        expected = {name: expected[name] for name in ("nats_per_token", "reference_nats_per_token")}
    assert_figures(found, expected)
    assert (found.windows, found.tokens) == (6, 120 - 6)


def test_figures_equal_transformers_loss(built: Built):
    tokens = random_ids(built.spec, 3, 20, seed=4)
    found = measure(load_engine(built.engine), heldout_of(built.hf, tokens), read_head(built.hf))
    model = MptForCausalLM.from_pretrained(built.hf, dtype=torch.float32).eval()
    with torch.no_grad():
        # transformers shifts the labels by itself.
        losses = [model(row[None], labels=row[None]).loss for row in torch.from_numpy(tokens)]
    assert found.nats_per_token.mean == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert found.reference_nats_per_token.mean == pytest.approx(found.nats_per_token.mean, abs=1e-6)
    assert found.top1.mean == 1


def test_logits_that_are_not_finite_are_refused(built: Built):
    heldout = heldout_of(built.hf, random_ids(built.spec, 1, 5))
    engine = load_engine(built.engine)
    run = engine.model.step
    engine.model.step = lambda *feeds: run(*feeds) * np.float32(np.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        measure(engine, heldout, read_head(built.hf))


# --- size ----------------------------------------------------------------------------------------


def test_size_counts_each_file_once(built: Built, tmp_path):
    folder = tmp_path / "engine"
    shutil.copytree(built.engine, folder)
    manifest = read_manifest(folder)
    before = engine_size(folder, manifest)
    assert before.plans == (folder / "rank0.engine").stat().st_size
    weights = sum(path.stat().st_size for path in (folder / "weights").iterdir())
    assert before.networks == weights + (folder / "rank0.onnx").stat().st_size
    os.link(folder / "rank0.engine", folder / "the_same")
    assert engine_size(folder, manifest) == before
    (folder / "note.txt").write_bytes(b"12345")
    assert engine_size(folder, manifest) == replace(before, total=before.total + 5)
    assert before.total > before.plans + before.networks


# --- the tools -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text("some text that is long enough for a few windows of it. " * 4)
    return path


def compute_reference(model: Path, text: Path, output: Path, length: int = 16) -> Path:
    call_tool(
        "compute_reference.py",
        *("--model_dir", model, "--text", text, "--num_windows", 3),
        *("--window_length", length, "--output", output),
    )
    return output


def test_tools_measure_an_engine(built: Built, text: Path, tmp_path):
    stored = compute_reference(built.hf, text, tmp_path / "reference.safetensors")
    output = tmp_path / "quality.json"
    arguments = ("--engine_dir", built.engine, "--model_dir", built.hf)
    call_tool("measure_quality.py", *arguments, "--reference", stored, "--output", output)
    found = read_quality(output)
    heldout, head = read_heldout(stored), read_head(built.hf)
    assert heldout.tokens[0].tolist() == read_tokenizer(built.hf).encode(text.read_text())[:17]
    assert found.figures == measure(load_engine(built.engine), heldout, head)
    assert found.size == engine_size(built.engine, read_manifest(built.engine))
    assert found.ranks == 1 and found.dtype == "float32" and found.window_length == 16
    assert found.quantization == {"method": "none"} and found.kv_cache == "auto"
    assert found.runtime.startswith("ONNX Runtime") and "GPU" in found.fallback_reason
    assert found.reference.startswith("transformers ") and found.text == str(text)
    assert found.speed.decode_tokens_per_s > 0 and found.speed.prefill_tokens_per_s > 0
    assert found.prompt_len + found.new_tokens <= 32
    assert found.peak_memory > 50e6


def test_the_same_text_gives_the_same_bytes(built: Built, text: Path, tmp_path):
    first, second = (
        compute_reference(built.hf, text, tmp_path / f"{name}.safetensors") for name in "ab"
    )
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_mode & 0o444 == 0o444


def test_windows_that_the_engine_cannot_hold_are_refused(built: Built, text: Path, tmp_path):
    stored = compute_reference(built.hf, text, tmp_path / "reference.safetensors", length=33)
    with pytest.raises(MptTrtError, match=r"window_length = 33, but a row .* holds 32 tokens"):
        call_tool(
            "measure_quality.py",
            *("--engine_dir", built.engine, "--model_dir", built.hf),
            *("--reference", stored, "--output", tmp_path / "quality.json"),
        )
    assert not (tmp_path / "quality.json").exists()


def test_another_models_reference_is_refused(built: Built, text: Path, tmp_path):
    other = write_checkpoint(tmp_path / "hf", CheckpointSpec(vocab_size=80, seed=1))
    stored = compute_reference(other, text, tmp_path / "reference.safetensors")
    with pytest.raises(MptTrtError, match="they belong to different models"):
        call_tool(
            "measure_quality.py",
            *("--engine_dir", built.engine, "--model_dir", other),
            *("--reference", stored, "--output", tmp_path / "quality.json"),
        )


def test_a_text_that_is_too_short_gets_one_line(built: Built, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("abc")
    result = run_tool(
        "compute_reference.py",
        *("--model_dir", built.hf, "--text", path, "--output", tmp_path / "reference.safetensors"),
    )
    assert "window_length = 512 needs 513" in one_line_error(result)
    assert not (tmp_path / "reference.safetensors").exists()


def test_damaged_results_are_refused(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text('{"engine_dir": "x"}')
    with pytest.raises(MptTrtError, match="delete it and measure again"):
        read_quality(path)


def test_engines_that_return_one_row_of_logits_agree(tmp_path, built: Built):
    """The engine lacks gather_all_token_logits, which is TensorRT's limit then."""
    limits = BuildLimits(max_batch_size=3, max_input_len=8, max_output_len=16)
    spec = CheckpointSpec(num_heads=6, num_kv_heads=2, vocab_size=101, seed=3)
    engine = load_engine(build(make_ft_checkpoint(tmp_path, spec), tmp_path / "engine", limits))
    heldout = heldout_of(tmp_path / "hf", random_ids(spec, 5, 21))
    head: Head = read_head(tmp_path / "hf")
    free = measure(engine, heldout, head)
    bound = measure(replace(engine, max_logits=limits.max_logits), heldout, head)
    assert bound.nats_per_token.mean == pytest.approx(free.nats_per_token.mean, abs=1e-6)
    assert bound.top1.mean == free.top1.mean == 1
