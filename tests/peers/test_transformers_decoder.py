"""Tests that transformers has for decoders with a cache, run against an engine of the same model.

The names are those of transformers' list (MptModelTester, ModelTesterMixin, GenerationTesterMixin,
MptIntegrationTests); tests of training, heads and file formats do not apply. transformers pads on
the left and hides padding with a mask; an engine pads on the right and needs none.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, MptForCausalLM

from mpt_trt.api.engine import Engine
from mpt_trt.engines.interface import RowModel
from support.demo import MODEL
from support.engines import deviation, feed, step

PROMPTS = ["def fibonacci", "import os\nimport sys\n\nclass Path", "x", "# Copyright"]
LENGTH = 24
# Another order of float32 sums, as a multiple of the logits' standard deviation.
BOUND = 2e-5


@pytest.fixture(scope="module")
def engine(demo_engine: Path) -> Engine:
    """4 rows of 96 positions, with steps of up to 32 tokens."""
    return Engine.load(demo_engine, "onnxruntime", num_threads=1)


@pytest.fixture(scope="module")
def rows(engine: Engine) -> RowModel:
    return engine.loaded.model


@pytest.fixture(scope="module")
def model() -> MptForCausalLM:
    return MptForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[:2000]
    tokens = AutoTokenizer.from_pretrained(str(MODEL))(text)["input_ids"]
    return np.array(tokens[: 2 * LENGTH]).reshape(2, LENGTH)


def forward(model: MptForCausalLM, ids: NDArray, **options: object) -> NDArray[np.float32]:
    with torch.inference_mode():
        return model(torch.from_numpy(ids), **options).logits.numpy()


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[rows, longest]` and their mask, as transformers' tokenizers pad them."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(padded), torch.tensor(mask)


def test_create_and_check_mpt_lm_head_model(rows, model, ids) -> None:
    assert deviation(feed(rows, ids, [LENGTH]), forward(model, ids)) < BOUND


def test_create_and_check_mpt_model_past(rows, model, ids) -> None:
    """One token after a past gives what the whole sequence gives, with and without a cache."""
    whole = forward(model, ids)
    with torch.inference_mode():
        past = model(torch.from_numpy(ids[:, :-1]), use_cache=True).past_key_values
        theirs = model(torch.from_numpy(ids[:, -1:]), past_key_values=past).logits.numpy()
    ours = feed(rows, ids, [LENGTH - 1, 1])[:, -1:]
    assert deviation(ours, whole[:, -1:]) < BOUND
    assert deviation(ours, theirs) < BOUND


def test_create_and_check_mpt_model_past_large_inputs(rows, model, ids) -> None:
    """Several tokens after a past, in steps of several lengths."""
    whole = forward(model, ids)
    with torch.inference_mode():
        past = model(torch.from_numpy(ids[:, :-3]), use_cache=True).past_key_values
        theirs = model(torch.from_numpy(ids[:, -3:]), past_key_values=past).logits.numpy()
    ours = feed(rows, ids, [LENGTH - 3, 3])
    assert deviation(ours[:, -3:], theirs) < BOUND
    assert deviation(ours, whole) < BOUND
    assert deviation(feed(rows, ids, [5, 1, 7, LENGTH - 13]), whole) < BOUND


def test_create_and_check_mpt_model_attention_mask_past(rows, model, ids) -> None:
    """Tokens that a mask hides do not count: here, the tokens are written over.

    transformers hides the second half of the past; an engine forgets it when the next step is
    written there.
    """
    half = LENGTH // 2
    changed = ids.copy()
    changed[:, half:] = (changed[:, half:] + 7) % model.config.vocab_size
    feed(rows, changed, [LENGTH])
    ours = step(rows, ids[:, half : half + 3], [half, half])
    assert deviation(ours, forward(model, ids[:, : half + 3])[:, half:]) < BOUND


def test_left_padding_compatibility(rows, model, engine) -> None:
    """Prompts of other lengths in the batch change nothing: padded left there, and right here."""
    prompts = [engine.text.encode(prompt) for prompt in PROMPTS]
    padded, mask = left_padded(prompts)
    with torch.inference_mode():
        theirs = model(padded, attention_mask=mask).logits[:, -1].numpy()
    width = padded.shape[1]
    right = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    lengths = np.array(list(map(len, prompts)))
    rows.start(len(prompts))
    last = np.stack([np.arange(len(prompts)), lengths - 1], axis=1)
    ours = rows.step(right, np.zeros(len(prompts), np.int64), last).copy()
    alone = np.concatenate([feed(rows, np.array([one]), [len(one)])[:, -1] for one in prompts])
    assert deviation(ours, theirs) < BOUND
    assert deviation(ours, alone) < BOUND


@pytest.mark.parametrize("beams", [1, 3])
def test_batch_generation(engine, model, beams) -> None:
    """Greedy and beam search of a batch, which transformers pads on the left."""
    prompts = [engine.text.encode(prompt) for prompt in PROMPTS]
    # Beams are rows of the cache, of which there are four.
    batches = [prompts] if beams == 1 else [[prompt] for prompt in prompts]
    for batch in batches:
        padded, mask = left_padded(batch)
        theirs = model.generate(
            padded, attention_mask=mask, max_new_tokens=12, num_beams=beams, do_sample=False
        )[:, padded.shape[1] :].tolist()
        ours = [list(output.tokens) for output in engine.generate(batch, 12, num_beams=beams)]
        for one, other in zip(ours, theirs, strict=True):
            assert one == other[: len(one)]
            # The rest is padding after the end token.
            assert set(other[len(one) :]) <= {0}


def test_generate_continue_from_past_key_values(engine) -> None:
    """Three tokens and then one more are the four tokens of one generation."""
    prompts = [engine.text.encode(prompt) for prompt in PROMPTS]
    whole = engine.generate(prompts, 4, end_ids=())
    first = engine.generate(prompts, 3, end_ids=())
    rest = engine.generate(
        [[*prompt, *one.tokens] for prompt, one in zip(prompts, first, strict=True)], 1, end_ids=()
    )
    for all_four, three, one in zip(whole, first, rest, strict=True):
        assert all_four.tokens == (*three.tokens, *one.tokens)


def test_greedy_generate_dict_outputs_use_cache(engine, model) -> None:
    """Log-probabilities of a generation are those of transformers' scores."""
    prompt = engine.text.encode(PROMPTS[0])
    with torch.inference_mode():
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=8,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    [completion] = engine.generate([prompt], 8)[0].completions
    assert list(completion.tokens) == theirs.sequences[0, len(prompt) :].tolist()
    expected = [
        torch.log_softmax(scores[0].double(), -1)[token].item()
        for scores, token in zip(theirs.scores, completion.tokens, strict=True)
    ]
    assert completion.log_probs == pytest.approx(expected, abs=1e-4)
